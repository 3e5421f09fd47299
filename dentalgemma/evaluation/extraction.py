"""Which option an answer in free text chooses. Frozen: a changed rule is a new protocol, never a new `seed`."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import NamedTuple

from dentalgemma.evaluation.strict import read_strict

FUZZY_RATIO = 0.4

_END_LETTER = re.compile(r"(?<![^\W_])([A-D])[\W_]*$")
_START_LETTER = re.compile(r"^[\W_]*([A-D])(?![^\W_])")


class Extraction(NamedTuple):
    """The letter an answer chooses and the rule that found it; `None` counts as wrong and is never dropped."""

    letter: str | None
    method: str


def extract(output: str, options: Mapping[str, str], protocol: str = "seed", *, key: str = "") -> Extraction:
    """Read the chosen letter from `output`; `options` maps letters to option texts.

    Protocol `seed` tries in this order: `end_letter`, `start_letter`, `option_text`, `fuzzy`, `failed`. It is faithful
    to the published benchmark, and literal: "It is not A" chooses A. `strict` takes what a careful reader would and
    abstains where that reader could not tell. `official` draws a letter when it finds none, by `key`, the item's id.

    Raises:
        ValueError: for a protocol that does not exist; never for an output.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} does not exist; there is {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol](output, options, key)


def _extract_seed(output: str, options: Mapping[str, str], key: str) -> Extraction:
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


def _extract_strict(output: str, options: Mapping[str, str], key: str) -> Extraction:
    return Extraction(*read_strict(output, options))


def _extract_official(output: str, options: Mapping[str, str], key: str) -> Extraction:
    """The letter as the benchmark's own script for closed questions infers it.

    What is certain, since it stands in that script (`eval_MMOral-OPG-Closed.py` of the repository OralGPT): one mark
    each is stripped from both ends; "(B)" is looked for, or else a capital between blanks or before "." or ",", or
    else an option's text, case and all; of several the first one counts, and what has no place as "B" between blanks,
    as "(B)" or as its option's text does not; without any a letter is drawn from all, empty options among them.

    What is our reading: the draw is seeded by `key`, where theirs changes with every run; an empty option has no text,
    where theirs is "nan" and found in "dominant". Scores that the benchmark's fork of VLMEvalKit made, which lets a
    language model match answers that no rule reads, cannot be repeated from a file.
    """
    if not options:
        return Extraction(None, "failed")
    text = output
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    found = [letter for letter in options if f"({letter})" in text]
    method = "bracketed_letter"
    if not found:
        found = [letter for letter in options if any(f" {letter}{after}" in text for after in " .,")]
        method = "lone_letter"
    if not found:
        found = [letter for letter, option in options.items() if option.strip() and option in text]
        method = "option_text"
    places = {letter: place for letter in found if (place := _find_official(text, letter, options[letter])) >= 0}
    if places:
        return Extraction(min(places, key=places.__getitem__), method)
    return Extraction(random.Random(f"official/{key}").choice(list(options)), "random_letter")


def _find_official(text: str, letter: str, option: str) -> int:
    looked_for = (f" {letter} ", f"({letter})", option if option.strip() else None)
    return next((place for mark in looked_for if mark is not None and (place := text.find(mark)) >= 0), -1)


PROTOCOLS: dict[str, Callable[[str, Mapping[str, str], str], Extraction]] = {
    "seed": _extract_seed,
    "strict": _extract_strict,
    "official": _extract_official,
}
PROTOCOL_LABELS = {"seed": "seed/1", "strict": "strict/1", "official": "official/1"}
# SHA-256 of what each protocol makes of the cases in tests/data; another hash is another protocol.
BEHAVIOUR = {
    "seed": "2f89873243012486031f49aa7c94a3fea8bb377ca2b77ad9c7c67c3ef633fc17",
    "strict": "12de893da04245772e3a386eec43425fb3ff062a3dfdaf5c0efa162784e3c5ed",
    "official": "2b154fb92bb862c52dd4c45e836d9c6e9aa0a65e70a00c33ebc7ae46cc782e30",
}
