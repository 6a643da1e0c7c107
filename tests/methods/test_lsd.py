"""Logit standardization: published values, what it is blind to, constant logits."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import (
    assert_official,
    batch,
    divergence,
    method,
    official_cases,
    official_divergence,
    random_logits,
    value_and_gradient,
)


@pytest.mark.parametrize("case", official_cases("lsd"), ids=lambda case: f"{case['alpha']}-T{case['temperature']}")
def test_the_published_losses_and_gradients_are_reproduced(case):
    assert case["temperature_squared"]
    assert_official(method("lsd", official_divergence(case), weight=1.0), case)


def test_it_is_the_divergence_of_logits_that_are_standardized_one_by_one():
    student, teacher = random_logits(2, 5, 7)
    rows = []
    for logits in (student, teacher):
        rows.append(
            torch.tensor(
                [[(value - statistics.mean(row)) / statistics.stdev(row) for value in row] for row in logits.tolist()],
                dtype=torch.float64,
            )
        )
    value = method("lsd", divergence("fkld", 2.0), weight=9.0)(batch(student, teacher))["lsd"]
    torch.testing.assert_close(value, 9 * 4 * divergence("fkld", 2.0)(*rows), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-100, 100), min_size=6, max_size=6),
    st.lists(st.floats(0.02, 100), min_size=6, max_size=6),
    st.booleans(),
)
def test_a_sample_may_be_shifted_and_scaled_in_either_network(shifts, scales, student_is_changed):
    pair = random_logits(2, 6, 10)
    value, gradient = value_and_gradient(method("lsd"), batch(*pair))
    shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (shifts, scales))
    changed = [
        logits * scale + shift if (index == 0) == student_is_changed else logits for index, logits in enumerate(pair)
    ]
    value_after, gradient_after = value_and_gradient(method("lsd"), batch(*changed))
    torch.testing.assert_close(value_after, value, rtol=1e-4, atol=0)
    expected = gradient / scale if student_is_changed else gradient
    torch.testing.assert_close(gradient_after, expected, rtol=1e-3, atol=1e-6)


def test_the_gradient_neither_shifts_nor_scales_the_logits():
    student, teacher = random_logits(2, 6, 10)
    _, gradient = value_and_gradient(method("lsd"), batch(student, teacher))
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close((gradient * student).sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_student_whose_logits_are_constant_learns_the_order_of_the_teachers():
    (teacher,) = random_logits(1, 6, 10)
    student = torch.zeros(6, 10, dtype=torch.float64)
    for _ in range(300):
        _, gradient = value_and_gradient(method("lsd", divergence("fkld", 2.0)), batch(student, teacher))
        student = student - 0.01 * gradient
    value, _ = value_and_gradient(method("lsd", divergence("fkld", 2.0)), batch(student, teacher))
    flat, _ = value_and_gradient(method("lsd", divergence("fkld", 2.0)), batch(torch.zeros(6, 10).double(), teacher))
    assert value < 0.01 * flat
    assert torch.equal(student.argsort(-1), teacher.argsort(-1))


def test_a_large_offset_of_nearly_constant_logits_makes_no_noise():
    # In float32 the rounding errors of 10000.1 are as large as a deviation that would be divided by.
    _, teacher = random_logits(2, 6, 10)
    student = torch.full((6, 10), 1e4 + 0.1)
    value, gradient = value_and_gradient(method("lsd"), batch(student, teacher.float()))
    flat, flat_gradient = value_and_gradient(method("lsd"), batch(torch.zeros(6, 10), teacher.float()))
    torch.testing.assert_close(value, flat)
    torch.testing.assert_close(gradient, flat_gradient)
