import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from dentalgemma.evaluation.statistics import bootstrap_interval, mcnemar_exact, paired_counts, wilson_interval

GOLDEN = json.loads((Path(__file__).parent / "data/golden_stats.json").read_text("utf-8"))
BEST = np.repeat([1, 0], [214, 491 - 214])  # 43.58 % of 491, the published accuracy


@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair["pair"]) for pair in GOLDEN["mcnemar"]])
def test_mcnemar_is_the_exact_published_value(pair):
    assert mcnemar_exact(pair["only_a"], pair["only_b"]) == pytest.approx(pair["exact"], rel=1e-9)


def test_the_published_p_value_of_0_000685_is_reproduced():
    assert round(mcnemar_exact(44, 83), 6) == 0.000685
    assert mcnemar_exact(83, 44) == mcnemar_exact(44, 83)


def test_models_that_never_differ_give_p_1():
    assert mcnemar_exact(0, 0) == 1.0


def test_52_items_more_are_significant_whatever_the_pairing():
    delta = GOLDEN["delta"]

    # `both` runs over every table with the published margins: 214 right before, 266 after, of 491.
    both = range(max(0, delta["before"] + delta["after"] - delta["n"]), delta["before"] + 1)
    largest = max(mcnemar_exact(delta["before"] - x, delta["after"] - x) for x in both)

    assert round(largest, 4) == delta["largest_p_over_all_pairings"]


@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair["pair"]) for pair in GOLDEN["mcnemar"]])
def test_paired_counts_find_the_four_cells(pair):
    cells = (pair["both"], pair["only_a"], pair["only_b"], pair["neither"])

    assert paired_counts(np.repeat([1, 1, 0, 0], cells), np.repeat([1, 0, 1, 0], cells)) == cells


@pytest.mark.parametrize("model", GOLDEN["closed"].values(), ids=list(GOLDEN["closed"]))
def test_wilson_intervals_are_the_published_ones(model):
    assert wilson_interval(model["k"], model["n"]) == pytest.approx(model["wilson"], abs=1e-9)
    assert wilson_interval(model["open_k"], model["open_n"]) == pytest.approx(model["open_wilson"], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_bootstrap_interval_is_the_published_one_within_three_tenths_of_a_point(seed):
    low, high = bootstrap_interval(BEST, draws=10_000, seed=seed)

    assert low == pytest.approx(0.393, abs=0.003)
    assert high == pytest.approx(0.481, abs=0.003)


def test_the_median_over_seeds_with_1000_draws_is_the_published_interval():
    intervals = [bootstrap_interval(BEST, seed=seed) for seed in range(25)]

    assert np.median(intervals, axis=0) == pytest.approx([0.393, 0.481], abs=0.003)


def test_the_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).integers(0, 2, size=120)

    oracle = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval

    assert bootstrap_interval(values, draws=10_000) == pytest.approx((oracle.low, oracle.high), abs=0.01)


def test_questions_of_one_image_that_agree_widen_the_interval_by_the_root_of_their_number():
    images = np.repeat(np.arange(100), 4)
    correct = np.repeat(np.arange(100) % 2, 4)  # the four answers on an image are all right or all wrong

    one_by_one = np.diff(bootstrap_interval(correct, draws=4_000))
    by_image = np.diff(bootstrap_interval(correct, images, draws=4_000))

    assert by_image / one_by_one == pytest.approx(2.0, rel=0.1)


def test_groups_of_one_change_nothing():
    assert bootstrap_interval(BEST, np.arange(BEST.size)) == bootstrap_interval(BEST)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    assert bootstrap_interval(BEST, seed=7) == bootstrap_interval(BEST, seed=7)
    assert bootstrap_interval(BEST, seed=7) != bootstrap_interval(BEST, seed=8)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="each answer needs its group"):
        bootstrap_interval([1, 0], ["a"])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_counts([1, 0], [1])
