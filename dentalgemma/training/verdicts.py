"""What an answer states, read back from its words and held against the claims of its row."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean
from typing import NamedTuple, get_args

from data_builders.claims import IMAGE, Claim, ClaimsDocument
from data_builders.dentition import JAWS
from data_builders.proof import agree, is_introduction
from data_builders.reading import Reading, Statement, read_text
from data_builders.sources import Language, Vocabulary

PLACES = ("side", "region", "tooth")
OPPOSITE = {"yes": "no", "no": "yes"}
LOWER_IS_BETTER = frozenset({"loss", "contradictions", "unread"})
Count = tuple[float, float]  # hits among cases


class Stated(NamedTuple):
    """A statement of an answer, and the findings that it may be about."""

    statement: Statement
    labels: frozenset[str]


@dataclass(frozen=True)
class Case:
    """A row to be asked: its question and answer, and what the answer states; `condition` is that of a clinical case.

    `claims` is `None` where a dataset has none, or in a language that nobody reads back.
    """

    row_id: str
    question: str
    reference: str
    language: str = "en"
    question_type: str = ""
    claims: ClaimsDocument | None = None
    condition: str | None = None


@dataclass(frozen=True)
class Judgement:
    """One answer, judged: hits and cases of every measure that its row has a case of, whatever was answered."""

    counts: Mapping[str, Count]
    contradictions: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def judge_answer(
    case: Case, answer: str, *, ended: bool, vocabulary: Vocabulary, conditions: Sequence[str] = ()
) -> Judgement:
    """Judge an answer; `conditions` are those that the cases of the dataset are about.

    Words that nobody knows are no error, as they are when a dataset is proven: they are counted as `unread`.
    """
    counts: dict[str, Count] = {
        "exact_match": (_plain(answer) == _plain(case.reference), 1),
        "word_overlap": (_word_overlap(answer, case.reference), 1),
        "ended": (ended, 1),
    }
    counts |= _count_condition(case, answer, conditions)
    if case.language not in get_args(Language):
        return Judgement(counts)
    said = read_text(answer, case.language, vocabulary)
    expected = read_text(case.reference, case.language, vocabulary).verdict
    if expected:
        counts["yes_no_accuracy"] = (said.verdict == expected, 1)
    claims = [claim for claim in case.claims.claims if claim.label != IMAGE] if case.claims else []
    if not claims:
        return Judgement(counts)
    asked = read_text(case.question, case.language, vocabulary, question=True)
    context = _subject(asked, case.claims)
    stated = _read_statements(said, context)
    counts |= _count_findings(stated, claims)
    for place in PLACES:
        counts |= _count_places(stated, claims, place, named=set(asked.words_of_place))
    counts |= _count_agreement(stated, claims, context)
    contradictions = tuple(dict.fromkeys(_find_contradictions(said, stated, claims, context, vocabulary)))
    counts["contradictions"] = (bool(contradictions), 1)
    counts["unread"] = (len(said.unknown), max(len(_words(answer)), len(said.unknown)))
    return Judgement(counts, contradictions, tuple(said.unknown))


def measure(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Hits among cases of each measure, and the means over findings of sensitivity, of specificity, and of both.

    A measure without a case is absent; one of what answers say (`statements_supported`) is 0 where they say nothing.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for judgement in judgements:
        for name, (hits, cases) in judgement.counts.items():
            totals[name][0] += hits
            totals[name][1] += cases
    measured = {name: hits / cases if cases else 0.0 for name, (hits, cases) in sorted(totals.items())}
    for kind in ("sensitivity", "specificity"):
        each = [value for name, value in measured.items() if name.startswith(f"{kind}_")]
        if each:
            measured[kind] = mean(each)
    if {"sensitivity", "specificity"} <= measured.keys():
        measured["balanced_accuracy"] = (measured["sensitivity"] + measured["specificity"]) / 2
    return measured


def _subject(asked: Reading, document: ClaimsDocument) -> frozenset[str]:
    """What an answer is about where it does not say so: what was asked, else what the turn before was about."""
    mentioned = frozenset(label for labels in asked.labels for label in labels)
    before = document.history[-1] if document.history else ()
    return mentioned or frozenset(claim.label for claim in before)


def _read_statements(said: Reading, context: frozenset[str]) -> list[Stated]:
    """What an answer states; a bare yes or no affirms or denies what was asked."""
    statements = [statement for statement in said.statements if not is_introduction(statement)]
    if said.verdict and context and not statements:
        statements = [Statement(negated=said.verdict == "no", hedged=said.verdict == "maybe")]
    tooth = frozenset(["tooth"])
    return [Stated(s, s.labels or context or (tooth if s.tooth else context)) for s in statements]


def _count_findings(stated: Sequence[Stated], claims: Sequence[Claim]) -> Iterator[tuple[str, Count]]:
    """Whether each finding that is there is said to be there, and whether one that is not there is not."""
    affirmed = {label for s, labels in stated if not s.negated and s.count != 0 for label in labels}
    for label in sorted({claim.label for claim in claims}):
        if any(claim.label == label and not claim.negated for claim in claims):
            yield f"sensitivity_{label}", (label in affirmed, 1)
        else:
            yield f"specificity_{label}", (label not in affirmed, 1)


def _count_places(
    stated: Sequence[Stated], claims: Sequence[Claim], kind: str, *, named: set[str]
) -> Iterator[tuple[str, Count]]:
    """The right places among all that were claimed or said, so that naming every place does not help.

    Places that the question names are no achievement, nor are those where a finding is denied. A tooth may be denied.
    """

    def counts(said: Statement | Claim) -> bool:
        place = getattr(said, kind)
        return place is not None and place not in named and (kind == "tooth" or not said.negated)

    def same(labels: frozenset[str], statement: Statement, claim: Claim) -> bool:
        about = not labels or claim.label in labels
        return about and getattr(statement, kind) == getattr(claim, kind) and statement.negated == claim.negated

    claimed = [claim for claim in claims if counts(claim)]
    said = {(labels, statement) for statement, labels in stated if counts(statement)}
    if claimed:
        right = sum(any(same(labels, statement, claim) for labels, statement in said) for claim in claimed)
        wrong = sum(not any(same(labels, statement, claim) for claim in claimed) for labels, statement in said)
        yield f"{kind}_accuracy", (right, len(claimed) + wrong)


def _count_agreement(
    stated: Sequence[Stated], claims: Sequence[Claim], context: frozenset[str]
) -> Iterator[tuple[str, Count]]:
    """How many statements some claim bears out, and how many claims some statement makes."""
    if claims:
        supported = sum(any(agree(statement, claim, context) for claim in claims) for statement, _ in stated)
        said = sum(any(agree(statement, claim, context) for statement, _ in stated) for claim in claims)
        yield "statements_supported", (supported, len(stated))
        yield "claims_stated", (said, len(claims))


def _find_contradictions(
    said: Reading, stated: Sequence[Stated], claims: Sequence[Claim], context: frozenset[str], vocabulary: Vocabulary
) -> Iterator[str]:
    """Where an answer says two things that cannot both be, or the contrary of what the claims say."""
    affirmed = [item for item in stated if not item.statement.negated and item.statement.count != 0]
    denied = [item for item in stated if item.statement.negated]
    if OPPOSITE.get(said.verdict or "") in said.unknown:
        yield "says yes and no"
    if said.verdict in ("yes", "maybe") and denied and not affirmed:
        yield f"says {said.verdict}, and only denies"
    diseases = {label for label, term in vocabulary.items() if term.kind == "pathology"} | context
    if said.verdict == "no" and any(labels and labels <= diseases for _, labels in affirmed):
        yield "says no, and affirms"
    for present in affirmed:
        for absent in denied:
            if present.labels & absent.labels and _covers(absent.statement, present.statement):
                yield f"affirms and denies {_name(present.labels & absent.labels)}"
    for one, other in combinations(affirmed, 2):
        counts = {one.statement.count, other.statement.count}
        uncounted = replace(one.statement, count=None), replace(other.statement, count=None)
        if len(counts) == 2 and None not in counts and one.labels == other.labels and uncounted[0] == uncounted[1]:
            yield f"counts {_name(one.labels)} twice"
    for statement, labels in stated:
        about = [claim for claim in claims if claim.label in labels]
        same = [claim for claim in about if claim.negated == statement.negated]
        if any(_covers(claim, statement) or _covers(statement, claim) for claim in same):
            continue  # where a word may mean two findings, one that is so is enough
        for claim in about:
            if statement.count != 0 and claim.negated and not statement.negated and _covers(claim, statement):
                yield f"affirms {claim.label}, which is not there"
            if statement.negated and not claim.negated and _covers(statement, claim):
                yield f"denies {claim.label}, which is there"


def _covers(denial: Statement | Claim, said: Statement | Claim) -> bool:
    """Whether what is denied leaves no room for what is said: denied everywhere, at the same place, or in its jaw."""
    region = denial.region is None or denial.region == said.region
    region = region or (denial.region in JAWS and (said.region or "").endswith(denial.region))
    return region and denial.side in (None, said.side) and denial.tooth in (None, said.tooth)


def _name(labels: Iterable[str]) -> str:
    return " or ".join(sorted(labels))


def _count_condition(case: Case, answer: str, conditions: Sequence[str]) -> Iterator[tuple[str, Count]]:
    """Whether the answer to a clinical case names its condition, and no other one of the dataset's."""
    known = sorted({*map(_plain, conditions)}, key=len, reverse=True)  # "dental caries" is found before "caries"
    if not case.condition or not known:
        return
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, known))})(?!\w)")
    wanted, expected, named = (
        _plain(case.condition),
        *(set(pattern.findall(_plain(t))) for t in (case.reference, answer)),
    )
    if wanted in expected:
        yield "condition_named", (wanted in named, 1)
    if {wanted} == expected:
        yield "condition_named_alone", ({wanted} == named, 1)


def _word_overlap(answer: str, reference: str) -> float:
    """The words that both have, as F1: of free text there is no closer measure that needs no judge."""
    own, theirs = Counter(_words(answer)), Counter(_words(reference))
    total = own.total() + theirs.total()
    return 2 * (own & theirs).total() / total if total else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _plain(text: str) -> str:
    """A text as it is compared: case, spacing and the underscores of class names do not count."""
    return " ".join(text.replace("_", " ").casefold().split())
