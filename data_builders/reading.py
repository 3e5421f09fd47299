"""What a text states about an image, read back from its words.

This is the second half of the proof: it shares neither the phrase files nor the code that fills them, only the names of
the vocabulary; its own words are in `lexicon/<language>.yaml`. It looks for what it knows (findings, numbers, places,
negations, grades, kinds of image) and puts it together sentence by sentence. Every other word must be listed as
neutral: a word that it does not know may say anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from data_builders.dentition import PERMANENT, REGIONS
from data_builders.sources import Language, Vocabulary

WORD = re.compile(r"[^\s.,;:!?¿¡()'\"/-]+")
REST = "rest"  # "the other regions": all that the text does not name


@dataclass(frozen=True)
class Statement:
    """One thing that a text says; `labels` are the findings that its words may mean, none where it leaves that open."""

    labels: frozenset[str] = frozenset()
    count: int | None = None
    region: str | None = None
    side: str | None = None
    tooth: str | None = None
    negated: bool = False
    severity: str | None = None
    undetermined: str | None = None
    hedged: bool = False


@dataclass
class Reading:
    """All that a text says. `verdict` is the yes, no or maybe that it begins with, `guidance` what it marks as general
    guidance, `unknown` the words that nothing is known of.

    `modalities` holds, for each word for a kind of picture, the modalities it may mean; `words_of_place` whatever names
    a side or a region.
    """

    statements: list[Statement] = field(default_factory=list)
    verdict: Literal["yes", "no", "maybe"] | None = None
    modalities: list[frozenset[str]] = field(default_factory=list)
    words_of_place: list[str] = field(default_factory=list)
    only_third_molars: bool = False
    guidance: str | None = None
    unknown: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[frozenset[str]]:
        return [statement.labels for statement in self.statements if statement.labels]


def read_text(text: str, language: Language, vocabulary: Vocabulary, *, question: bool = False) -> Reading:
    """Read an answer, or with `question` a question, in which other words are neutral."""
    words = _lexicon(language, _Names(vocabulary, language))
    reading = Reading()
    text = unicodedata.normalize("NFKC", text).casefold()
    before, marker, after = text.partition(words.guidance)
    if marker:
        reading.guidance = after.strip()
    for number, sentence in enumerate(re.split(r"(?<=[.!?])\s+|\n", before)):
        tokens, unknown = words.find(
            " ".join(sentence.split()), neutral=words.in_questions if question else words.in_answers
        )
        reading.unknown += unknown
        if number == 0 and tokens and tokens[0][0] == "verdict" and not question:
            reading.verdict = tokens.pop(0)[1]
        _Sentence(reading).read(tokens)
    reading.statements = _expand_rest(reading.statements)
    return reading


Token = tuple[str, Any]


class _Sentence:
    """The state of reading one sentence; a place belongs to what stands before it, else to what follows."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.number: int | None = None
        self.is_article = False  # the number is but an article: it counts a finding, never by itself
        self.labels: frozenset[str] = frozenset()  # of the last finding, which a bare number counts
        self.hedged = self.negated = self.undetermined = False
        self.header: str | None = None
        self.header_used = False
        self.waiting: list[int] = []  # statements that have no place yet

    def read(self, tokens: Sequence[Token]) -> None:
        self.undetermined = any(kind == "undetermined" for kind, _ in tokens)
        for kind, value in tokens:
            if kind not in ("filler", "hedge", "finding", "type", "modality"):
                self._close_number()
            getattr(self, f"_{kind}")(value)
        self._close_number()
        if self.header and not self.header_used:
            self.reading.statements.append(Statement(region=self.header))

    def _say(self, *, labels: frozenset[str] = frozenset(), **more) -> None:
        placed = {"side", "undetermined", "severity"}.isdisjoint(more)
        region = self.header if placed else None
        self.header_used |= region is not None
        statement = Statement(labels, self.number, region, negated=self.negated, hedged=self.hedged, **more)
        if placed and region is None:
            self.waiting.append(len(self.reading.statements))
        self.reading.statements.append(statement)
        self.number, self.hedged = None, False

    def _close_number(self) -> None:
        """A number that no finding follows counts the last one again: `30 teeth: 15 in the maxilla and …`."""
        if self.number is not None and not self.is_article:
            self._say(labels=self.labels)
        self.number = None

    def _number(self, value: int) -> None:
        self.number, self.is_article = value, False

    def _article(self, value: object) -> None:
        self.number, self.is_article = 1, True

    def _filler(self, value: object) -> None:
        pass

    def _verdict(self, value: str) -> None:
        self.reading.unknown.append(value)  # it says something at the beginning of an answer only

    def _undetermined(self, value: object) -> None:
        pass  # looked up beforehand: it may stand after what it is about

    def _hedge(self, value: object) -> None:
        self.hedged = True

    def _negation(self, value: object) -> None:
        self.negated = True

    def _finding(self, value: frozenset[str]) -> None:
        self.labels = value
        self._say(labels=value)

    def _type(self, value: str) -> None:
        self._say(labels=frozenset(["tooth"]), tooth=value)

    def _teeth(self, value: tuple[str, ...]) -> None:
        for tooth in value:
            self._say(tooth=tooth)

    def _colon(self, value: object) -> None:
        self.waiting = []

    def _region(self, value: str) -> None:
        self.reading.words_of_place.append(value)
        if not self.waiting:
            self.header, self.header_used = value, False
        for number in self.waiting:
            self.reading.statements[number] = replace(self.reading.statements[number], region=value)
        self.waiting = []

    def _side(self, value: str) -> None:
        self.reading.words_of_place.append(value)
        self._say(side=value)

    def _severity(self, value: str) -> None:
        self._say(severity=value)

    def _aspect(self, value: str) -> None:
        if self.undetermined:
            self._say(undetermined=value)

    def _modality(self, value: str) -> None:
        self.reading.modalities.append(frozenset(value.split()))
        self.number = None  # "a radiograph" counts nothing

    def _third_molars(self, value: object) -> None:
        self.reading.only_third_molars = True


def _expand_rest(statements: list[Statement]) -> list[Statement]:
    """Put the regions that a text does not name in the place of "the other regions"."""
    named = {statement.region for statement in statements}
    free = [
        region for region in REGIONS if region not in named and f"bilateral_{region.rpartition('_')[2]}" not in named
    ]
    expanded: list[Statement] = []
    for statement in statements:
        regions = free if statement.region == REST else [statement.region]
        expanded += [replace(statement, region=region) for region in regions]
    return expanded


@dataclass(frozen=True)
class _Names:
    """A vocabulary and a language as a key of the cache: vocabularies are read once and live as long as a program."""

    vocabulary: Vocabulary
    language: Language

    def __hash__(self) -> int:
        return hash((id(self.vocabulary), self.language))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and (self.vocabulary is other.vocabulary and self.language == other.language)

    def spellings(self, articles: Iterable[str]) -> dict[str, frozenset[str]]:
        """Every name of every finding, and the labels that it may mean."""
        found: dict[str, set[str]] = {}
        for label, term in self.vocabulary.items():
            names = getattr(term, self.language)
            first, _, rest = names.condition.partition(" ")
            for name in (names.one, names.other, rest if first in articles else names.condition):
                found.setdefault(name.casefold(), set()).add(label)
        return {name: frozenset(labels) for name, labels in found.items()}


@dataclass(frozen=True)
class _Lexicon:
    """The words of a language: a pattern that finds them, the longest first, and what each means."""

    pattern: re.Pattern
    meanings: Mapping[str, Token]
    guidance: str
    in_answers: frozenset[str]
    in_questions: frozenset[str]

    def find(self, sentence: str, *, neutral: frozenset[str]) -> tuple[list[Token], list[str]]:
        """What a sentence says, in order, and the words of it that are neither known nor neutral."""
        tokens, unknown, end = [], [], 0
        for match in (*self.pattern.finditer(sentence), None):
            between = sentence[end : match.start() if match else None]
            unknown += [word for word in WORD.findall(between) if word not in neutral]
            if match:
                word = match["word"]
                if word in neutral and self.meanings[word][0] == "verdict":
                    pass  # "normal or abnormal?" in a question
                else:
                    tokens.append(self._meaning(match))
                end = match.end()
        return tokens, unknown

    def _meaning(self, match: re.Match) -> Token:
        if numbers := match["universal"]:
            return "teeth", tuple(_from_universal(int(number)) for number in re.findall(r"\d+", numbers))
        if numbers := match["teeth"]:
            return "teeth", tuple(re.findall(r"\d+", numbers))
        if word := match["word"]:
            return self.meanings[word]
        return ("number", int(match["digits"])) if match["digits"] else ("colon", None)


@lru_cache(maxsize=16)
def _lexicon(language: Language, names: _Names) -> _Lexicon:
    known = yaml.safe_load(files("data_builders").joinpath(f"lexicon/{language}.yaml").read_text("utf-8"))
    meanings: dict[str, Token] = {}
    for kind, entries in known["words"].items():
        if isinstance(entries, list):
            meanings |= dict.fromkeys(entries, (kind, None))
        else:
            meanings |= {word: (kind, value) for value, words in entries.items() for word in words}
    meanings |= {name: ("finding", labels) for name, labels in names.spellings(known["words"]["article"]).items()}
    literal = "|".join(re.escape(phrase) for phrase in sorted(meanings, key=len, reverse=True))
    numbers = rf"(?:\d+(?:, | {known['and']} )?)+"
    universal = known["universal"].format(numbers=f"(?P<universal>{numbers})")
    teeth = known["teeth"].format(numbers=f"(?P<teeth>{numbers})")
    pattern = re.compile(rf"(?<!\w)(?:{universal}|{teeth}|(?P<word>{literal})|(?P<digits>\d+))(?!\w)|:")
    neutral = known["neutral"]
    return _Lexicon(
        pattern,
        meanings,
        known["guidance"],
        frozenset(neutral["answers"].split()),
        frozenset(neutral["questions"].split()),
    )


def _from_universal(number: int) -> str:
    """The FDI number of a Universal one, which counts from 18 along the maxilla to 28, then from 38 back to 48."""
    upper = [f"1{p}" for p in range(8, 0, -1)] + [f"2{p}" for p in range(1, 9)]
    lower = [f"3{p}" for p in range(8, 0, -1)] + [f"4{p}" for p in range(1, 9)]
    return (upper + lower)[number - 1] if 1 <= number <= len(PERMANENT) else f"universal {number}"
