"""The rules that choose between candidates, each with what went in and what came out. Every number is a decimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from itertools import combinations
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dentalgemma.evaluation.plan import Declared, Plan, PlanError, SubScore, Veto, check_claims, format_number

DIGITS = 50  # of intermediate results, whatever context the caller has set


class Late(BaseModel):
    """What was found out after the lock: grades, and who breaks a criterion that has a veto."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sub_scores: dict[str, Declared] = Field(default_factory=dict)
    veto: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _claims_nothing(cls, document: object) -> object:
        check_claims(document)
        return document


class Rule(NamedTuple):
    """One rule as applied: what it says, what went in, what came out. Numbers are strings."""

    rule: str
    says: str
    input: object
    outcome: str


class Choice(NamedTuple):
    """What the rules came to; `winner` is None where the plan cannot tell its candidates apart."""

    rules: list[Rule]
    composites: dict[str, Decimal]
    order: list[str]
    winner: str | None


def choose(plan: Plan, documents: Mapping[str, Mapping], late: Late | None = None) -> Choice:
    """The plan's rules in their order: sub-scores, composite, order, overlap, then tie, tiebreakers and veto.

    A winner that a veto stops leaves the field, and the rest are put in order again, by the same rules.

    Raises:
        EvaluationError: when a scores document lacks a number that the plan asks for.
    """
    late = late or Late()
    with localcontext(prec=DIGITS):
        table = {name: _grade(plan, name, documents, late) for name in plan.sub_scores}
        composites = {name: _compose(plan, table, name) for name in plan.candidates}
        order = sorted(plan.candidates, key=lambda name: (-composites[name], list(plan.candidates).index(name)))
        alike = _find_alike(plan, documents)
        rules = [
            _tell_sub_scores(plan, table, documents),
            _tell_composites(plan, table, composites),
            _tell_order(plan, order, composites),
            _tell_overlap(plan, documents, alike),
        ]
        left = list(order)
        winner, stopped = None, True
        while left and stopped:
            winner, told = _lead(plan, left, composites, table, documents, alike)
            stopped, vetoes = _apply_vetoes(plan, winner, late) if winner else (False, [])
            rules += told + vetoes
            if stopped:
                left.remove(winner)
                winner = None
        rules.append(_tell_outcome(winner, left))
        order = [name for name in (winner,) if name] + [name for name in order if name != winner]
    return Choice(rules, composites, order, winner)


def map_value(sub_score: SubScore, value: Decimal) -> Decimal:
    """The score of a value, unrounded: on the line or by the first step that it reaches, clamped at both ends."""
    if sub_score.linear is not None:
        (start, end), (low, high) = sub_score.linear.values, sub_score.linear.scores
        share = (value - start) / (end - start)
        return low + min(max(share, Decimal(0)), Decimal(1)) * (high - low)
    return next((score for threshold, score in sub_score.steps or () if value >= threshold), Decimal(0))


def _round(plan: Plan, value: Decimal) -> Decimal:
    """To a whole multiple of the quantum, which need not be a power of ten."""
    quantum = plan.rounding.quantum
    return (value / quantum).quantize(Decimal(1), rounding=plan.rounding.mode) * quantum


def _grade(plan: Plan, name: str, documents: Mapping[str, Mapping], late: Late) -> dict[str, Decimal]:
    """One sub-score of every candidate, rounded."""
    sub_score = plan.sub_scores[name]
    if sub_score.declared is None:
        values = {candidate: read_number(documents, candidate, sub_score.place) for candidate in plan.candidates}
        return {candidate: _round(plan, map_value(sub_score, value)) for candidate, value in values.items()}
    declared = sub_score.declared if sub_score.declared.grades is not None else late.sub_scores.get(name)
    if declared is None or declared.grades is None:
        raise PlanError(f"sub_scores.{name}: the plan declares it without grades; give them in a file with --declared")
    return {candidate: _round(plan, declared.grades[candidate]) for candidate in plan.candidates}


def _compose(plan: Plan, table: Mapping[str, Mapping[str, Decimal]], candidate: str) -> Decimal:
    total = sum((plan.sub_scores[name].weight * own[candidate] for name, own in table.items()), Decimal(0))
    return _round(plan, total)


def find_value(document: Mapping, place: str) -> object:
    """What a scores document holds at a dotted place, None where there is nothing; a number counts into a list."""
    value: object = document
    for part in place.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def read_number(documents: Mapping[str, Mapping], candidate: str, place: str) -> Decimal:
    """The number at a place of a candidate's scores document.

    Raises:
        EvaluationError: naming both, when there is none.
    """
    value = find_value(documents[candidate], place)
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise PlanError(f"the scores of {candidate} have no number at {place}, which the plan asks for")
    return Decimal(value)


def _find_alike(plan: Plan, documents: Mapping[str, Mapping]) -> dict[frozenset[str], str]:
    """Pairs that do not count as different, and why: their intervals share a point, or there is none."""
    alike = {}
    for first, second in combinations(plan.candidates, 2):
        one, other = (find_value(documents[name], plan.different_in) for name in (first, second))
        if not (_is_interval(one) and _is_interval(other)):
            alike[frozenset((first, second))] = f"no interval at {plan.different_in}"
        elif one[0] <= other[1] and other[0] <= one[1]:
            alike[frozenset((first, second))] = "the intervals overlap"
    return alike


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, (int, Decimal)) for end in value)


def _lead(
    plan: Plan,
    left: Sequence[str],
    composites: Mapping[str, Decimal],
    table: Mapping[str, Mapping[str, Decimal]],
    documents: Mapping[str, Mapping],
    alike: Mapping[frozenset[str], str],
) -> tuple[str | None, list[Rule]]:
    """Who leads among those left, by tie rule and tiebreakers; None where these do not tell them apart."""
    first = left[0]
    behind = {name: composites[first] - composites[name] for name in left[1:]}
    tied = [first]
    for name, gap in behind.items():
        overlapping = plan.when_not_different == "tie" and frozenset((first, name)) in alike
        if gap < plan.tie_below or gap == 0 or overlapping:
            tied.append(name)
    says = f"candidates less than {format_number(plan.tie_below)} behind the first are tied with it"
    if plan.when_not_different == "tie":
        says += ", and those not different from it"
    given = {name: f"{show_number(gap, plan)} behind {first}" for name, gap in behind.items()}
    rules = [Rule("tie", says, given, f"tied: {', '.join(tied)}" if len(tied) > 1 else f"no tie; {first} leads")]
    for tiebreaker in plan.tiebreakers:
        if len(tied) == 1:
            break
        values = {name: _tiebreak(tiebreaker, name, table, documents) for name in tied}
        tied = [name for name in tied if values[name] == max(values.values())]
        outcome = f"{tied[0]} leads" if len(tied) == 1 else f"still tied: {', '.join(tied)}"
        shown = {name: format_number(value) for name, value in values.items()}
        rules.append(Rule("tiebreaker", f"the higher {tiebreaker} leads", shown, outcome))
    return (tied[0] if len(tied) == 1 else None), rules


def _tiebreak(
    tiebreaker: str, name: str, table: Mapping[str, Mapping[str, Decimal]], documents: Mapping[str, Mapping]
) -> Decimal:
    return table[tiebreaker][name] if tiebreaker in table else read_number(documents, name, tiebreaker)


def _apply_vetoes(plan: Plan, winner: str, late: Late) -> tuple[bool, list[Rule]]:
    rules, stopped = [], False
    for name, veto in plan.veto.items():
        broken = winner in {*veto.names, *late.veto.get(name, ())}
        given = {"leads": winner, "breaks it": broken, "documented alternative": veto.unless}
        if not broken:
            outcome = f"{winner} does not break it"
        elif veto.unless:
            outcome = f"{winner} breaks it and stays, by the documented alternative"
        else:
            outcome, stopped = f"{winner} breaks it without a documented alternative, and cannot be chosen", True
        rules.append(Rule(f"veto: {name}", _say_veto(veto), given, outcome))
    return stopped, rules


def _say_veto(veto: Veto) -> str:
    return f"none may be chosen of whom it holds: {veto.criterion}; unless an alternative is documented in the plan"


def _tell_sub_scores(plan: Plan, table: Mapping[str, Mapping[str, Decimal]], documents: Mapping[str, Mapping]) -> Rule:
    given = {}
    for name, sub_score in plan.sub_scores.items():
        own = {"weight": format_number(sub_score.weight), "rule": _say_mapping(sub_score)}
        if sub_score.place:
            own["values"] = {who: str(read_number(documents, who, sub_score.place)) for who in plan.candidates}
        given[name] = own | {"scores": {who: show_number(score, plan) for who, score in table[name].items()}}
    says = f"every criterion gives 0 to 10, rounded to {_say_rounding(plan)}"
    return Rule("sub-scores", says, given, f"{len(table)} sub-scores for each of {len(plan.candidates)} candidates")


def _say_mapping(sub_score: SubScore) -> str:
    if sub_score.declared:
        return f"declared by {sub_score.declared.who}: {sub_score.declared.rationale}"
    if sub_score.linear:
        values, scores = (list(map(format_number, ends)) for ends in (sub_score.linear.values, sub_score.linear.scores))
        return f"{sub_score.place}, linear from {values[0]} ({scores[0]}) to {values[1]} ({scores[1]}), the same beyond"
    steps = ", ".join(f"{format_number(score)} from {format_number(value)}" for value, score in sub_score.steps or ())
    return f"{sub_score.place}, in steps: {steps}, else 0"


def _say_rounding(plan: Plan) -> str:
    return f"{format_number(plan.rounding.quantum)} ({plan.rounding.mode})"


def _tell_composites(plan: Plan, table: Mapping[str, Mapping[str, Decimal]], composites: Mapping[str, Decimal]) -> Rule:
    terms = {
        name: " + ".join(
            f"{format_number(plan.sub_scores[key].weight)} x {show_number(own[name], plan)}"
            for key, own in table.items()
        )
        for name in composites
    }
    outcome = ", ".join(f"{name} {show_number(value, plan)}" for name, value in composites.items())
    return Rule("composite", f"the weighted sum of the sub-scores, rounded to {_say_rounding(plan)}", terms, outcome)


def _tell_order(plan: Plan, order: Sequence[str], composites: Mapping[str, Decimal]) -> Rule:
    given = {name: show_number(composites[name], plan) for name in order}
    return Rule("order", "the higher composite comes first", given, ", ".join(order))


def _tell_overlap(plan: Plan, documents: Mapping[str, Mapping], alike: Mapping[frozenset[str], str]) -> Rule:
    says = f"two candidates are different only if their intervals ({plan.different_in}) do not overlap"
    says += "; otherwise " + (
        "they are tied" if plan.when_not_different == "tie" else "it is said, and changes nothing"
    )
    intervals = {}
    for name in plan.candidates:
        interval = find_value(documents[name], plan.different_in)
        intervals[name] = list(map(str, interval)) if _is_interval(interval) else None
    pairs = []
    for pair in combinations(plan.candidates, 2):
        why = alike.get(frozenset(pair))
        pairs.append(f"{pair[0]} and {pair[1]} " + (f"are not different ({why})" if why else "are different"))
    return Rule("overlap", says, intervals, "; ".join(pairs))


def _tell_outcome(winner: str | None, left: Sequence[str]) -> Rule:
    if winner:
        return Rule("outcome", "who leads and is not stopped by a veto is chosen", list(left), f"{winner} is chosen")
    why = "the tiebreakers do not tell the first ones apart" if left else "a veto stops every candidate"
    return Rule("outcome", "who leads and is not stopped by a veto is chosen", list(left), f"nobody is chosen: {why}")


def show_number(value: Decimal, plan: Plan) -> str:
    """A rounded number with the digits of the quantum: 8.4 is written 8.40."""
    places = max(0, -int(plan.rounding.quantum.normalize().as_tuple().exponent))
    return f"{value:.{places}f}"
