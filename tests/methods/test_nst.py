"""Neuron selectivity transfer against the published code, plain loops and its invariances."""

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

from vkd.errors import ModelError
from vkd.methods import nst
from vkd.methods.nst import selectivity_loss


def loss_by_loops(student, teacher):
    result = 0.0
    for images in zip(*to_common_size_by_loops(student, teacher), strict=True):
        samples = []
        for channels in images:
            vectors = [[value for row in channel for value in row] for channel in channels]
            lengths = [math.sqrt(sum(value**2 for value in vector)) for vector in vectors]
            samples.append(
                [[value / length for value in vector] for vector, length in zip(vectors, lengths, strict=True)]
            )

        def kernel(one, other):
            products = [sum(x * y for x, y in zip(a, b, strict=True)) ** 2 for a in one for b in other]
            return sum(products) / len(products)

        first, second = samples
        result += kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)
    return result / len(student)


@pytest.mark.parametrize("case", official("nst"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student = case["student"].requires_grad_()
    assert_official(case, student, selectivity_loss(student, case["teacher"]))


def test_the_method_adds_up_the_stages_that_correspond():
    batch = random_batch()
    expected = sum(loss_by_loops(student, teacher) for student, teacher in matched(batch))
    assert total(build("nst"), batch).item() == pytest.approx(50 * expected, rel=1e-12)


def test_both_forms_are_taken_each_where_it_has_fewer_numbers(monkeypatch):
    calls = []
    kernel = nst._kernel
    monkeypatch.setattr(nst, "_kernel", lambda one, other: calls.append(one) or kernel(one, other))
    random = torch.Generator().manual_seed(0)
    for channels, size, by_kernel in ((3, 6, True), (40, 2, False)):
        calls.clear()
        student = torch.randn(2, channels, size, size, generator=random, dtype=torch.float64)
        teacher = torch.randn(2, channels + 1, size, size, generator=random, dtype=torch.float64)
        assert selectivity_loss(student, teacher).item() == pytest.approx(loss_by_loops(student, teacher), rel=1e-10)
        assert bool(calls) == by_kernel


def test_equal_channels_have_no_loss_whatever_their_order_sign_and_size():
    teacher = random_batch().teacher
    maps = []
    for seed, entry in enumerate(teacher.features):
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(entry.shape[1], generator=random)
        sizes = torch.randn(len(entry), entry.shape[1], 1, 1, generator=random, dtype=torch.float64)
        maps.append((entry.detach() * sizes)[:, order])
    where = context([tuple(entry.shape[1:]) for entry in maps])
    assert total(build("nst", where), make_batch(output(maps), teacher)).item() == pytest.approx(0, abs=1e-12)


def test_the_place_of_the_positions_does_not_matter_as_long_as_both_networks_share_it():
    batch = random_batch()
    method = build("nst")
    expected = total(method, batch)
    student, teacher = (
        output([entry.detach().flip(2) for entry in side.features]) for side in (batch.student, batch.teacher)
    )
    torch.testing.assert_close(total(method, make_batch(student, teacher)), expected)
    assert abs(total(method, make_batch(student, batch.teacher)) - expected) > 1


def test_networks_without_a_map_are_refused():
    with pytest.raises(ModelError, match="method nst compares the positions"):
        build("nst", context([(5, 1, 1)], [(6, 3, 3)]))
