"""The diagnosis that stands in a prompt: where a text names a condition, and how that is dropped or masked."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from data_builders.chat import Message

Span = tuple[int, int]
Treatment = Literal["drop", "mask", "keep"]

MASKS = {"en": "[condition]", "es": "[diagnóstico]"}
LEAST_LETTERS = 3  # "A" for a condition stands in every prompt and gives nothing away
SHORT = 3  # letters of an abbreviation that is a word in small letters: AS, ALL
LEAST_WORDS = 5  # of statements: what is left without them, such as "Give a plan.", describes no patient

PARENTHESIS = re.compile(r"\s*[(\[]([^()\[\]]*)[)\]]")
CODE = re.compile(r"[A-Z]\d{2}(?:\.\d{1,2})?")  # K02.9
CAPITALS = re.compile(r"(?=(?:[^A-Z]*[A-Z]){2})[A-Za-z0-9]{2,6}(?:[-./][A-Za-z0-9]{2,6})*")  # TMD, BDC-BDR
ROMAN = re.compile(r"[IVX]+")
WORD = re.compile(r"[^\W_]+")
HYPHEN = r"(?:[-‐-―]\s?)?"  # periimplantitis, peri-implantitis, also where a line breaks
START, END = r"(?<![^\W_])", r"(?![^\W_])"
# Endings of the singular and the plural, English and Spanish; what is not a word does no harm in a pattern.
ENDINGS = (("tooth", "teeth"), ("itis", "itides"), ("is", "es"), ("y", "ies"), ("z", "ces"), ("us", "i"), ("um", "a"))
ENDINGS += (("a", "ata"), ("", "es"), ("", "s"))

FIELD = re.compile(r"[\s>*_#-]*[^\W\d_][^:\n.?!]{0,40}:[*_]*(?=\s|$)")  # `PATIENT:`, `**Chief complaint:**`
SENTENCE = re.compile(r"(?<=[.!?])\s+")
OUTSIDE = r"(?![^()]*\))"  # a comma in a parenthesis ends nothing
CLAUSE = re.compile(
    rf"[,;](?=\s){OUTSIDE}|(?<=[.!?])\s+|[.!?]+$"
    rf"|\s(?:(?:presents|presented|presenting|diagnosed|presenta|acude)\s)?(?:with|con)\s{OUTSIDE}",
    re.IGNORECASE,
)


def find_names(text: str, condition: str, synonyms: Sequence[str] = ()) -> list[Span]:
    """Where `text` names the condition, whatever its case, number, accents, punctuation and hyphens; in order.

    The names of a condition are its own (several where a ` / ` stands between them), the abbreviation or code in its
    parenthesis (`temporomandibular disorder (TMD)`, `dental caries (K02.9)`), and `synonyms`. An abbreviation of two
    or three letters counts in capitals only.
    """
    folded, places = _fold(text)
    spans = []
    for pattern, as_it_stands in _patterns(condition, tuple(synonyms)):
        for match in pattern.finditer(text if as_it_stands else folded):
            start, end = match.span()
            spans.append((start, end) if as_it_stands else (places[start], places[end - 1] + 1))
    return sorted(spans, key=lambda span: (span[0], -span[1]))


@lru_cache(maxsize=10_000)
def _patterns(condition: str, synonyms: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], bool], ...]:
    """A pattern for each name of the condition, and whether it is for text as it stands or for folded text."""
    patterns = []
    for name in dict.fromkeys([*_names(condition), *synonyms]):
        if CODE.fullmatch(name):
            patterns.append((re.compile(f"{START}{re.escape(name)}{END}", re.IGNORECASE), True))
            continue
        if _is_abbreviation(name) and len(name) <= SHORT:
            patterns.append((re.compile(f"{START}{re.escape(name)}s?{END}"), True))
            continue
        words = WORD.findall(_fold(name)[0])
        if sum(map(str.isalpha, "".join(words))) >= LEAST_LETTERS:
            patterns.append((re.compile(START + r"[\W_]*".join(map(_any_number, words)) + END), False))
    return tuple(patterns)


def _names(condition: str) -> Iterator[str]:
    outside = PARENTHESIS.sub(" ", condition).strip()
    yield from re.split(r"\s+/\s+|;", outside or condition)
    for inside in PARENTHESIS.findall(condition):
        for part in map(str.strip, re.split(r"[,;/]", inside)):
            if _is_abbreviation(part) or _is_abbreviation(outside):
                yield part


def _is_abbreviation(name: str) -> bool:
    return bool(CODE.fullmatch(name) or CAPITALS.fullmatch(name)) and not ROMAN.fullmatch(name)


def _any_number(word: str) -> str:
    """A pattern for the singular and the plural of a word."""
    forms = {word}
    for one, other in ENDINGS if len(word) >= LEAST_LETTERS else ():
        if word.endswith(one):
            forms.add(word[: len(word) - len(one)] + other)
        if other and word.endswith(other):
            forms.add(word[: -len(other)] + one)
    return "(?:" + "|".join(HYPHEN.join(map(re.escape, form)) for form in sorted(forms, key=len, reverse=True)) + ")"


def _fold(text: str) -> tuple[str, Sequence[int]]:
    """The text in small letters without accents and invisible characters, and where each letter of it was."""
    if text.isascii():
        return text.lower(), range(len(text))
    parts = [_fold_letter(letter) for letter in text]
    return "".join(parts), [place for place, part in enumerate(parts) for _ in part]


@lru_cache(maxsize=10_000)
def _fold_letter(letter: str) -> str:
    """A character in small letters without accents; nothing for an accent alone and for what cannot be seen."""
    folded = unicodedata.normalize("NFKD", letter).casefold()
    return "".join(part for part in folded if unicodedata.category(part) not in ("Mn", "Cf"))


def repair_prompt(
    prompt: Sequence[Message],
    condition: str,
    *,
    treatment: Treatment,
    synonyms: Sequence[str] = (),
    condition_line: str | None = None,
    mask: str = MASKS["en"],
) -> tuple[Message, ...] | None:
    """The prompt without the name of its condition, or `None` where nothing to ask is left.

    `drop` takes out the clause of a field (`PATIENT: male, 45 years, with dental caries`), the sentence of running
    text, or the line `condition_line: …`; `mask` puts `mask` in the place of each name. Turns after an answer of the
    dialogue that names the condition are left as they are: it is no secret any more.
    """
    repaired: list[Message] = []
    changed = told = False
    for turn in prompt:
        content = turn["content"]
        if turn["role"] == "assistant":
            told = told or bool(find_names(content, condition, synonyms))
        elif not told:
            content = _repair(content, condition, synonyms, condition_line, mask if treatment == "mask" else None)
            changed = changed or content != turn["content"]
        repaired.append({"role": turn["role"], "content": content})
    if repaired[0]["role"] == "system" and not repaired[0]["content"]:
        del repaired[0]
    if gives_away(repaired, condition, synonyms, condition_line if treatment == "drop" else None):
        return None
    users = [turn["content"] for turn in repaired if turn["role"] == "user"]
    is_empty = changed and treatment == "drop" and not _describes("\n".join(users))
    return None if is_empty or not all(users) else tuple(repaired)


def gives_away(
    prompt: Iterable[Message], condition: str, synonyms: Sequence[str] = (), condition_line: str | None = None
) -> bool:
    """Whether a turn of the user or the system names the condition before an answer of the dialogue does."""
    for turn in prompt:
        found = find_names(turn["content"], condition, synonyms)
        if turn["role"] == "assistant" and found:
            return False
        if found or (turn["role"] == "user" and match_line(turn["content"], condition_line)):
            return True
    return False


def match_line(text: str, label: str | None) -> re.Match[str] | None:
    """The line `label: value` of a text; the value is group 1."""
    if label is None:
        return None
    return re.search(
        rf"^[ \t>*_#-]*{re.escape(label)}[*_]*[ \t]*:[*_]*[ \t]*(\S.*)$", text, re.MULTILINE | re.IGNORECASE
    )


def _repair(text: str, condition: str, synonyms: Sequence[str], condition_line: str | None, mask: str | None) -> str:
    if mask is not None:
        line = match_line(text, condition_line)
        return _mask(text, [*([line.span(1)] if line else []), *find_names(text, condition, synonyms)], mask)
    while True:  # every round makes it shorter; what stood apart may name it once it stands together
        line = match_line(text, condition_line)
        spans = [*([line.span()] if line else []), *find_names(text, condition, synonyms)]
        if not spans:
            return text
        text = _drop(text, spans)


def _mask(text: str, spans: Iterable[Span], mask: str) -> str:
    parts, done = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= done:
            parts += [text[done:start], mask]
            done = end
    return "".join([*parts, text[done:]])


def _drop(text: str, spans: Sequence[Span]) -> str:
    """The text without the smallest pieces that hold the spans: a parenthesis, a clause of a field, a sentence."""
    without = PARENTHESIS.sub(
        lambda match: "" if any(match.start() <= a and b <= match.end() for a, b in spans) else match[0], text
    )
    if without != text:
        return without
    lines, start = [], 0
    for line in text.splitlines(keepends=True):
        inside = [(max(a - start, 0), b - start) for a, b in spans if a < start + len(line) and b > start]
        kept = _drop_from_line(line.rstrip("\r\n"), inside) if inside else line.rstrip("\r\n")
        if kept is not None:
            lines.append(kept)
        start += len(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _drop_from_line(line: str, spans: Sequence[Span]) -> str | None:
    label = FIELD.match(line)
    start = label.end() if label else 0
    if any(one < start for one, _ in spans):
        return None
    cuts = [match.start() for match in (CLAUSE if label else SENTENCE).finditer(line, start)]
    edges = sorted({start, *cuts, len(line)})
    kept = [line[a:b] for a, b in pairwise(edges) if not any(one < b and other > a for one, other in spans)]
    value = "".join(kept).strip(" \t,;")
    if not WORD.search(value):
        return None
    return f"{line[:start]} {value}" if label else value


def _describes(text: str) -> bool:
    """Whether there are statements, not only questions, instructions and the labels of fields."""
    sentences = [sentence for line in text.splitlines() for sentence in SENTENCE.split(line.strip())]
    statements = [sentence for sentence in sentences if not sentence.endswith(("?", ":"))]
    return sum(len(WORD.findall(sentence)) for sentence in statements) >= LEAST_WORDS
