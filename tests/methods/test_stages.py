"""Which stages of two networks correspond, and how their maps come to one size."""

from __future__ import annotations

import pytest
import torch
from feature_cases import context, to_common_size_by_loops

from vkd.errors import ConfigError, ModelError
from vkd.methods.stages import StagePair, choose_pair, pair_stages, pairs_with_positions, to_common_size

THREE = [(3, 8, 8), (4, 4, 4), (5, 2, 2)]
FOUR = [(2, 16, 16), (6, 8, 8), (5, 4, 4), (7, 1, 1)]


def test_stages_are_paired_from_the_last_and_the_first_ones_of_the_longer_network_are_left_out():
    pairs = pair_stages(context(THREE, FOUR))
    assert [(pair.student, pair.teacher) for pair in pairs] == [(0, 1), (1, 2), (2, 3)]
    assert [(pair.student_shape, pair.teacher_shape) for pair in pairs] == list(zip(THREE, FOUR[1:], strict=True))
    pairs = pair_stages(context(FOUR, THREE))
    assert [(pair.student, pair.teacher) for pair in pairs] == [(1, 0), (2, 1), (3, 2)]
    assert [(pair.student_shape, pair.teacher_shape) for pair in pairs] == list(zip(FOUR[1:], THREE, strict=True))


@pytest.mark.parametrize(("count", "middle"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_without_a_number_the_middle_pair_is_taken_which_is_the_second_of_three_or_four(count, middle):
    maps = [(8, 4, 4)] * count
    pairs = pair_stages(context(maps, maps))
    assert choose_pair(pairs, None, key="stage") is pairs[middle]


def test_pairs_are_numbered_from_one():
    pairs = pair_stages(context(THREE, THREE))
    assert [choose_pair(pairs, number, key="stage") for number in (1, 2, 3)] == pairs


@pytest.mark.parametrize("number", [0, -1, 4])
def test_a_pair_that_is_not_there_is_answered_with_the_numbers_that_are(number):
    with pytest.raises(ConfigError, match=rf"method\.any\.stage = {number}\b") as caught:
        choose_pair(pair_stages(context(THREE, FOUR)), number, key="method.any.stage")
    assert "1 to 3" in caught.value.expected


@pytest.mark.parametrize(
    ("one", "other"),
    [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((4, 4), (12, 8)), ((2, 8), (6, 4)), ((7, 7), (5, 3)), ((5, 4), (1, 1))],
)
def test_maps_come_to_the_smaller_height_and_width_by_averaging(one, other):
    random = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, *one, generator=random, dtype=torch.float64)
    teacher = torch.randn(2, 1, *other, generator=random, dtype=torch.float64)
    found = to_common_size(student, teacher)
    for entry, expected in zip(found, to_common_size_by_loops(student, teacher), strict=True):
        torch.testing.assert_close(entry, torch.tensor(expected, dtype=torch.float64))
    assert found[0].shape[2:] == StagePair(0, 0, (3, *one), (1, *other)).common_size


def test_maps_of_one_size_stay_as_they_are():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    found = to_common_size(student, teacher)
    assert found[0] is student
    assert found[1] is teacher


def test_pairs_with_a_single_position_in_common_say_nothing_about_positions():
    pairs = pairs_with_positions(context(THREE, FOUR), method="any")
    assert [(pair.student, pair.teacher) for pair in pairs] == [(0, 1), (1, 2)]
    assert len(pairs_with_positions(context([(3, 1, 4)], [(5, 2, 2)]), method="any")) == 1


def test_networks_without_positions_in_common_are_refused():
    with pytest.raises(ModelError, match="method any compares the positions") as caught:
        pairs_with_positions(context([(3, 1, 4), (5, 1, 1)], [(5, 4, 1), (7, 2, 2)]), method="any")
    assert "((1, 4), (4, 1))" in caught.value.expected
