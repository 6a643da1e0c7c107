"""The validation split: proportions, independence, and a stream that never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.data import stratified_split

LABELS = np.random.RandomState(0).randint(0, 7, 500).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(-(2**40), 2**40),
)
def test_every_image_is_on_one_side_and_no_class_is_emptied(labels, fraction, seed):
    labels = np.array(labels, dtype=np.int64)
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert kept.dtype == held.dtype == np.int64
    assert list(kept) == sorted(kept)
    assert list(held) == sorted(held)
    for label in set(labels.tolist()):
        count, mine = int((labels == label).sum()), int((labels[held] == label).sum())
        assert mine < count
        assert mine >= (1 if fraction > 0 and count >= 2 else 0)
        assert abs(mine - fraction * count) <= 0.5 or mine in (1, count - 1)


def test_fraction_zero_holds_nothing():
    kept, held = stratified_split(LABELS, 0.0, 3)
    assert len(held) == 0
    assert np.array_equal(kept, np.arange(500))


def test_the_split_is_the_same_today_and_forever():
    _, held = stratified_split(np.arange(40, dtype=np.int64) % 4, 0.2, 0)
    assert held.tolist() == [4, 5, 12, 15, 19, 29, 34, 38]


def test_another_seed_gives_another_split():
    first, again, other = (stratified_split(LABELS, 0.2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_larger_fraction_holds_what_a_smaller_one_holds_and_more():
    small, large = (set(stratified_split(LABELS, fraction, 0)[1]) for fraction in (0.1, 0.3))
    assert small < large


def test_images_added_to_one_class_leave_the_split_of_the_others():
    _, before = stratified_split(LABELS, 0.2, 0)
    _, after = stratified_split(np.append(LABELS, [3] * 50), 0.2, 0)
    assert [index for index in before if LABELS[index] != 3] == [
        index for index in after if index < 500 and LABELS[index] != 3
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(LABELS, fraction, 0)
