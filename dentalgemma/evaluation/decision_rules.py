"""The rules that choose between candidates, each with what went in and what came out. Every number is a decimal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from itertools import combinations
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dentalgemma.evaluation.plan import (
    DIGITS,
    EXPONENTS,
    Declared,
    Plan,
    PlanError,
    SubScore,
    Tiebreaker,
    Veto,
    check_claims,
    format_number,
)
from dentalgemma.evaluation.statistics import wilson_interval

SHOWN = 4  # digits after the point of a measured number


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
    """One rule as applied: what it says, what went in, what came out. Numbers are strings.

    `input` is for readers: measured numbers have four digits after the point, and `exact` has all of them.
    """

    rule: str
    says: str
    input: object
    outcome: str
    exact: Mapping[str, object] | None = None


class Choice(NamedTuple):
    """What the rules came to; `winner` is None where the plan cannot tell its candidates apart."""

    rules: list[Rule]
    composites: dict[str, Decimal]
    order: list[str]
    winner: str | None


def choose(plan: Plan, documents: Mapping[str, Mapping], late: Late | None = None) -> Choice:
    """The plan's rules in their order: sub-scores, composite, order, overlap, then veto, tie and tiebreakers.

    Whom a veto stops leaves the field before anybody is tied with anybody.

    Raises:
        EvaluationError: when a scores document lacks a number that the plan asks for.
    """
    late = late or Late()
    with localcontext(prec=DIGITS):
        table = {name: _grade(plan, name, documents, late) for name in plan.sub_scores}
        composites = {name: _compose(plan, table, name) for name in plan.candidates}
        order = sorted(plan.candidates, key=lambda name: (-composites[name], list(plan.candidates).index(name)))
        intervals = {name: find_interval(documents[name], plan.different_in) for name in plan.candidates}
        alike = _find_alike(plan, intervals)
        stopped, vetoes = _apply_vetoes(plan, order, late)
        rules = [
            _tell_sub_scores(plan, table, documents),
            _tell_composites(plan, table, composites),
            _tell_order(plan, order, composites),
            _tell_overlap(plan, intervals, alike),
            *vetoes,
        ]
        left = [name for name in order if name not in stopped]
        winner = None
        if left:
            winner, told = _lead(plan, left, composites, table, documents, alike)
            rules += told
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
    if not _is_score(value):
        raise PlanError(f"the scores of {candidate} have {Decimal(value):.3e} at {place}, which nobody measured")
    return Decimal(value)


def _is_score(value: object) -> bool:
    """Whether it is a number that can have been measured; the smallest float is 5e-324."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return False
    return -400 < Decimal(value).adjusted() < EXPONENTS


class Found(NamedTuple):
    """An interval as the overlap rule takes it; `instead` where Wilson's stands in for one without width."""

    low: Decimal
    high: Decimal
    instead: bool


def find_interval(document: Mapping, place: str) -> Found | None:
    """The interval at a place. One without width tells nothing: resampling answers that are all alike gives the same.

    Then it is Wilson's, as it stands beside it or from the counts beside it; `None` where there are none.
    """
    value = find_value(document, place)
    if not _is_interval(value):
        return None
    if value[0] != value[1]:
        return Found(Decimal(value[0]), Decimal(value[1]), False)
    wilson = find_value(document, re.sub(r"interval_by_(image|question)$", "wilson", place))
    if _is_interval(wilson) and wilson[0] != wilson[1]:
        return Found(Decimal(wilson[0]), Decimal(wilson[1]), True)
    beside = place.rpartition(".")[0]
    correct, n = (find_value(document, f"{beside}.{name}") for name in ("correct", "n"))
    if not (type(correct) is type(n) is int and 0 <= correct <= n and n > 0):
        return None
    low, high = (Decimal(str(end)) for end in wilson_interval(correct, n))
    return Found(low, high, True)


def _find_alike(plan: Plan, intervals: Mapping[str, Found | None]) -> dict[frozenset[str], str]:
    """Pairs that do not count as different, and why: their intervals share a point, or there is none."""
    alike = {}
    for first, second in combinations(plan.candidates, 2):
        one, other = intervals[first], intervals[second]
        if one is None or other is None:
            alike[frozenset((first, second))] = f"no interval at {plan.different_in}"
        elif one.low <= other.high and other.low <= one.high:
            alike[frozenset((first, second))] = "the intervals overlap"
    return alike


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_score, value))


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
        best = min(values.values()) if tiebreaker.lower_is_better else max(values.values())
        tied = [name for name in tied if values[name] == best]
        outcome = f"{tied[0]} leads" if len(tied) == 1 else f"still tied: {', '.join(tied)}"
        shown = {
            name: show_number(value, plan) if tiebreaker.path in table else show_measured(value)
            for name, value in values.items()
        }
        exact = {name: str(value) for name, value in values.items()}
        says = f"the {'lower' if tiebreaker.lower_is_better else 'higher'} {tiebreaker.path} leads"
        rules.append(Rule("tiebreaker", says, shown, outcome, exact))
    return (tied[0] if len(tied) == 1 else None), rules


def _tiebreak(
    tiebreaker: Tiebreaker, name: str, table: Mapping[str, Mapping[str, Decimal]], documents: Mapping[str, Mapping]
) -> Decimal:
    path = tiebreaker.path
    return table[path][name] if path in table else read_number(documents, name, path)


def _apply_vetoes(plan: Plan, order: Sequence[str], late: Late) -> tuple[set[str], list[Rule]]:
    """Who cannot be chosen, and one rule for each veto."""
    rules, stopped = [], set()
    for name, veto in plan.veto.items():
        breaking = [own for own in order if own in {*veto.names, *late.veto.get(name, ())}]
        given = {"break it": breaking or None, "documented alternative": veto.unless}
        if not breaking:
            outcome = "nobody breaks it"
        elif veto.unless:
            outcome = "; ".join(f"{own} breaks it and stays, by the documented alternative" for own in breaking)
        else:
            why = "breaks it without a documented alternative, and cannot be chosen"
            outcome = "; ".join(f"{own} {why}" for own in breaking)
            stopped.update(breaking)
        rules.append(Rule(f"veto: {name}", _say_veto(veto), given, outcome))
    return stopped, rules


def _say_veto(veto: Veto) -> str:
    return f"none may be chosen of whom it holds: {veto.criterion}; unless an alternative is documented in the plan"


def _tell_sub_scores(plan: Plan, table: Mapping[str, Mapping[str, Decimal]], documents: Mapping[str, Mapping]) -> Rule:
    given, exact = {}, {}
    for name, sub_score in plan.sub_scores.items():
        own = {"weight": format_number(sub_score.weight), "rule": _say_mapping(sub_score)}
        if sub_score.place:
            values = {who: read_number(documents, who, sub_score.place) for who in plan.candidates}
            own["values"] = {who: show_measured(value) for who, value in values.items()}
            exact[name] = {who: str(value) for who, value in values.items()}
        given[name] = own | {"scores": {who: show_number(score, plan) for who, score in table[name].items()}}
    says = f"every criterion gives 0 to 10, rounded to {_say_rounding(plan)}"
    outcome = f"{len(table)} sub-scores for each of {len(plan.candidates)} candidates"
    return Rule("sub-scores", says, given, outcome, exact)


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


def _tell_overlap(
    plan: Plan,
    intervals: Mapping[str, Found | None],
    alike: Mapping[frozenset[str], str],
) -> Rule:
    says = f"two candidates are different only if their intervals ({plan.different_in}) do not overlap"
    says += "; otherwise " + (
        "they are tied" if plan.when_not_different == "tie" else "it is said, and changes nothing"
    )
    shown = {name: own and _show_interval(own) for name, own in intervals.items()}
    exact = {name: [str(own.low), str(own.high)] if own else None for name, own in intervals.items()}
    pairs = []
    for pair in combinations(plan.candidates, 2):
        why = alike.get(frozenset(pair))
        pairs.append(f"{pair[0]} and {pair[1]} " + (f"are not different ({why})" if why else "are different"))
    return Rule("overlap", says, shown, "; ".join(pairs), exact)


def _show_interval(own: Found) -> str:
    shown = f"{show_measured(own.low)} to {show_measured(own.high)}"
    return f"{shown} (Wilson's, as the one that is asked for has no width)" if own.instead else shown


def _tell_outcome(winner: str | None, left: Sequence[str]) -> Rule:
    if winner:
        return Rule("outcome", "who leads and is not stopped by a veto is chosen", list(left), f"{winner} is chosen")
    why = "the tiebreakers do not tell the first ones apart" if left else "a veto stops every candidate"
    return Rule("outcome", "who leads and is not stopped by a veto is chosen", list(left), f"nobody is chosen: {why}")


def show_measured(value: Decimal | int) -> str:
    """A measured number as people read it: four digits after the point, none for a count."""
    number = Decimal(value)
    return f"{number:.{SHOWN}f}" if number != int(number) else str(int(number))


def show_number(value: Decimal, plan: Plan) -> str:
    """A rounded number with the digits of the quantum: 8.4 is written 8.40."""
    places = max(0, -int(plan.rounding.quantum.normalize().as_tuple().exponent))
    return f"{value:.{places}f}"
