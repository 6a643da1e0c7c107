import random
import statistics

import pytest

from vkd.records.statistics import compare, summarise


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
