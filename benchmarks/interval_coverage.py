"""What the statistics of an evaluation promise and hold, by simulation: the figures of docs/evaluating.md.

    python benchmarks/interval_coverage.py

Five questions on each image. An image's own difficulty is drawn from a beta distribution, so that answers on it are
alike: correlated by 0.1 for the intervals, by 1/3 for the test's false alarms. Seeded; seconds on one core.
"""

from __future__ import annotations

import numpy as np

from dentalgemma.evaluation.statistics import bootstrap_interval, mcnemar_exact, mcnemar_power

QUESTIONS = 5  # on each image
IMAGES = (3, 5, 10, 20, 100)


def find_coverage(images: int, *, runs: int = 4_000, draws: int = 400, seed: int = 0) -> float:
    """How often the 95 % bootstrap interval by image holds the true accuracy of one half."""
    rng = np.random.default_rng([seed, images])
    groups = np.repeat(np.arange(images), QUESTIONS)
    held = 0
    for run in range(runs):
        correct = rng.random(groups.size) < rng.beta(4.5, 4.5, size=images)[groups]
        low, high = bootstrap_interval(correct, groups, draws=draws, seed=run)
        held += low <= 0.5 <= high
    return held / runs


def find_false_alarms(images: int = 100, *, runs: int = 6_000, seed: int = 0) -> float:
    """How often exact McNemar at 5 % calls two equally good models different, whose discordant answers go by image."""
    rng = np.random.default_rng([seed, images])
    alarms = 0
    for _ in range(runs):
        better = rng.beta(1, 1, size=images)[:, None]
        discordant = rng.random((images, QUESTIONS)) < 0.3
        only_b = discordant & (rng.random((images, QUESTIONS)) < better)
        alarms += mcnemar_exact(int((discordant & ~only_b).sum()), int(only_b.sum())) < 0.05
    return alarms / runs


def main() -> None:
    for images in IMAGES:
        print(f"interval by image, {images:3} images: holds the truth in {find_coverage(images):.0%} of 4,000 runs")
    print(f"exact McNemar at 5 %, 100 images: {find_false_alarms():.0%} false alarms in 6,000 runs")
    print(
        f"75 questions, a loss of 8 points, 20 % discordant: found with a power of {mcnemar_power(75, 0.14, 0.06):.0%}"
    )


if __name__ == "__main__":
    main()
