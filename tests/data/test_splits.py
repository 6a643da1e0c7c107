"""The validation split: proportions, independence, and a stream that never changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.data import load_data, stratified_split
from vkd.errors import ConfigError

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


def test_a_share_of_the_training_images_is_stratified_nested_and_leaves_val_and_test_alone(config, write_packed):
    write_packed(count=200)
    root = write_packed(split="test", count=20).parent.parent

    def load(fraction):
        return load_data(config("mine", val_fraction=0.1, train_fraction=fraction), root, device=torch.device("cpu"))

    whole, part, tenth = load(1.0), load(0.4), load(0.1)
    assert (whole.train_size, part.train_size, tenth.train_size) == (180, 72, 20)
    assert torch.equal(torch.bincount(part.train_targets), torch.bincount(whole.train_targets) * 2 // 5)
    pixels = [{image.numpy().tobytes() for image in data.images("train")} for data in (whole, part, tenth)]
    assert pixels[0] > pixels[1] > pixels[2]
    for data in (part, tenth):
        assert torch.equal(data.images("val"), whole.images("val"))
        assert torch.equal(data.images("test"), whole.images("test"))
    assert "72 of 180 training images are used (dataset.train_fraction)" in part.notes


@pytest.mark.parametrize("fraction", [0, -0.5, 1.1])
def test_an_impossible_share_of_the_training_images_is_refused(config, write_packed, fraction):
    root = write_packed().parent.parent
    write_packed(split="test")
    with pytest.raises(ConfigError, match=r"dataset\.train_fraction"):
        load_data(config("mine", train_fraction=fraction), root, device=torch.device("cpu"))
