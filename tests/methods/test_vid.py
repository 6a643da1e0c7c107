"""Variational information distillation against the published code, plain loops and the optimum of its variance."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import (
    assert_official,
    build,
    context,
    matched,
    official,
    random_batch,
    to_common_size_by_loops,
    total,
)

from vkd.errors import ConfigError
from vkd.methods.vid import negative_log_likelihood, predictor, raw_variance


def loss_by_loops(student, teacher, weights, variances):
    """`weights`: of the three convolutions, [out][in] each."""
    result, count = 0.0, 0
    for student_image, teacher_image in zip(*to_common_size_by_loops(student, teacher), strict=True):
        for i in range(len(student_image[0])):
            for j in range(len(student_image[0][0])):
                vector = [channel[i][j] for channel in student_image]
                for number, weight in enumerate(weights):
                    vector = [sum(x * y for x, y in zip(row, vector, strict=True)) for row in weight]
                    vector = [max(value, 0.0) for value in vector] if number < 2 else vector
                for channel, variance in enumerate(variances):
                    gap = vector[channel] - teacher_image[channel][i][j]
                    result += (gap**2 / variance + math.log(variance)) / 2
                    count += 1
    return result / count


@pytest.mark.parametrize("case", official("vid"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student, teacher = case["student"].requires_grad_(), case["teacher"]
    network = predictor(3, 4, 5).double()
    with torch.no_grad():
        for layer, weight in zip(network[::2], case["regressor_1x1_weights"], strict=True):
            layer.weight.copy_(torch.tensor(weight, dtype=torch.float64)[:, :, None, None])
    raw = torch.full((5,), raw_variance(case["initial_variance"]), dtype=torch.float64)
    assert_official(case, student, negative_log_likelihood(network(student), teacher, raw))


def test_the_method_adds_up_the_stages_that_correspond():
    batch = random_batch()
    method = build("vid", weight=3.0, initial_variance=0.7)
    expected = 0.0
    for (student, teacher), network in zip(matched(batch), method.predictors, strict=True):
        weights = [layer.weight[:, :, 0, 0].tolist() for layer in network[::2]]
        assert [len(weight) for weight in weights] == [teacher.shape[1]] * 3
        expected += loss_by_loops(student, teacher, weights, [0.7] * teacher.shape[1])
    assert total(method, batch).item() == pytest.approx(3 * expected, rel=1e-6)


@pytest.mark.parametrize("variance", [2e-5, 1e-3, 0.5, 5.0, 1e4])
def test_the_variance_starts_as_configured(variance):
    raw = torch.tensor(raw_variance(variance), dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    found = negative_log_likelihood(zero, zero, raw.view(1))
    assert found.item() == pytest.approx(math.log(variance) / 2, rel=1e-9)


def test_the_best_variance_of_a_channel_is_its_mean_squared_error():
    random = torch.Generator().manual_seed(0)
    prediction, teacher = torch.randn(2, 4, 3, 2, 2, generator=random, dtype=torch.float64)
    errors = (prediction - teacher).square().mean((0, 2, 3)).tolist()
    raw = torch.tensor([raw_variance(error) for error in errors], dtype=torch.float64, requires_grad=True)
    negative_log_likelihood(prediction, teacher, raw).backward()
    assert raw.grad.abs().max() < 1e-12


def test_every_channel_has_a_variance_of_its_own_that_learns():
    where = context()
    method = build("vid", where)
    assert [len(entry) for entry in method.raw_variances] == [6, 5, 7]
    total(method, random_batch(where)).backward()
    assert all((entry.grad != 0).all() for entry in method.raw_variances)


@pytest.mark.parametrize("variance", [1e-5, 0.0, -1.0])
def test_a_variance_that_cannot_be_is_refused(variance):
    with pytest.raises(ConfigError, match=r"method\.vid\.initial_variance = "):
        build("vid", initial_variance=variance)
