"""Attention transfer against the published code, plain loops and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import (
    assert_official,
    build,
    context,
    make_batch,
    matched,
    official,
    output,
    random_batch,
    to_common_size_by_loops,
    total,
)

from vkd.errors import ConfigError, ModelError
from vkd.methods.at import attention_loss


def loss_by_loops(student, teacher, power):
    squares, count = 0.0, 0
    for images in zip(*to_common_size_by_loops(student, teacher), strict=True):
        attentions = []
        for channels in images:
            rows, columns = range(len(channels[0])), range(len(channels[0][0]))
            energy = [sum(abs(channel[i][j]) ** power for channel in channels) for i in rows for j in columns]
            length = math.sqrt(sum(value**2 for value in energy))
            attentions.append([value / length for value in energy])
        squares += sum((one - other) ** 2 for one, other in zip(*attentions, strict=True))
        count += len(attentions[0])
    return squares / count


@pytest.mark.parametrize("case", official("at"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student = case["student"].requires_grad_()
    assert_official(case, student, attention_loss(student, case["teacher"], case["power"]))


@pytest.mark.parametrize("power", [1.0, 2.0, 2.5, 3.0])
def test_the_method_adds_up_the_stages_that_correspond(power):
    batch = random_batch()
    expected = sum(loss_by_loops(student, teacher, power) for student, teacher in matched(batch))
    assert total(build("at", power=power), batch).item() == pytest.approx(1000 * expected, rel=1e-12)


def test_a_stage_of_one_position_has_a_loss_of_zero_and_is_left_out():
    where = context([(3, 4, 4), (5, 1, 1)], [(4, 2, 2), (6, 3, 3)])
    batch = random_batch(where)
    method = build("at", where)
    assert [pair.student for pair in method.pairs] == [0]
    assert total(method, batch).item() == pytest.approx(1000 * loss_by_loops(*matched(batch)[0], 2.0))
    assert loss_by_loops(*matched(batch)[1], 2.0) == 0


def test_networks_without_a_map_are_refused():
    with pytest.raises(ModelError, match="method at compares the positions"):
        build("at", context([(5, 1, 1)], [(6, 3, 3)]))


@pytest.mark.parametrize("power", [0.5, 0.0, -1.0])
def test_a_power_with_infinite_gradients_is_refused(power):
    with pytest.raises(ConfigError, match=rf"method\.at\.power = {power}"):
        build("at", power=power)


def test_equal_attention_has_no_loss_whatever_the_order_sign_and_size_of_the_channels():
    teacher = random_batch().teacher
    order = [torch.randperm(entry.shape[1], generator=torch.Generator().manual_seed(0)) for entry in teacher.features]
    sizes = torch.tensor([0.1, 1.0, 7.0, -3.0], dtype=torch.float64).view(4, 1, 1, 1)
    maps = [(entry.detach() * sizes)[:, channels] for entry, channels in zip(teacher.features, order, strict=True)]
    where = context([tuple(entry.shape[1:]) for entry in maps])
    assert total(build("at", where), make_batch(output(teacher.features), teacher)).item() == 0
    assert total(build("at", where), make_batch(output(maps), teacher)).item() == pytest.approx(0, abs=1e-25)


def test_moving_the_attention_elsewhere_does_matter():
    batch = random_batch()
    flipped = output([entry.detach().flip(3) for entry in batch.student.features])
    method = build("at")
    assert abs(total(method, make_batch(flipped, batch.teacher)) - total(method, batch)) > 1
