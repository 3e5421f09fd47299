"""The plan of a decision between models: written and locked before the answers are there. All numbers are decimals.

A lock proves to its owner that nothing changed since. Its time is the owner's own clock: for others it proves nothing,
until the hash was published where others can see when (a commit, a Hub repository, an e-mail).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation, localcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_builders.records import InputError
from data_builders.sources import read_yaml
from dentalgemma.evaluation.files import read_text, write_whole
from dentalgemma.evaluation.places import INTERVAL, SECTIONS, check_place
from dentalgemma.evaluation.questions import EvaluationError, labels_sha256, load_questions, questions_sha256

FORMAT = "plan/1"
HIGHEST = Decimal(10)  # every sub-score lies between 0 and this
EXPONENTS = 12  # a plan's numbers have at most so many digits before the point, and after it
DIGITS = 50  # of intermediate results, whatever context the caller has set: sums are exact


class PlanError(EvaluationError):
    """A plan that cannot be written, or a lock that cannot be trusted; the message names the key."""


def to_decimal(value: object) -> Decimal:
    """The number as it was written: 0.4 in a YAML file is 0.4, not the float next to it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        raise ValueError(f"expected a number, got {value!r}")
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"expected a number, got {value!r}") from None
    if not number.is_finite():
        raise ValueError(f"expected a finite number, got {value!r}")
    # Numbers beyond these could be locked, and then neither be added exactly nor be written out.
    if number.as_tuple().exponent < -EXPONENTS or number.adjusted() >= EXPONENTS:
        raise ValueError(f"expected at most {EXPONENTS} digits before the point and after it, got {str(value)[:40]}")
    return number


def _to_score(value: object) -> Decimal:
    number = to_decimal(value)
    if not 0 <= number <= HIGHEST:
        raise ValueError(f"{value}: a score lies between 0 and {HIGHEST}")
    return number


Number = Annotated[Decimal, BeforeValidator(to_decimal)]
Score = Annotated[Decimal, BeforeValidator(_to_score)]
PathInScores = Annotated[str, BeforeValidator(check_place)]
IntervalInScores = Annotated[str, BeforeValidator(lambda value: check_place(value, INTERVAL))]
# YAML takes a bare `true` for a truth value.
Images = Annotated[
    Literal["true", "blank", "other", "none"], BeforeValidator(lambda value: "true" if value is True else value)
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Words = Annotated[str, Field(min_length=1, pattern=r"\S")]


class _Strict(BaseModel):
    # A key that nothing looks at is refused: who wrote it would believe that it was obeyed.
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Linear(_Strict):
    """A straight line from two values to two scores; values beyond them get the score of the nearer one."""

    values: tuple[Number, Number] = Field(alias="from")
    scores: tuple[Score, Score] = Field(alias="to")

    @model_validator(mode="after")
    def _is_a_line(self) -> Linear:
        if self.values[0] == self.values[1]:
            raise ValueError(f"from: {self.values[0]} twice gives no line")
        return self


class Declared(_Strict):
    """Grades by a person; without `grades` they are given after the lock, in a file of their own."""

    who: Words
    rationale: Words
    grades: dict[str, Score] | None = None


class SubScore(_Strict):
    """One criterion: a number of the scores document mapped to 0-10, or declared by a person.

    `steps` are pairs of threshold and score, the highest threshold first: a value gets the score of the first one that
    it reaches, and 0 below the last.
    """

    weight: Annotated[Number, Field(ge=0, le=1)]
    place: PathInScores | None = Field(default=None, alias="from")
    linear: Linear | None = None
    steps: Annotated[tuple[tuple[Number, Score], ...], Field(min_length=1)] | None = None
    declared: Declared | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> SubScore:
        if (self.place is None) == (self.declared is None):
            raise ValueError("give either `from` (a place in the scores document) or `declared` (grades by a person)")
        if (self.place is not None) != ((self.linear is None) != (self.steps is None)):
            raise ValueError("`from` needs one of `linear` and `steps`, `declared` needs neither")
        thresholds = [threshold for threshold, _ in self.steps or ()]
        if any(first <= second for first, second in pairwise(thresholds)):
            raise ValueError("steps: the thresholds must descend")
        return self


class Candidate(_Strict):
    """A note on a candidate, and what its scores must be of: the model's name, the fingerprint of its weights."""

    note: Words | None = None
    model: Words | None = None
    weights: Words | None = None


class Tiebreaker(_Strict):
    """A sub-score or a place in a scores document; the higher number leads, unless the lower one is better."""

    path: Words
    lower_is_better: bool = False


class Bootstrap(_Strict):
    """How intervals are resampled: another seed is another interval, and must not be looked for afterwards."""

    draws: Annotated[int, Field(ge=1)] = 1_000
    seed: int = 0


class Tests(_Strict):
    """The paired tests that go with the decision; without them it is a deviation, and not shown to be planned."""

    paired: Literal["mcnemar_exact"] = "mcnemar_exact"
    correction: Literal["holm"] = "holm"
    of: Literal["closed", "open", "combined"] = "closed"
    alpha: Annotated[Number, Field(gt=0, lt=1)] = Decimal("0.05")


class Veto(_Strict):
    """What no winner may break, who is known to break it, and the documented way out: without one they may not win."""

    criterion: Words
    names: tuple[str, ...] = ()
    unless: Words | None = None


class Rounding(_Strict):
    """Sub-scores and composites are rounded once each, and all that follows takes the rounded ones."""

    quantum: Annotated[Number, Field(gt=0, le=1)] = Decimal("0.01")
    mode: Literal["ROUND_HALF_EVEN", "ROUND_HALF_UP"] = "ROUND_HALF_EVEN"


class Plan(_Strict):
    """All that decides between the candidates; `considered` names who was left out, and why."""

    title: Words
    candidates: Annotated[dict[str, str | Candidate | None], Field(min_length=2)]
    considered: dict[str, Words] = Field(default_factory=dict)
    questions_sha256: Sha256 | None = None
    labels_sha256: Sha256 | None = None
    mode: Literal["generate", "loglikelihood"] = "generate"
    images: Images = "true"
    extraction: Literal["seed/1"] | None = "seed/1"
    judge_prompt_sha256: Sha256 | None = None
    judge_model: Words | None = None
    bootstrap: Bootstrap = Bootstrap()
    sub_scores: Annotated[dict[str, SubScore], Field(min_length=1)]
    tests: Tests = Tests()
    different_when: Literal["intervals_do_not_overlap"] = "intervals_do_not_overlap"
    different_in: IntervalInScores = "closed.interval_by_image"
    when_not_different: Literal["report", "tie"] = "report"
    tie_below: Annotated[Number, Field(ge=0)] = Decimal("0.05")
    tiebreakers: Annotated[tuple[Tiebreaker, ...], Field(min_length=1)]
    veto: dict[str, Veto] = Field(default_factory=dict)
    rounding: Rounding = Rounding()

    @field_validator("candidates", mode="before")
    @classmethod
    def _with_notes(cls, candidates: object) -> object:
        if not isinstance(candidates, list):
            return candidates
        if len(set(map(str, candidates))) < len(candidates):
            raise ValueError("a candidate comes twice")
        return dict.fromkeys(candidates)

    @field_validator("tiebreakers", mode="before")
    @classmethod
    def _with_directions(cls, tiebreakers: object) -> object:
        if not isinstance(tiebreakers, (list, tuple)):
            return tiebreakers
        return [{"path": own} if isinstance(own, str) else own for own in tiebreakers]

    @model_validator(mode="before")
    @classmethod
    def _claims_nothing(cls, document: object) -> object:
        check_claims(document)
        return document

    @model_validator(mode="after")
    def _fits_together(self) -> Plan:
        with localcontext(prec=DIGITS):
            total = sum(sub_score.weight for sub_score in self.sub_scores.values())
        if total != 1:
            raise ValueError(f"sub_scores: the weights sum to {total}, they must sum to exactly 1")
        for name, sub_score in self.sub_scores.items():
            grades = sub_score.declared.grades if sub_score.declared else None
            if grades is not None:
                check_grades(grades, self.candidates, f"sub_scores.{name}.declared.grades")
        if both := sorted(set(self.candidates) & set(self.considered)):
            raise ValueError(f"considered: {both[0]} is a candidate and cannot have been left out")
        for name, veto in self.veto.items():
            if unknown := sorted(set(veto.names) - set(self.candidates)):
                raise ValueError(f"veto.{name}.names: {unknown[0]} is no candidate")
        if self.mode == "loglikelihood" and self.extraction is not None:
            raise ValueError(
                "extraction: where options are scored no letter is read from text; write `extraction: null`"
            )
        for number, own in enumerate(self.tiebreakers):
            self._check_tiebreaker(own, f"tiebreakers.{number}")
        return self

    def _check_tiebreaker(self, tiebreaker: Tiebreaker, where: str) -> None:
        name = tiebreaker.path
        if name in self.sub_scores:
            if tiebreaker.lower_is_better:
                raise ValueError(f"{where}: {name} is a sub-score, and of these the higher one is better")
            return
        if name.split(".")[0] not in SECTIONS:
            raise ValueError(f"{where}: {name!r} is neither a sub-score nor a place in a scores document")
        try:
            check_place(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def places(self) -> list[str]:
        """All of a scores document that anything is decided by."""
        places = [self.different_in, *(own.place for own in self.sub_scores.values() if own.place)]
        return places + [own.path for own in self.tiebreakers if own.path not in self.sub_scores]

    @property
    def uses_judge(self) -> bool:
        """Whether anything is decided, or tested, by open answers."""
        return any(place.split(".")[0] in {"open", "combined"} for place in [*self.places, self.tests.of])

    @property
    def uses_labels(self) -> bool:
        """Whether anything is decided by what questions are about, rather than by what is asked and right."""
        return any(place.startswith("clinical.") or ".per_" in place for place in self.places)


class Lock(NamedTuple):
    """A plan as read: `changed` says what does not fit its hash; `plan_sha256` is None where it was never locked."""

    plan: Plan
    plan_sha256: str | None
    locked_at: datetime | None
    changed: str | None


def check_grades(grades: Mapping[str, Decimal], candidates: Mapping[str, object], where: str) -> None:
    """Refuse grades that leave a candidate out or name somebody else.

    Raises:
        ValueError: naming the candidate.
    """
    missing, foreign = sorted(set(candidates) - set(grades)), sorted(set(grades) - set(candidates))
    if missing or foreign:
        raise ValueError(f"{where}: " + (f"{missing[0]} has no grade" if missing else f"{foreign[0]} is no candidate"))


def check_claims(document: object) -> None:
    """Refuse texts that call the decision pre-registered: whether it is comes out, and the decision says it.

    Raises:
        ValueError: quoting the words.
    """
    for text in _texts(document):
        if claim := re.search(r"pre ?r?regist\w*", _plain(text), re.IGNORECASE):
            raise ValueError(f"{claim[0]!r}: whether it is so is found out by `decide`, and not claimed; leave it out")


def _texts(value: object) -> Iterator[str]:
    """All texts in a document, keys included."""
    if isinstance(value, Mapping):
        for key, own in value.items():
            yield str(key)
            yield from _texts(own)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from _texts(own)
    elif isinstance(value, str):
        yield value


def _plain(text: str) -> str:
    """A text as it looks: without invisible characters; every run of dashes, underscores and blanks is one blank."""
    shown = [char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf"]
    apart = [
        " " if char in "_\u2212" or unicodedata.category(char) in {"Pd", "Cc", "Zs", "Zl", "Zp"} else char
        for char in shown
    ]
    return " ".join("".join(apart).split())


def load_plan(path: Path) -> Plan:
    """Read a plan's YAML; `questions: FILE`, beside the YAML, stands for both SHA-256 of those questions.

    `questions_sha256` is of what is asked and right, `labels_sha256` of all that figures are broken down by.

    Raises:
        PlanError: naming the file and every key that is wrong.
    """
    path = Path(path)
    try:
        document = read_yaml(path)
    except InputError as error:
        raise PlanError(str(error)) from None
    questions = document.pop("questions", None)
    if questions is not None:
        for key in ("questions_sha256", "labels_sha256"):
            if document.get(key) is not None:
                raise PlanError(f"{path}: questions and {key} say the same; give one of them")
        items = load_questions(path.parent / str(questions))
        document |= {"questions_sha256": questions_sha256(items), "labels_sha256": labels_sha256(items)}
    return _validate(document, path)


def _validate(document: object, path: Path) -> Plan:
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise PlanError(f"{path}: {describe_errors(error)}") from None


def describe_errors(error: ValidationError) -> str:
    """What is wrong, key by key; a misspelt key alone, since what it should have set is noise."""
    errors = error.errors()
    errors = [item for item in errors if item["type"] == "extra_forbidden"] or errors
    lines = []
    for item in errors:
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{key}: {message}" if key else message)
    return "; ".join(lines)


def write_plan(plan: Path, out: Path) -> dict:
    """Lock a plan: write it as JSON with sorted keys, numbers as strings, the time, and the SHA-256 over all of it.

    The hash is that of the compact form (`canonical`) of `format`, `locked_at` and `plan`.

    Raises:
        PlanError: when the plan is wrong, or `out` is there: a lock is never written over.
    """
    out = Path(out)
    content = describe_plan(load_plan(plan))
    if out.exists():
        raise PlanError(
            f"{out} is there, and a lock is not written over: keep it, and lock the new plan in another file"
        )
    signed = {"format": FORMAT, "locked_at": datetime.now(UTC).isoformat(timespec="microseconds"), "plan": content}
    parts = {key: hash_canonical(value) for key, value in content.items()}
    document = signed | {"plan_sha256": hash_canonical(signed), "key_sha256": parts}
    write_whole(out, json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return document


def open_plan(path: Path) -> Lock:
    """Read a lock, even one that was changed since, or a plan's YAML that was never locked.

    Raises:
        PlanError: when there is no plan to be read.
    """
    path = Path(path)
    if path.suffix.lower() in {".yaml", ".yml"}:
        return Lock(load_plan(path), None, None, "the plan was never locked")
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"{path} is no lock of the format {FORMAT}: `dentalgemma plan` writes one")
    plan = _validate(document.get("plan"), path)
    try:
        locked_at = datetime.fromisoformat(str(document.get("locked_at"))).astimezone(UTC)
    except (ValueError, OverflowError):
        raise PlanError(f"{path}: locked_at: {document.get('locked_at')!r} is no time") from None
    return Lock(plan, str(document.get("plan_sha256")), locked_at, _find_change(document))


def _find_change(document: Mapping) -> str | None:
    signed = {key: document.get(key) for key in ("format", "locked_at", "plan")}
    if hash_canonical(signed) == document.get("plan_sha256"):
        return None
    parts, content = document.get("key_sha256") or {}, document["plan"]
    keys = sorted(key for key in {*parts, *content} if parts.get(key) != hash_canonical(content.get(key)))
    what = f"the plan's {', '.join(keys)}" if keys else "locked_at, or the hash itself,"
    return f"{what} changed after it was locked; its hash does not match"


def describe_plan(plan: Plan) -> dict:
    """A plan as JSON takes it: the keys of the YAML with every default, and numbers as strings."""
    # Without the extraction the default one would be read back.
    return _as_text(plan.model_dump(by_alias=True, exclude_none=True)) | {"extraction": plan.extraction}


def _as_text(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _as_text(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_text(own) for own in value]
    return format_number(value) if isinstance(value, Decimal) else value


def format_number(number: Decimal) -> str:
    """Digits without exponent or trailing zeros: one text for one number."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def canonical(value: object) -> str:
    """The one form of a JSON value that is hashed: sorted keys, no blanks, UTF-8; floats do not occur."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def hash_canonical(value: object) -> str:
    """The SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def read_json(path: Path) -> object:
    """Read JSON with every number as a decimal, digit by digit as it is written.

    Raises:
        PlanError: when it cannot be read.
    """
    try:
        return json.loads(read_text(Path(path)), parse_float=Decimal)
    except (ValueError, RecursionError) as error:  # the latter: brackets in brackets without end
        raise PlanError(f"{path}: not valid JSON: {error}") from None
