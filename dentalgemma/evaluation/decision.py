"""Apply a plan to scores: the outcome, and whether the plan is shown to be older than the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations
from pathlib import Path

from pydantic import ValidationError

from data_builders.dataset_folder import hash_file
from data_builders.records import InputError
from data_builders.sources import read_yaml
from dentalgemma.evaluation.decision_rules import Choice, Late, choose, show_number
from dentalgemma.evaluation.files import write_json, write_whole
from dentalgemma.evaluation.plan import (
    Candidate,
    Lock,
    Plan,
    PlanError,
    canonical,
    check_claims,
    check_grades,
    describe_errors,
    describe_plan,
    open_plan,
    read_json,
)
from dentalgemma.evaluation.statistics import holm, wilson_interval

FORMAT = "decision/1"
SLOW_CLOCK = timedelta(minutes=5)  # by so much the clock that dated the answers may be ahead of this one
# What scores must have in common to be compared, and what makes two of them the same model asked in the same way.
IN_COMMON = ("mode", "images", "extraction", "bootstrap", "questions_sha256", "labels_sha256")
OF_A_MODEL = ("model", "weights", "mode", "images", "protocol", "generation", "system_prompt", "image_fit", "dtype")
OF_A_JUDGE = ("model", "api", "requested")
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
    tests, deviations = _find_tests(lock.plan, documents, comparisons)
    reasons = why_not_registered(lock, documents, late) + deviations
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
    if plan.uses_labels and plan.labels_sha256 is None:
        reasons.append("figures by labels decide, and the plan does not say by which (labels_sha256)")
    for name, document in documents.items():
        if document.get("questions_sha256") != plan.questions_sha256:
            reasons.append(f"{name} was scored on other questions than the plan names")
        reasons += _check_labels(plan, name, document) + _check_settings(plan, name, document)
        reasons += _check_verdicts(plan, name, document) + _check_dates(name, document, lock.locked_at)
    reasons += _check_judges(plan, documents)
    for name, sub_score in plan.sub_scores.items():
        if sub_score.declared and sub_score.declared.grades is None:
            reasons.append(f"the grades of {name} were given after the lock")
    return reasons + [f"who breaks the criterion {name} was named after the lock" for name in late.veto]


def _check_settings(plan: Plan, name: str, document: Mapping) -> list[str]:
    reasons = []
    for key in ("mode", "images", "extraction"):
        own, planned = document.get(key), getattr(plan, key)
        if own != planned:
            reasons.append(f"{name} was scored with the {key} {own or 'unknown'}, not {planned or 'none'}")
    own, planned = document.get("bootstrap"), plan.bootstrap.model_dump()
    if own != planned:
        told = canonical(own) if own else "unknown"
        reasons.append(f"{name} was scored with the bootstrap {told}, not {canonical(planned)}")
    if document.get("predictions_sha256") is None:
        reasons.append(f"the scores of {name} do not say of which answers they are (predictions_sha256)")
    return reasons


def _check_labels(plan: Plan, name: str, document: Mapping) -> list[str]:
    """Categories, groups and so on are not part of `questions_sha256`; figures by them change with them."""
    own = document.get("labels_sha256")
    if own is None and plan.labels_sha256 and plan.uses_labels:
        return [f"figures by labels decide, and the scores of {name} do not say by which (labels_sha256)"]
    if own and plan.labels_sha256 and own != plan.labels_sha256:
        return [f"the questions that {name} was scored on have other labels than the plan names"]
    return []


def _check_verdicts(plan: Plan, name: str, document: Mapping) -> list[str]:
    if not plan.uses_judge:
        return []
    own = document.get("open") or {}
    judge = own.get("judge") or {}
    reasons = []
    if plan.judge_prompt_sha256 is None or judge.get("prompt_sha256") != plan.judge_prompt_sha256:
        reasons.append(
            f"the open answers of {name} were not judged with the prompt that the plan names (judge_prompt_sha256)"
        )
    if plan.judge_model is not None and judge.get("model") != plan.judge_model:
        reasons.append(f"the open answers of {name} were not judged by the model that the plan names (judge_model)")
    if own.get("complete") is not True:
        told = "say that not" if own.get("complete") is False else "do not say that"
        reasons.append(f"the scores of {name} {told} all of its open answers have a verdict")
    if document.get("verdicts_sha256") is None:
        reasons.append(f"the scores of {name} do not say of which verdicts they are (verdicts_sha256)")
    return reasons


def _check_judges(plan: Plan, documents: Mapping[str, Mapping]) -> list[str]:
    if not plan.uses_judge:
        return []
    judges = [(document.get("open") or {}).get("judge") or {} for document in documents.values()]
    return [
        f"the judge's {key} is not known to be the same for all candidates"
        for key in OF_A_JUDGE
        if len({canonical(judge.get(key)) for judge in judges}) > 1
        or (key != "requested" and not all(judge.get(key) for judge in judges))
    ]


def _check_dates(name: str, document: Mapping, locked_at: datetime | None) -> list[str]:
    answered = document.get("answered") or {}
    answers = sum((document.get(kind) or {}).get("n") or 0 for kind in ("closed", "open"))
    dated = answered.get("dated") or 0
    if not dated or dated != answers:
        return [f"of the {answers} answers of {name} {dated} are dated"]
    times = {}
    for which in ("first", "last"):
        try:
            times[which] = datetime.fromisoformat(str(answered.get(which)))
        except ValueError:
            return [f"the {which} answer of {name} has no time that can be read"]
        if times[which].tzinfo is None:
            return [f"the time of the {which} answer of {name} has no time zone"]
    first, last = times["first"], times["last"]
    if last < first:
        return [f"the last answer of {name} ({last.isoformat()}) is dated before its first ({first.isoformat()})"]
    if last > datetime.now(UTC) + SLOW_CLOCK:
        return [f"the last answer of {name} ({last.isoformat()}) is dated after this decision"]
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
        _check_candidate(plan, name, document, scores[name])
        documents[name] = document
    for key in IN_COMMON:
        values = {name: document.get(key) for name, document in documents.items()}
        if len(set(map(canonical, values.values()))) > 1:
            raise PlanError(f"the scores cannot be compared, their {key} differs: {_list(values)}")
    for first, second in combinations(documents, 2):
        _check_apart(first, documents[first], second, documents[second])
    return documents


def _check_candidate(plan: Plan, name: str, document: Mapping, path: Path) -> None:
    """Refuse scores that are another candidate's, or of another model than the plan says the candidate is."""
    own = document.get("name")
    if own != name and own in plan.candidates:
        raise PlanError(f"{path}: these are the scores of {own}, and were given as those of {name}")
    candidate = plan.candidates[name]
    for key in ("model", "weights") if isinstance(candidate, Candidate) else ():
        planned = getattr(candidate, key)
        if planned is not None and document.get(key) != planned:
            raise PlanError(f"{path}: the {key} of {name} is {planned} in the plan, and {document.get(key)} here")
    try:
        check_claims({key: document.get(key) for key in ("name", *OF_A_MODEL, *IN_COMMON)})
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from None


def _check_apart(first: str, one: Mapping, second: str, other: Mapping) -> None:
    """Refuse one model's answers for two candidates."""
    if one.get("predictions_sha256") is not None and one["predictions_sha256"] == other.get("predictions_sha256"):
        raise PlanError(f"{first} and {second} have the scores of the same answers (predictions_sha256)")
    same = all(canonical(one.get(key)) == canonical(other.get(key)) for key in OF_A_MODEL)
    if same and one.get("weights") is not None:
        raise PlanError(f"{first} and {second} have the same weights and were asked in the same way: one model twice")


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
    return {"file_name": Path(path).name, "sha256": hash_file(Path(path))} | {key: document.get(key) for key in keys}


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
                _check_pair(plan, path, pair, documents)
                found[names] = pair
    wanted = list(combinations(plan.candidates, 2))
    missing = [f"{first} and {second}" for first, second in wanted if frozenset((first, second)) not in found]
    if missing:
        what = "no paired test (exact McNemar, Holm over all pairs), which the plan names, was given for "
        return [], [what + ", ".join(missing)]
    pairs = [found[frozenset(pair)] for pair in wanted]
    adjusted = holm([float(pair[plan.tests.of]["mcnemar_p"]) for pair in pairs])
    return [_describe_test(plan, pair, p) for pair, p in zip(pairs, adjusted, strict=True)], []


def _check_pair(plan: Plan, path: Path, pair: Mapping, documents: Mapping[str, Mapping]) -> None:
    """Refuse a comparison of other answers, other verdicts or another reading than the scores are of."""
    hashes = {"predictions_sha256": "answers"}
    if plan.tests.of != "closed":
        hashes["verdicts_sha256"] = "verdicts"
    for side in "ab":
        name = pair[side]["name"]
        for key, what in hashes.items():
            if pair[side].get(key) != documents[name].get(key):
                raise PlanError(f"{path} compares other {what} of {name} than the scores are of; compare these again")
        if pair.get("extraction") != documents[name].get("extraction"):
            read = [own.get("extraction") or "none" for own in (pair, documents[name])]
            raise PlanError(f"{path} compares with the extraction {read[0]}, and the scores have {read[1]}")


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
        "why": "where strict counts otherwise, intervals are Wilson's, from its counts",
    }


def read_strictly(document: Mapping) -> dict:
    """A scores document with closed questions as counted under `strict`; what was not counted again is left out.

    Where strict counts as many right, all else stays as it is: nothing may seem to change but by the reading.

    Raises:
        EvaluationError: when the document has no such counts.
    """
    closed = document.get("closed") or {}
    counted = (closed.get("protocols") or {}).get("strict")
    if not counted:
        raise PlanError(f"the scores of {document.get('name')} have no counts under strict")
    own = {key: counted[key] for key in COUNTED_AGAIN if key in counted}
    if all(counted.get(key) == closed.get(key) for key in ("n", "correct")):
        return {**document, "closed": closed | {key: own[key] for key in own if key == "failed"}}
    own |= _resampled(counted["correct"], counted["n"])
    view = {**document, "closed": own, "clinical": None}
    combined = document.get("combined")
    if combined:
        correct = combined["correct"] - closed["correct"] + counted["correct"]
        share = Decimal(correct) / combined["n"]
        view["combined"] = {"n": combined["n"], "correct": correct, "accuracy": share}
        view["combined"] |= _resampled(correct, combined["n"])
    return view


def _resampled(correct: int, n: int) -> dict[str, list[Decimal]]:
    """Wilson's interval in place of those that need the answers themselves."""
    return dict.fromkeys(("wilson", "interval_by_image", "interval_by_question"), _wilson(correct, n))


def _wilson(correct: int, n: int) -> list[Decimal]:
    return [Decimal(str(end)) for end in wilson_interval(correct, n)]


def format_decision(decision: Mapping) -> str:
    """A decision for people, in Markdown."""
    plan = decision["plan"]
    lines = [f"# {_inert(decision['title'])}", "", f"**{_inert(decision['rules'][-1]['outcome'])}**", ""]
    if decision["pre_registered"]:
        lines.append(
            f"The decision is pre-registered: its plan was locked at {plan['locked_at']}, before the first answer of "
            "these files, and is unchanged. Whether the models were asked before, and answers thrown away, cannot be "
            "seen. The time is that of the owner's clock; others can trust it as far as the hash was published."
        )
    else:
        lines.append("Nothing shows that the rules are older than the answers:")
        lines += ["", *(f"- {_inert(reason)}" for reason in decision["reasons"])]
    lines += ["", f"SHA-256 of the plan: `{plan['plan_sha256'] or 'none'}`", ""]
    if decision["deviations"]:
        lines += ["Other than planned:", "", *(f"- {_inert(what)}" for what in decision["deviations"]), ""]
    lines += ["Measured numbers are rounded here; the rules used all their digits (`exact` in the JSON file).", ""]
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
