"""Which option an answer in free text chooses. Frozen: a changed rule is a new protocol, never a new `seed`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import NamedTuple

FUZZY_RATIO = 0.4

_END_LETTER = re.compile(r"(?<![^\W_])([A-D])[\W_]*$")
_START_LETTER = re.compile(r"^[\W_]*([A-D])(?![^\W_])")


class Extraction(NamedTuple):
    """The letter an answer chooses and the rule that found it; `None` counts as wrong and is never dropped."""

    letter: str | None
    method: str


def extract(output: str, options: Mapping[str, str], protocol: str = "seed") -> Extraction:
    """Read the chosen letter from `output`; `options` maps letters to option texts.

    Protocol `seed` tries in this order: `end_letter`, `start_letter`, `option_text`, `fuzzy`, `failed`. It is faithful
    to the published benchmark, and literal: "It is not A" chooses A.

    Raises:
        ValueError: for a protocol that does not exist; never for an output.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} does not exist; there is {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](output, options)


def _extract_seed(output: str, options: Mapping[str, str]) -> Extraction:
    text = _normalize(output)
    for method, pattern in (("end_letter", _END_LETTER), ("start_letter", _START_LETTER)):
        match = pattern.search(text)
        if match and match[1] in options:
            return Extraction(match[1], method)
    text = text.casefold()
    # An empty option would be found in every text.
    texts = {letter: folded for letter, option in options.items() if (folded := _normalize(option).casefold())}
    if letter := _last_mentioned(text, texts):
        return Extraction(letter, "option_text")
    if letter := _most_similar(text, texts):
        return Extraction(letter, "fuzzy")
    return Extraction(None, "failed")


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


def _last_mentioned(text: str, texts: Mapping[str, str]) -> str | None:
    """The option mentioned last as whole words; one inside a longer mention ("caries" in "no caries") does not count.

    Of options with the same text the first one is taken.
    """
    text = " ".join(text.split())
    mentions = []
    for letter, option in texts.items():
        words = re.escape(" ".join(option.split()))
        for match in re.finditer(rf"(?<![^\W_]){words}(?![^\W_])", text):
            mentions.append((match.start(), match.end(), letter))
    letter, last, longest = None, -1, (-1, -1)
    # From left to right, longer ones first: a mention inside another one comes after it.
    for start, end, mentioned in sorted(mentions, key=lambda mention: (mention[0], -mention[1])):
        inside = end <= longest[1] and (start, end) != longest
        if not inside and start > last:
            letter, last = mentioned, start
        if end > longest[1]:
            longest = start, end
    return letter


def _most_similar(text: str, texts: Mapping[str, str]) -> str | None:
    """The option most similar to the whole text, from a ratio of 0.4; the first one on a tie."""
    best, best_ratio = None, 0.0
    for letter, option in texts.items():
        # The ratio depends on the order of the arguments, and autojunk would ignore frequent letters of long answers.
        matcher = SequenceMatcher(None, text, option, autojunk=False)
        if matcher.real_quick_ratio() < FUZZY_RATIO:  # an upper bound: saves hours on answers that run on
            continue
        ratio = matcher.ratio()
        if ratio >= FUZZY_RATIO and ratio > best_ratio:
            best, best_ratio = letter, ratio
    return best


PROTOCOLS: dict[str, Callable[[str, Mapping[str, str]], Extraction]] = {"seed": _extract_seed}
