"""Cases whose prompts are nearly the same, found exactly, so that no split is crossed by one."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set

from data_builders.chat import Message
from data_builders.splits import Groups

NEAR_DUPLICATE = 0.7  # share of common word triples; another age, sex and one more word in a case of 40 words reach it
SHINGLE = 3  # words
WORD = re.compile(r"[^\W_]+")


def group_prompts(prompts: Sequence[Iterable[Message]], names: Sequence[str]) -> list[str]:
    """The group of each prompt, called by the smallest of its members' names.

    Prompts that are near duplicates, directly or over others, are one group. Answers are not compared: those on one
    condition are alike in any good dataset, and a question that was seen in training is what leaks.
    """
    same: dict[frozenset, int] = {}
    numbers = [same.setdefault(_shingles(prompt), len(same)) for prompt in prompts]
    groups = Groups()
    for first, second in find_near_duplicates(list(same), NEAR_DUPLICATE, known=groups):
        groups.join(first, second)
    smallest: dict[object, str] = {}
    for name, number in zip(names, numbers, strict=True):
        root = groups.find(number)
        smallest[root] = min(smallest.get(root, name), name)
    return [smallest[groups.find(number)] for number in numbers]


def _shingles(prompt: Iterable[Message]) -> frozenset[tuple[str, ...]]:
    """The word triples of a prompt; all numbers are one word, since another age does not make another case."""
    text = " ".join(turn["content"] for turn in prompt if turn["role"] != "system")
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    words = ["0" if word.isdecimal() else word for word in words]
    return frozenset(zip(*(words[start:] for start in range(SHINGLE)), strict=False)) or frozenset([tuple(words)])


def find_near_duplicates(sets: Sequence[Set], threshold: float, *, known: Groups) -> Iterator[tuple[int, int]]:
    """Yield the pairs of sets whose Jaccard similarity is `threshold` or more, except those that `known` has joined.

    Exact, unlike MinHash: sets that are alike must share one of their rarest members, so that only those which do are
    compared (prefix filtering: Bayardo, Ma and Srikant 2007; shorter prefixes for the index: Xiao et al. 2008).
    """
    frequency = Counter(member for members in sets for member in members)
    rank = {member: number for number, member in enumerate(sorted(frequency, key=lambda m: (frequency[m], m)))}
    ranked = [sorted(map(rank.__getitem__, members)) for members in sets]
    compared = list(map(frozenset, ranked))
    index: dict[int, list[int]] = defaultdict(list)
    for number in sorted(range(len(sets)), key=lambda number: len(sets[number])):
        members, size = ranked[number], len(ranked[number])
        least = threshold * size - 1e-9  # sharing fewer than this, or being smaller, rules a pair out
        candidates = {other for member in members[: size - math.ceil(least) + 1] for other in index[member]}
        for other in sorted(candidates):
            if len(ranked[other]) >= least and known.find(number) != known.find(other):
                common = len(compared[number] & compared[other])
                if common >= threshold * (size + len(ranked[other]) - common) - 1e-9:
                    yield number, other
        for member in members[: size - math.ceil(2 * threshold / (1 + threshold) * size - 1e-9) + 1]:
            index[member].append(number)
