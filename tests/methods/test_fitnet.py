"""FitNets against plain loops, and which stage they compare."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import build, context, make_batch, matched, output, random_batch, to_common_size_by_loops, total

from vkd.errors import ConfigError


def loss_by_loops(student, teacher, method, relu=True):
    """1x1 convolution, BatchNorm by the batch's own statistics, ReLU if there is one, mean squared error."""
    convolution, norm = method.regressor[0], method.regressor[1]
    weight, bias = convolution.weight[:, :, 0, 0].tolist(), convolution.bias.tolist()
    scale, shift = norm.weight.tolist(), norm.bias.tolist()
    student, teacher = to_common_size_by_loops(student, teacher)
    places = [
        (b, i, j) for b in range(len(student)) for i in range(len(student[0][0])) for j in range(len(student[0][0][0]))
    ]
    squares = 0.0
    for channel, row in enumerate(weight):
        values = [sum(row[c] * student[b][c][i][j] for c in range(len(row))) + bias[channel] for b, i, j in places]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        for value, (b, i, j) in zip(values, places, strict=True):
            value = scale[channel] * (value - mean) / math.sqrt(variance + 1e-5) + shift[channel]
            value = max(value, 0.0) if relu else value
            squares += (value - teacher[b][channel][i][j]) ** 2
    return squares / (len(places) * len(weight))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("stage", "position"), [(None, 1), (1, 0), (2, 1), (3, 2)])
def test_the_method_is_its_weight_times_the_mean_squared_error_of_the_regressed_map(stage, position, relu):
    batch = random_batch()
    method = build("fitnet", stage=stage, relu=relu)
    with torch.no_grad():
        method.regressor[1].weight.uniform_(0.5, 2)
        method.regressor[1].bias.uniform_(-1, 1)
    terms = method(batch)
    assert list(terms) == ["fitnet"]
    expected = loss_by_loops(*matched(batch)[position], method, relu)
    assert terms["fitnet"].item() == pytest.approx(100 * expected, rel=1e-9)


@pytest.mark.parametrize("stage", [0, 4])
def test_a_stage_that_the_networks_do_not_share_is_refused(stage):
    with pytest.raises(ConfigError, match=rf"method\.fitnet\.stage = {stage}, .* share 3 stages"):
        build("fitnet", stage=stage)


def test_the_right_regressor_has_no_loss():
    where = context([(3, 4, 4)], [(3, 4, 4)])
    batch = random_batch(where)
    teacher = batch.student.features[0].detach()
    method = build("fitnet", where, relu=False)
    with torch.no_grad():
        method.regressor[0].weight.copy_(torch.eye(3)[:, :, None, None])
        method.regressor[0].bias.zero_()
        method.regressor[1].weight.copy_((teacher.var((0, 2, 3), correction=0) + 1e-5).sqrt())
        method.regressor[1].bias.copy_(teacher.mean((0, 2, 3)))
    assert total(method, make_batch(batch.student, output([teacher]))).item() == pytest.approx(0, abs=1e-20)


def test_without_relu_negative_maps_are_in_reach():
    batch = random_batch()
    batch = make_batch(batch.student, output([-entry.detach().abs() for entry in batch.teacher.features]))

    def after_training(relu):
        method = build("fitnet", relu=relu, weight=1.0)
        optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            loss = total(method, batch)
            loss.backward()
            optimizer.step()
        return loss.item()

    of_zero = batch.teacher.features[2].square().mean().item()
    assert after_training(relu=True) > 0.99 * of_zero
    assert after_training(relu=False) < 0.5 * of_zero


@pytest.mark.parametrize("images", [2, 5])
def test_maps_of_one_position_are_compared_as_vectors(images):
    where = context([(3, 1, 1)], [(4, 2, 2)])
    batch = random_batch(where, images=images)
    method = build("fitnet", where)
    loss = total(method, batch)
    assert loss.item() == pytest.approx(100 * loss_by_loops(*matched(batch)[0], method), rel=1e-9)
