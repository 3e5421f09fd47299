"""Intervals and tests for right and wrong answers. Everything is seeded, and each function says what it assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, binomtest

LEVEL = 0.95
CHUNK = 4_000_000  # resampled entries held in memory at a time


class Interval(NamedTuple):
    """A 95 % interval, as fractions."""

    low: float
    high: float


class Detectable(NamedTuple):
    """The smallest change that can be significant: in items, and as a fraction of all items."""

    items: int
    points: float


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: each may be held against alpha as if it were the only test.

    Controls the chance of any false alarm among the tests, whatever their dependence.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def minimum_detectable_effect(n: int, alpha: float = 0.05) -> Detectable | None:
    """The fewest items that one model must gain without losing any to reach exact McNemar p < alpha; `None` below it.

    It is the best case: every item lost on the way takes more gains to make up for.
    """
    items = 1
    while mcnemar_exact(0, items) >= alpha:
        items += 1
    return Detectable(items, items / n) if items <= n else None


def mcnemar_power(n: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """How often exact McNemar p < alpha comes out of `n` items, where shares `only_a` and `only_b` are discordant."""
    discordant = np.arange(n + 1)
    chances = binom.pmf(discordant, n, only_a + only_b)
    # The largest count of the rarer side that is still significant; -1 where none is.
    critical = binom.ppf(alpha / 2, discordant, 0.5)
    critical = np.where(2 * binom.cdf(critical, discordant, 0.5) < alpha, critical, critical - 1)
    share = only_b / (only_a + only_b)
    rejected = binom.cdf(critical, discordant, share) + binom.cdf(critical, discordant, 1 - share)
    return float((chances * rejected).sum())


def detectable_difference(n: int, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest true difference of two accuracies that `n` items show with this power, in steps of one item.

    `discordance` is the share of items that exactly one of the two gets right; it must be foreseen, for example from
    models compared before. `None` where even a difference as large as the discordance would not be shown.
    """
    # In items; power grows with the difference. Rounded first: (8 / 49) * 49 is a little less than 8 in floats.
    low, high = 0, int(round(discordance * n, 6))

    def enough(items: int) -> bool:
        lost = max(0.0, (discordance - items / n) / 2)
        return mcnemar_power(n, lost, discordance - lost, alpha) >= power

    if high == 0 or not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high / n


def unseen_loss(n: int, only_b: int) -> float:
    """How much b may be worse than a though none of `n` answers was lost and `only_b` were gained: a share of items.

    The upper end of the share that is lost minus the lower end of the share that is gained, each one-sided 95 % after
    Clopper and Pearson; without a gain it is the rule of three, about 3 / n. There the bootstrap, which can only draw
    what it has seen, gives an interval without a loss. Takes items as independent.
    """
    lost, gained = (binomtest(count, n).proportion_ci(2 * LEVEL - 1, method="exact") for count in (0, only_b))
    return float(lost.high - gained.low)


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
        index = _group_index(values, groups)
        sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    order = np.lexsort((sums, sizes))  # whatever the order and the names of the items: the same interval
    sums, sizes = sums[order], sizes[order]
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, CHUNK // len(sums))
    for start in range(0, draws, rows):
        drawn = rng.integers(len(sums), size=(min(rows, draws - start), len(sums)))
        drawn_sums = sums[drawn].sum(axis=1)
        means.append(drawn_sums / (sizes[drawn].sum(axis=1) if groups is not None else len(sums)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(low), float(high))


def intraclass_correlation(correct: ArrayLike, groups: ArrayLike) -> float | None:
    """How much more alike answers about one image are than answers about different ones: 0 not at all, 1 all the same.

    The one-way ANOVA estimator, which may be a little below 0. `None` where it is undefined: a single group, no group
    of two, or no answer that differs from another. After Donner, Int. Stat. Rev. 54 (1986), 67-82.
    """
    values = np.asarray(correct, dtype=float)
    index = _group_index(values, groups)
    sizes = np.bincount(index)
    n, k = len(values), len(sizes)
    if k < 2 or n == k or np.ptp(values) == 0:
        return None
    explained = (np.bincount(index, weights=values) ** 2 / sizes).sum()
    between = (explained - values.sum() ** 2 / n) / (k - 1)
    within = ((values**2).sum() - explained) / (n - k)
    size = (n - (sizes**2).sum() / n) / (k - 1)
    return float((between - within) / (between + (size - 1) * within))


def design_effect(groups: ArrayLike, icc: float) -> float:
    """By what factor the variance of an accuracy grows because the questions of an image are alike.

    Takes images to have about equally many questions; where they do not, the bootstrap by image is to be believed.
    """
    labels = np.asarray(groups)
    return 1 + (labels.size / np.unique(labels).size - 1) * icc


def _group_index(values: np.ndarray, groups: ArrayLike) -> np.ndarray:
    labels = np.asarray(groups)
    if labels.shape != values.shape:
        raise ValueError(f"{values.size} answers and {labels.size} groups: each answer needs its group")
    return np.unique(labels, return_inverse=True)[1]


def wilson_interval(successes: int, n: int) -> Interval:
    """95 % Wilson score interval of a proportion; assumes independent items, and needs no resampling."""
    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Interval(float(interval.low), float(interval.high))
