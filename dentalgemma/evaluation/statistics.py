"""Intervals and tests for right and wrong answers. Everything is seeded, and each function says what it assumes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

LEVEL = 0.95
CHUNK = 4_000_000  # resampled entries held in memory at a time


class Interval(NamedTuple):
    """A 95 % interval, as fractions."""

    low: float
    high: float


class PairedCounts(NamedTuple):
    """How often two models are right on the same items."""

    both: int
    only_a: int
    only_b: int
    neither: int


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test on the items that exactly one of two models gets right.

    Assumes that both models answered the same items and that items are independent; where one image has several
    questions they are not, and the p-value is too small. Without a discordant item it is 1.
    """
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_counts(correct_a: ArrayLike, correct_b: ArrayLike) -> PairedCounts:
    """Count the four outcomes of two models on the same items, given in the same order."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} answers cannot be paired")
    return PairedCounts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def bootstrap_interval(
    correct: ArrayLike, groups: ArrayLike | None = None, draws: int = 1_000, seed: int = 0
) -> Interval:
    """95 % percentile bootstrap interval of the mean of `correct`; with `groups` it resamples groups, not items.

    Without groups it assumes that items are independent. Questions about one image are not, so resampling them one by
    one gives an interval that is too narrow: pass the image of each item as `groups`. `correct` may hold differences of
    two models (-1, 0, 1), which gives the interval of the difference of their accuracies.
    """
    values = np.asarray(correct, dtype=float)
    if values.size == 0:
        raise ValueError("no answers: an interval needs at least one")
    sums, sizes = values, np.ones_like(values)
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != values.shape:
            raise ValueError(f"{values.size} answers and {labels.size} groups: each answer needs its group")
        _, index = np.unique(labels, return_inverse=True)
        sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, CHUNK // len(sums))
    for start in range(0, draws, rows):
        drawn = rng.integers(len(sums), size=(min(rows, draws - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(low), float(high))


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % Wilson score interval of a proportion; assumes independent items, and needs no resampling."""
    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Interval(float(interval.low), float(interval.high))
