"""Apply a plan to scores: the outcome, and whether the plan is shown to be older than the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import combinations
from pathlib import Path

from pydantic import ValidationError

from data_builders.records import InputError
from data_builders.sources import read_yaml
from dentalgemma.evaluation.decision_rules import Choice, Late, choose, show_number
from dentalgemma.evaluation.files import write_json, write_whole
from dentalgemma.evaluation.plan import (
    Lock,
    Plan,
    PlanError,
    check_grades,
    describe_errors,
    describe_plan,
    hash_file,
    open_plan,
    read_json,
)
from dentalgemma.evaluation.statistics import holm, wilson_interval

FORMAT = "decision/1"
COUNTED_AGAIN = ("n", "correct", "accuracy", "failed")  # what a scores document says of every extraction protocol


def decide(
    plan: Path,
    scores: Mapping[str, Path],
    *,
    out: Path,
    declared: Path | None = None,
    comparisons: Sequence[Path] = (),
) -> dict:
    """Apply a locked plan to a scores document for each candidate; write `out` (JSON) and the same as `.md` beside it.

    `declared` is a YAML of grades that the plan left open, and of names that break a criterion with a veto;
    `comparisons` are the paired tests that the plan asks for, as `dentalgemma compare` writes them.

    Raises:
        EvaluationError: when candidates and scores do not match, a number is missing, or scores cannot be compared.
    """
    lock, out = open_plan(plan), Path(out)
    documents = _read_scores(lock.plan, scores)
    late = _read_late(lock.plan, declared)
    choice = choose(lock.plan, documents, late)
    reasons = why_not_registered(lock, documents, late)
    tests, deviations = _find_tests(lock.plan, documents, comparisons)
    decision = {
        "format": FORMAT,
        "title": lock.plan.title,
        "plan": {
            "file_name": Path(plan).name,
            "plan_sha256": lock.plan_sha256,
            "locked_at": lock.locked_at.isoformat() if lock.locked_at else None,
            "content": describe_plan(lock.plan),
        },
        "pre_registered": not reasons,
        "reasons": reasons,
        "deviations": deviations + _name_late(late),
        "scores": {name: _describe_scores(scores[name], own) for name, own in documents.items()},
        "rules": [rule._asdict() for rule in choice.rules],
        "tests": tests,
        "composites": {name: show_number(value, lock.plan) for name, value in choice.composites.items()},
        "order": choice.order,
        "winner": choice.winner,
        "under_strict": _decide_under_strict(lock.plan, documents, late, choice),
    }
    write_json(out, decision)
    write_whole(out.with_suffix(".md"), format_decision(decision))
    return decision


def why_not_registered(lock: Lock, documents: Mapping[str, Mapping], late: Late) -> list[str]:
    """What stands against calling the decision pre-registered; nothing where the plan is shown to be the older."""
    plan = lock.plan
    reasons = [lock.changed] if lock.changed else []
    if plan.questions_sha256 is None:
        reasons.append("the plan does not say on which questions (questions_sha256)")
    for name, document in documents.items():
        if document.get("questions_sha256") != plan.questions_sha256:
            reasons.append(f"{name} was scored on other questions than the plan names")
        if document.get("extraction") != plan.extraction:
            own = document.get("extraction") or "unknown"
            reasons.append(f"{name} was scored with the extraction {own}, not {plan.extraction or 'none'}")
        reasons += _check_judge(plan, name, document) + _check_dates(name, document, lock.locked_at)
    for name, sub_score in plan.sub_scores.items():
        if sub_score.declared and sub_score.declared.grades is None:
            reasons.append(f"the grades of {name} were given after the lock")
    return reasons + [f"who breaks the criterion {name} was named after the lock" for name in late.veto]


def _check_judge(plan: Plan, name: str, document: Mapping) -> list[str]:
    judge = (document.get("open") or {}).get("judge") or {}
    if not plan.uses(("open", "combined")) or judge.get("prompt_sha256") == plan.judge_prompt_sha256 is not None:
        return []
    return [f"the open answers of {name} were not judged with the prompt that the plan names (judge_prompt_sha256)"]


def _check_dates(name: str, document: Mapping, locked_at: datetime | None) -> list[str]:
    answered = document.get("answered") or {}
    answers = sum((document.get(kind) or {}).get("n") or 0 for kind in ("closed", "open"))
    dated = answered.get("dated") or 0
    if not dated or dated != answers:
        return [f"of the {answers} answers of {name} {dated} are dated"]
    try:
        first = datetime.fromisoformat(str(answered.get("first")))
    except ValueError:
        return [f"the first answer of {name} has no time that can be read"]
    if first.tzinfo is None:
        return [f"the time of the first answer of {name} has no time zone"]
    if locked_at is not None and first <= locked_at:
        return [f"the first answer of {name} ({first.isoformat()}) is not after the lock ({locked_at.isoformat()})"]
    return []


def _name_late(late: Late) -> list[str]:
    names = [f"grades of {name} by {own.who}" for name, own in late.sub_scores.items()]
    return [f"given after the lock: {what}" for what in names + [f"who breaks {name}" for name in late.veto]]


def _read_scores(plan: Plan, scores: Mapping[str, Path]) -> dict[str, Mapping]:
    missing, extra = sorted(set(plan.candidates) - set(scores)), sorted(set(scores) - set(plan.candidates))
    if missing or extra:
        what = f"there are no scores of {missing[0]}" if missing else f"{extra[0]} is no candidate of the plan"
        raise PlanError(f"{what}; the plan decides between {', '.join(plan.candidates)}")
    documents = {}
    for name in plan.candidates:
        document = read_json(scores[name])
        if not isinstance(document, dict) or document.get("format") != "scores/1":
            raise PlanError(f"{scores[name]} is no scores document (scores/1): `dentalgemma score` writes one")
        documents[name] = document
    for key in ("mode", "images", "extraction", "questions_sha256"):
        values = {name: document.get(key) for name, document in documents.items()}
        if len(set(values.values())) > 1:
            raise PlanError(f"the scores cannot be compared, their {key} differs: {_list(values)}")
    return documents


def _list(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _read_late(plan: Plan, path: Path | None) -> Late:
    if path is None:
        return Late()
    try:
        late = Late.model_validate(read_yaml(path))
    except ValidationError as error:
        raise PlanError(f"{path}: {describe_errors(error)}") from None
    except InputError as error:
        raise PlanError(str(error)) from None
    for name, declared in late.sub_scores.items():
        own = plan.sub_scores.get(name)
        if own is None or own.declared is None or own.declared.grades is not None:
            raise PlanError(f"{path}: sub_scores.{name}: the plan leaves no grades of that name open")
        try:
            check_grades(declared.grades or {}, plan.candidates, f"sub_scores.{name}.grades")
        except ValueError as error:
            raise PlanError(f"{path}: {error}") from None
    for name, broken in late.veto.items():
        if name not in plan.veto or set(broken) - set(plan.candidates):
            raise PlanError(f"{path}: veto.{name}: the plan has no such veto, or no such candidate")
    return late


def _describe_scores(path: Path, document: Mapping) -> dict:
    keys = ("model", "weights", "mode", "images", "questions_sha256", "predictions_sha256", "extraction", "answered")
    return {"file_name": Path(path).name, "sha256": hash_file(path)} | {key: document.get(key) for key in keys}


def _find_tests(
    plan: Plan, documents: Mapping[str, Mapping], comparisons: Sequence[Path]
) -> tuple[list[dict], list[str]]:
    """The paired tests of every two candidates, corrected over exactly these, and which of them are missing."""
    found: dict[frozenset[str], Mapping] = {}
    asked = next(iter(documents.values())).get("questions_sha256")
    for path in comparisons:
        document = read_json(path)
        if not isinstance(document, dict) or document.get("format") not in {"comparison/1", "comparisons/1"}:
            raise PlanError(f"{path} is no comparison: `dentalgemma compare` writes one")
        for pair in document.get("pairs", [document]):
            names = frozenset(pair[side]["name"] for side in "ab")
            if pair.get("questions_sha256") != asked:
                raise PlanError(f"{path} compares answers to other questions than the scores are of")
            if names <= set(plan.candidates) and pair.get(plan.tests.of):
                found[names] = pair
    wanted = list(combinations(plan.candidates, 2))
    missing = [f"{first} and {second}" for first, second in wanted if frozenset((first, second)) not in found]
    if missing:
        what = "no paired test (exact McNemar, Holm over all pairs), which the plan names, was given for "
        return [], [what + ", ".join(missing)]
    pairs = [found[frozenset(pair)] for pair in wanted]
    adjusted = holm([float(pair[plan.tests.of]["mcnemar_p"]) for pair in pairs])
    return [_describe_test(plan, pair, p) for pair, p in zip(pairs, adjusted, strict=True)], []


def _describe_test(plan: Plan, pair: Mapping, p: float) -> dict:
    own = pair[plan.tests.of]
    return {
        "a": pair["a"]["name"],
        "b": pair["b"]["name"],
        "of": plan.tests.of,
        "only_a": own["only_a"],
        "only_b": own["only_b"],
        "mcnemar_p": f"{float(own['mcnemar_p']):.3g}",
        "holm_p": f"{p:.3g}",
        "significant": bool(Decimal(repr(p)) < plan.tests.alpha),
    }


def _decide_under_strict(plan: Plan, documents: Mapping[str, Mapping], late: Late, choice: Choice) -> dict:
    """Whether the second extraction protocol would change the outcome; the decision itself does not use it."""
    try:
        strict = choose(plan, {name: read_strictly(document) for name, document in documents.items()}, late)
    except PlanError as error:
        return {"winner": None, "composites": None, "changes": None, "why": f"not computed: {error}"}
    return {
        "winner": strict.winner,
        "composites": {name: show_number(value, plan) for name, value in strict.composites.items()},
        "changes": strict.winner != choice.winner,
        "why": "intervals of closed questions are Wilson's, from the counts under strict",
    }


def read_strictly(document: Mapping) -> dict:
    """A scores document with closed questions as counted under `strict`; what was not counted again is left out.

    Raises:
        EvaluationError: when the document has no such counts.
    """
    closed = document.get("closed") or {}
    counted = (closed.get("protocols") or {}).get("strict")
    if not counted:
        raise PlanError(f"the scores of {document.get('name')} have no counts under strict")
    interval = _wilson(counted["correct"], counted["n"])
    own = {key: counted[key] for key in COUNTED_AGAIN if key in counted}
    own |= dict.fromkeys(("wilson", "interval_by_image", "interval_by_question"), interval)
    view = {**document, "closed": own, "clinical": None}
    combined = document.get("combined")
    if combined:
        correct = combined["correct"] - closed["correct"] + counted["correct"]
        share = Decimal(correct) / combined["n"]
        interval = _wilson(correct, combined["n"])
        view["combined"] = {"n": combined["n"], "correct": correct, "accuracy": share, "wilson": interval}
    return view


def _wilson(correct: int, n: int) -> list[Decimal]:
    return [Decimal(str(end)) for end in wilson_interval(correct, n)]


def format_decision(decision: Mapping) -> str:
    """A decision for people, in Markdown."""
    plan = decision["plan"]
    lines = [f"# {_inert(decision['title'])}", "", f"**{_inert(decision['rules'][-1]['outcome'])}**", ""]
    if decision["pre_registered"]:
        lines.append(
            f"The decision is pre-registered: its plan was locked at {plan['locked_at']}, before the first answer, and "
            "is unchanged. The time is that of the owner's clock; others can trust it as far as the hash was published."
        )
    else:
        lines.append("Nothing shows that the rules are older than the answers:")
        lines += ["", *(f"- {_inert(reason)}" for reason in decision["reasons"])]
    lines += ["", f"SHA-256 of the plan: `{plan['plan_sha256'] or 'none'}`", ""]
    if decision["deviations"]:
        lines += ["Other than planned:", "", *(f"- {_inert(what)}" for what in decision["deviations"]), ""]
    for number, rule in enumerate(decision["rules"], start=1):
        lines += [f"## {number}. {_inert(rule['rule'])}", "", f"Rule: {_inert(rule['says'])}.", ""]
        lines += [*_list_input(rule["input"]), "", f"Outcome: **{_inert(rule['outcome'])}**", ""]
    lines += _format_tests(decision["tests"]) + _format_strict(decision["under_strict"])
    considered = plan["content"].get("considered") or {}
    if considered:
        chosen = len(plan["content"]["candidates"])
        lines += ["## Left out", "", f"{chosen} of {chosen + len(considered)} candidates were compared.", ""]
        lines += [f"- {_inert(name)}: {_inert(why)}" for name, why in considered.items()] + [""]
    return "\n".join(lines)


def _list_input(value: object, indent: str = "") -> list[str]:
    """Nested keys and values as a nested list."""
    if not isinstance(value, Mapping):
        return [f"{indent}- {_inert(value)}"]
    lines = []
    for key, own in value.items():
        if isinstance(own, Mapping):
            lines += [f"{indent}- {_inert(key)}:", *_list_input(own, indent + "  ")]
        else:
            lines.append(f"{indent}- {_inert(key)}: {_inert(own)}")
    return lines


def _format_tests(tests: Sequence[Mapping]) -> list[str]:
    if not tests:
        return []
    lines = ["## Paired tests", "", "| a | b | only a right | only b right | exact McNemar p | with Holm |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for own in tests:
        cells = (own["a"], own["b"], own["only_a"], own["only_b"], own["mcnemar_p"], own["holm_p"])
        lines.append("| " + " | ".join(_inert(cell) for cell in cells) + " |")
    return [*lines, ""]


def _format_strict(strict: Mapping) -> list[str]:
    lines = ["## Under the extraction protocol strict", ""]
    if strict["changes"] is None:
        return [*lines, f"{_inert(strict['why'])}.", ""]
    composites = ", ".join(f"{name} {value}" for name, value in strict["composites"].items())
    words = "The decision would change" if strict["changes"] else "The decision would not change"
    outcome = f"{words}: {strict['winner'] or 'nobody'} would be chosen ({composites}). {strict['why']}."
    return [*lines, _inert(outcome), ""]


def _inert(value: object) -> str:
    """Text that Markdown shows as it is: on one line, without HTML, links or table cells of its own."""
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
