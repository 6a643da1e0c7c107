import itertools
import math
import random
import statistics

import numpy as np
import pytest
import scipy.stats

from vkd.records.statistics import (
    compare,
    mean_interval,
    paired_t_p_value,
    sign_flip_p_value,
    summarise,
    t_quantile,
    t_tails,
)


def test_mean_and_sample_standard_deviation_agree_with_the_standard_library():
    generator = random.Random(0)
    for n in (2, 3, 10):
        values = [generator.gauss(90, 0.3) for _ in range(n)]
        summary = summarise(values)
        assert summary.n == n
        assert summary.mean == pytest.approx(statistics.mean(values), rel=1e-14)
        assert summary.std == pytest.approx(statistics.stdev(values), rel=1e-12)


def test_one_value_has_no_spread_and_none_have_no_summary():
    assert (summarise([3.0]).mean, summarise([3.0]).std, summarise([3.0]).n) == (3.0, None, 1)
    assert summarise([]) is None


def test_a_difference_is_paired_by_seed():
    difference = compare({1: 92.0, 2: 95.0, 3: 93.0}, {3: 92.0, 2: 92.0, 1: 90.0})
    assert (difference.mean, difference.std, difference.n, difference.paired) == (2.0, 1.0, 3, True)


def test_only_common_seeds_are_paired():
    difference = compare({1: 92.0, 2: 95.0, 9: 0.0}, {1: 90.0, 2: 92.0, 3: 50.0})
    assert (difference.mean, difference.n, difference.paired) == (2.5, 2, True)
    assert difference.std == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("seeds", [(4, 5), (1, 5)])
def test_where_seeds_do_not_coincide_it_is_the_difference_of_the_means(seeds):
    difference = compare({1: 92.0, 2: 94.0}, dict(zip(seeds, (90.0, 91.0), strict=True)))
    assert (difference.mean, difference.std, difference.n, difference.paired) == (2.5, None, 0, False)


def test_one_pair_of_the_same_seed_is_a_pair_without_spread():
    difference = compare({7: 92.0}, {7: 90.0})
    assert (difference.mean, difference.std, difference.n, difference.paired) == (2.0, None, 1, True)


def test_there_is_no_difference_to_nothing():
    assert compare({}, {1: 1.0}) is None
    assert compare({1: 1.0}, {}) is None


def test_three_seeds_by_hand():
    # mean 2, std 1, t(0.975, 2) = 4.302652729911275; of the 8 choices of signs +++ and --- reach 6.
    difference = compare({1: 92.0, 2: 95.0, 3: 93.0}, {1: 90.0, 2: 92.0, 3: 92.0})
    assert difference.interval == pytest.approx((2 - 4.302652729911275 / 3**0.5, 2 + 4.302652729911275 / 3**0.5))
    assert (difference.p, difference.test) == (0.25, "sign-flip permutation")
    # Every choice reaches |1 + 2 - 3| = 0; |3 + 1 - 1| = 3 is reached by +++, ++-, +-+ and their opposites.
    assert sign_flip_p_value([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_p_value([3.0, 1.0, -1.0]) == 0.75
    assert sign_flip_p_value([3.0, 1.0, -0.5]) == 0.5
    # Two degrees of freedom have a closed tail: 1 - t / sqrt(t^2 + 2).
    t = 2 / (1 / 3**0.5)
    assert paired_t_p_value([2.0, 3.0, 1.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-15)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_the_sign_flip_test_is_the_permutation_test_of_scipy(n):
    generator = np.random.default_rng(n)
    for shift in (0.0, 0.5, 2.0):
        differences = generator.normal(shift, 1, n).round(2)
        reference = scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert sign_flip_p_value(differences.tolist()) == pytest.approx(reference.pvalue, abs=1e-9)


def test_sums_that_tie_in_decimals_tie_in_the_sign_flip_test():
    # 0.1 + 0.2 - 0.3 is 5.6e-17 in floats, and 0 to a reader: every choice of signs is at least as far from 0.
    for order in itertools.permutations((0.1, 0.2, -0.3)):
        assert sign_flip_p_value(order) == 1.0
    accuracies = {seed: value / 10 for seed, value in enumerate((934, 926, 940, 921))}
    baseline = {seed: value / 10 for seed, value in enumerate((922, 914, 928, 933))}
    assert compare(accuracies, baseline).p == 10 / 16  # all sizes are 1.2: any choice but two plus and two minus


@pytest.mark.parametrize("n", [2, 3, 11, 30, 200])
def test_the_t_test_and_the_interval_are_those_of_scipy(n):
    generator = np.random.default_rng(n)
    for shift in (0.0, 0.3, 3.0):
        ours, theirs = generator.normal(90 + shift, 1, n), generator.normal(90, 1, n)
        differences = (ours - theirs).tolist()
        assert paired_t_p_value(differences) == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue, abs=1e-9)
        reference = scipy.stats.t.interval(0.95, n - 1, np.mean(differences), scipy.stats.sem(differences))
        assert mean_interval(differences) == pytest.approx(reference, abs=1e-9)


def test_tails_and_quantiles_of_the_t_distribution_hold_for_any_size():
    for degrees in (1, 2, 7, 10, 63, 500):
        for t in (0.0, 1e-3, 0.4, 1.0, 2.5, 8.0, 30.0):
            reference = 2 * scipy.stats.t.sf(t, degrees)
            assert t_tails(t, degrees) == t_tails(-t, degrees) == pytest.approx(reference, rel=1e-9)
        for confidence in (0.5, 0.95, 0.999):
            reference = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
            assert t_quantile(degrees, confidence) == pytest.approx(reference, rel=1e-9)
    assert t_tails(math.inf, 5) == 0.0


def test_more_than_ten_pairs_are_tested_by_t_and_up_to_ten_by_signs():
    values = {seed: 90 + math.sin(seed) for seed in range(11)}
    baseline = dict.fromkeys(values, 89.5)
    assert compare(values, baseline).test == "paired t"
    del values[0]
    assert compare(values, baseline).test == "sign-flip permutation"


def test_differences_without_a_spread_have_an_interval_of_no_width():
    same = dict.fromkeys(range(12), 90.0)
    difference = compare(dict.fromkeys(range(12), 91.0), same)
    assert (difference.interval, difference.p) == ((1.0, 1.0), 0.0)
    assert compare(same, same).p == 1.0
    assert compare({1: 5.0, 2: 5.0}, {1: 5.0, 2: 5.0}).p == 1.0


@pytest.mark.parametrize("baseline", [{7: 90.0}, {8: 90.0}, {8: 90.0, 9: 91.0}])
def test_without_two_pairs_there_is_neither_an_interval_nor_a_p_value(baseline):
    difference = compare({7: 92.0}, baseline)
    assert (difference.interval, difference.p, difference.test) == (None, None, "")
