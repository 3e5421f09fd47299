import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from scipy.stats import beta, bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from dentalgemma.evaluation.statistics import (
    bootstrap_interval,
    design_effect,
    detectable_difference,
    holm,
    intraclass_correlation,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_effect,
    paired_counts,
    unseen_loss,
    wilson_interval,
)

sys.path.append(str(REPOSITORY / "benchmarks"))
from interval_coverage import find_coverage, find_false_alarms

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


PUBLISHED = [
    pytest.param(214, (39.31, 48.27), id="gemma4-31b"),
    pytest.param(129, (22.40, 30.35), id="qwen3-vl-8b"),
    pytest.param(90, (14.87, 22.00), id="llama3.2-11b"),
]
ANY_SEED = {214: (39.3, 48.1)}  # of the first, whose published upper end, 237 items, is one draw's, not the usual 236


@pytest.mark.parametrize(("right", "published"), PUBLISHED)
def test_the_median_over_seeds_with_1000_draws_is_the_published_interval(right, published):
    correct = np.repeat([1, 0], [right, 491 - right])

    intervals = [bootstrap_interval(correct, seed=seed) for seed in range(25)]

    assert 100 * np.median(intervals, axis=0) == pytest.approx(ANY_SEED.get(right, published), abs=0.3)


@pytest.mark.parametrize(("right", "published"), PUBLISHED)
def test_the_published_interval_is_one_that_a_seed_gives(right, published):
    correct = np.repeat([1, 0], [right, 491 - right])

    intervals = [bootstrap_interval(correct, seed=seed) for seed in range(100)]

    for end, drawn in zip(published, zip(*intervals, strict=True), strict=True):
        assert min(drawn) - 5e-5 <= end / 100 <= max(drawn) + 5e-5


def test_the_bias_corrected_interval_that_scipy_gives_lies_beside_the_percentile_one():
    oracle = bootstrap((BEST,), np.mean, n_resamples=10_000, method="BCa", rng=42).confidence_interval

    assert (100 * oracle.low, 100 * oracle.high) == pytest.approx((39.51, 48.07), abs=0.3)
    assert bootstrap_interval(BEST, draws=10_000) == pytest.approx((oracle.low, oracle.high), abs=0.005)


def test_mcnemar_agrees_with_statsmodels_on_random_tables():
    rng = np.random.default_rng(0)
    for _ in range(200):
        both, only_a, only_b, neither = (int(cell) for cell in rng.integers(0, rng.integers(1, 300), size=4))
        oracle = mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue

        assert mcnemar_exact(only_a, only_b) == pytest.approx(min(1.0, oracle), rel=1e-9), (only_a, only_b)


def test_the_chi_squared_test_does_not_reproduce_the_published_p_value():
    pair = GOLDEN["mcnemar"][1]

    assert round(pair["exact"], 6) == 0.000685
    for corrected, key in ((False, "p_chi2"), (True, "p_chi2_cc")):
        oracle = mcnemar([[pair["both"], pair["only_a"]], [pair["only_b"], pair["neither"]]], False, corrected)
        assert oracle.pvalue == pytest.approx(pair[key])
        assert round(oracle.pvalue, 6) != 0.000685


def test_holm_agrees_with_statsmodels_on_random_p_values():
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 10, 45):
        p_values = [*rng.random(count) ** 3, 0.01, 0.01]
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([]) == []


def test_the_published_pairs_stay_significant_after_holm():
    corrected = holm([pair["exact"] for pair in GOLDEN["mcnemar"]])

    # The largest of three is left as it is, the smallest counts three times.
    assert corrected[1] == pytest.approx(6.846086250425259e-4)
    assert corrected[0] == pytest.approx(3 * GOLDEN["mcnemar"][0]["exact"])


@pytest.mark.parametrize(("n", "items", "points"), [(50, 6, 12), (75, 6, 8), (491, 6, 1.222)])
def test_six_one_way_flips_are_the_least_that_can_be_significant(n, items, points):
    effect = minimum_detectable_effect(n)

    assert (effect.items, round(100 * effect.points, 3)) == (items, points)
    assert mcnemar([[0, 0], [items, 0]]).pvalue < 0.05 < mcnemar([[0, 0], [items - 1, 0]]).pvalue


def test_six_questions_show_only_that_all_of_them_changed():
    assert minimum_detectable_effect(6) == (6, 1.0)


def test_five_questions_can_show_nothing():
    assert minimum_detectable_effect(5) is None
    assert minimum_detectable_effect(20, alpha=0.001).items == 11  # 2 / 2^11 is the first below 0.001


def test_the_power_of_mcnemar_is_that_of_simulated_comparisons():
    tables = np.random.default_rng(0).multinomial(200, [0.05, 0.13, 0.82], size=2_000)

    found = np.mean([mcnemar([[0, only_a], [only_b, 0]]).pvalue < 0.05 for only_a, only_b, _ in tables])

    assert mcnemar_power(200, 0.05, 0.13) == pytest.approx(found, abs=0.03)
    assert mcnemar_power(200, 0.09, 0.09) < 0.05  # without a difference only false alarms are left


def test_a_detectable_difference_is_about_that_of_the_normal_approximation():
    # (1.96·√ψ + 0.8416·√(ψ - δ²)) / δ = √n (Connor 1987), at ψ = 0.26: the published discordance.
    difference = detectable_difference(491, 0.26)

    approximate = (1.96 * 0.26**0.5 + 0.8416 * (0.26 - difference**2) ** 0.5) / difference
    assert 0.88 * 491 < approximate**2 < 491  # the exact test asks for a little more than the approximation
    assert mcnemar_power(491, (0.26 - difference) / 2, (0.26 + difference) / 2) >= 0.8
    assert detectable_difference(491, 0.0) is None
    assert detectable_difference(40, 0.1) is None  # even four one-way flips would show nothing


@pytest.mark.parametrize(("n", "discordant"), [(49, 8), (22, 15), (200, 57)])
def test_no_item_is_lost_to_floats_on_the_way_to_a_detectable_difference(n, discordant):
    """(8 / 49) * 49 is a little less than 8: with one of the discordant items missing, power falls short."""
    powers = {  # of all one-way splits in whole items, from the distribution of the test itself
        items: mcnemar_power(n, (discordant - items) / (2 * n), (discordant + items) / (2 * n))
        for items in range(1, discordant + 1)
    }

    smallest = min(items for items, power in powers.items() if power >= 0.8)

    assert detectable_difference(n, discordant / n) == pytest.approx(smallest / n)


def test_where_nothing_was_lost_the_rule_of_three_says_what_may_have_been():
    # One-sided 95 % after Clopper and Pearson: 0.95 = 1 - (1 - p)^n. Hanley and Lippman-Hand, JAMA 249 (1983): 3 / n.
    assert unseen_loss(100, 0) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert unseen_loss(100, 0) == pytest.approx(3 / 100, abs=0.001)
    # 6 of 100 are gained: that is at least 2.65 % (beta distribution), which is set against the loss.
    assert unseen_loss(100, 6) == pytest.approx(1 - 0.05**0.01 - beta.ppf(0.05, 6, 95))


def test_at_an_icc_of_a_tenth_the_half_width_grows_from_4_39_to_5_17_points():
    images = np.arange(491) % 100
    half_width = 100 * 1.959964 * np.sqrt(BEST.mean() * (1 - BEST.mean()) / 491)

    assert round(half_width, 2) == 4.39
    assert round(half_width * np.sqrt(design_effect(images, 0.1)), 2) == 5.17


def test_the_bootstrap_by_image_finds_that_growth_in_answers_made_so():
    rng = np.random.default_rng(5)
    images = np.arange(491) % 100
    widths, correlations = [], []
    for seed in range(30):
        # Beta-distributed accuracies of images with mean p and a correlation of 0.1 of their answers.
        chances = rng.beta(9 * 0.43585, 9 * 0.56415, size=100)
        correct = rng.random(491) < chances[images]
        widths.append(np.diff(bootstrap_interval(correct, images, seed=seed))[0] * 50)
        correlations.append(intraclass_correlation(correct, images))

    assert np.mean(widths) == pytest.approx(5.17, abs=0.25)
    assert np.mean(correlations) == pytest.approx(0.1, abs=0.03)


def test_the_intraclass_correlation_is_that_of_the_analysis_of_variance():
    correct, images = [1, 1, 1, 0, 0, 0, 0, 0, 1, 0], [*"aaaa", *"bbb", *"ccc"]
    # By hand: between = (4·0.35² + 3·0.4² + 3·(1/15)²) / 2, within = (0.75 + 0 + 2/3) / 7, n0 = (10 - 34/10) / 2 = 3.3.
    between, within = (4 * 0.35**2 + 3 * 0.4**2 + 3 / 225) / 2, (0.75 + 2 / 3) / 7

    assert intraclass_correlation(correct, images) == pytest.approx((between - within) / (between + 2.3 * within))
    assert intraclass_correlation([1, 1, 0, 0], [*"aabb"]) == 1
    assert intraclass_correlation([1, 0, 1, 0], [*"aabb"]) < 0


@pytest.mark.parametrize(
    ("correct", "groups"),
    [
        pytest.param([1, 0, 1], "abc", id="one answer an image"),
        pytest.param([1, 0, 1], "aaa", id="one image"),
        pytest.param([1, 1, 1], "aab", id="all right"),
    ],
)
def test_an_intraclass_correlation_that_is_undefined_is_not_made_up(correct, groups):
    assert intraclass_correlation(correct, [*groups]) is None


@pytest.mark.parametrize("by_image", [False, True])
def test_ten_thousand_resamples_of_1069_items_take_less_than_two_seconds(by_image):
    correct = np.random.default_rng(0).integers(0, 2, size=1069)
    began = time.process_time()  # of this process alone, whatever else the machine does

    bootstrap_interval(correct, np.arange(1069) % 100 if by_image else None, draws=10_000)

    assert time.process_time() - began < 2


def test_the_order_of_items_and_the_names_of_images_change_no_interval():
    rng = np.random.default_rng(2)
    correct, images = rng.integers(0, 2, size=90), rng.integers(0, 20, size=90)
    order = rng.permutation(90)

    assert bootstrap_interval(correct[order]) == bootstrap_interval(correct)
    assert bootstrap_interval(correct[order], 100 - images[order]) == bootstrap_interval(correct, images)


@pytest.mark.parametrize("seed", range(6))
def test_the_bootstrap_agrees_with_scipy_on_random_answers(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2, size=rng.integers(40, 400))
    change = rng.integers(-1, 2, size=values.size)

    for sample in (values, change):
        oracle = bootstrap((sample,), np.mean, n_resamples=5_000, method="percentile", rng=seed).confidence_interval
        assert bootstrap_interval(sample, draws=5_000) == pytest.approx((oracle.low, oracle.high), abs=0.025)


def test_the_bootstrap_by_image_agrees_with_scipy_on_the_sums_of_images():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 40, size=300)
    correct = rng.random(300) < rng.random(40)[images]
    sums, sizes = np.bincount(images, weights=correct), np.bincount(images)

    oracle = bootstrap(
        (sums, sizes), lambda s, m, axis: s.sum(axis=axis) / m.sum(axis=axis), paired=True, n_resamples=10_000,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip

    assert bootstrap_interval(correct, images, draws=10_000) == pytest.approx((oracle.low, oracle.high), abs=0.01)


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


def test_an_interval_by_image_needs_images_as_the_page_on_evaluating_says():
    assert find_coverage(3, runs=500) < 0.85
    assert find_coverage(100, runs=500) > 0.92
    assert find_false_alarms(runs=1_000) > 0.06
