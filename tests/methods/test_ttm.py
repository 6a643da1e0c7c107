"""Transformed teacher matching, with and without weights: published values, special powers, tails."""

from __future__ import annotations

import math

import pytest
import torch
from logit_cases import (
    DIVERGENCES,
    assert_official,
    batch,
    divergence,
    method,
    official_cases,
    official_divergence,
    random_logits,
    value_and_gradient,
)

from vkd.errors import ConfigError

both = pytest.mark.parametrize("name", ["ttm", "wttm"])


@pytest.mark.parametrize(
    "case",
    official_cases("ttm") + official_cases("wttm"),
    ids=lambda case: f"{case['method']}-{case.get('alpha')}-{case['power']}",
)
def test_the_published_losses_and_gradients_are_reproduced(case):
    assert_official(method(case["method"], official_divergence(case), weight=1.0, power=case["power"]), case)


@both
@pytest.mark.parametrize("compared_by", DIVERGENCES)
def test_power_one_is_the_divergence_at_temperature_one(name, compared_by):
    student, teacher = random_logits(2, 6, 10)
    value, gradient = value_and_gradient(
        method(name, divergence(compared_by, 4.0), weight=3.0, power=1.0), batch(student, teacher)
    )
    logits = student.clone().requires_grad_()
    expected = 3 * divergence(compared_by)(logits, teacher)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-9, atol=1e-14)


@both
@pytest.mark.parametrize("power", [0.1, 0.5, 1.5])
def test_the_loss_is_that_of_plain_loops(name, power):
    student, teacher = random_logits(2, 6, 5)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (s, t))
        raised = [value**power for value in p]
        divergence_of_sample = sum(
            share / sum(raised) * math.log(share / sum(raised) / other) for share, other in zip(raised, q, strict=True)
        )
        total += divergence_of_sample * (sum(raised) if name == "wttm" else 1.0)
    value = method(name, divergence("fkld"), weight=2.0, power=power)(batch(student, teacher))[name]
    assert value.item() == pytest.approx(2 * total / 6, rel=1e-11)


@both
def test_small_probabilities_of_the_teacher_are_not_lost_before_they_are_raised(name):
    # At this gap the softmax is exactly 0 in float32; its tenth power is not.
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -110.0]])
    p = math.exp(-11.0) / (1 + math.exp(-11.0))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    weight = 1 + math.exp(-11.0) if name == "wttm" else 1.0
    subject = method(name, divergence("fkld"), weight=1.0, power=0.1)
    value, gradient = value_and_gradient(subject, batch(student, teacher))
    assert value.item() == pytest.approx(weight * expected, rel=1e-6)
    assert gradient[0, 1].item() == pytest.approx(weight * (0.5 - p), rel=1e-6)


def test_a_sample_counts_for_as_much_as_the_teacher_is_unsure_of_it():
    (student,) = random_logits(1, 1, 10)
    certain, uncertain = torch.zeros(1, 10, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.float64)
    certain[0, 2] = 1e4
    for teacher, weight in ((certain, 1.0), (uncertain, 10**0.9)):
        plain, weighted = (method(name, weight=1.0, power=0.1)(batch(student, teacher)) for name in ("ttm", "wttm"))
        torch.testing.assert_close(weighted["wttm"], weight * plain["ttm"], rtol=1e-10, atol=0)


@both
@pytest.mark.parametrize("power", [0.0, -0.5])
def test_a_power_that_is_not_above_zero_is_refused(name, power):
    with pytest.raises(ConfigError, match=rf"method\.{name}\.power={power} is not above 0"):
        method(name, power=power)
