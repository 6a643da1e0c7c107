"""Similarity-preserving distillation against the published code, plain loops and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import assert_official, build, make_batch, official, output, random_batch, rotation, total

from vkd.methods.sp import similarity_loss


def loss_by_loops(student, teacher):
    matrices = []
    for maps in (student, teacher):
        images = [[value for channel in image for row in channel for value in row] for image in maps.tolist()]
        rows = [[sum(x * y for x, y in zip(one, other, strict=True)) for other in images] for one in images]
        matrices.append([[value / math.sqrt(sum(entry**2 for entry in row)) for value in row] for row in rows])
    squares = [(one - other) ** 2 for pair in zip(*matrices, strict=True) for one, other in zip(*pair, strict=True)]
    return sum(squares) / len(student) ** 2


@pytest.mark.parametrize("case", official("sp"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student = case["student"].requires_grad_()
    assert_official(case, student, similarity_loss(student, case["teacher"]))


@pytest.mark.parametrize("images", [2, 3, 7])
def test_the_method_compares_the_last_maps_of_both_networks(images):
    batch = random_batch(images=images)
    expected = loss_by_loops(batch.student.features[-1], batch.teacher.features[-1])
    assert total(build("sp"), batch).item() == pytest.approx(3000 * expected, rel=1e-12)


def test_equal_similarities_have_no_loss_though_the_features_are_rotated_and_scaled():
    teacher = random_batch().teacher
    last = teacher.features[-1].detach()
    turned = 3.7 * (last.flatten(1) @ rotation(last[0].numel())).view_as(last)
    assert total(build("sp"), make_batch(output([last]), teacher)).item() == 0
    assert total(build("sp"), make_batch(output([turned]), teacher)).item() == pytest.approx(0, abs=1e-24)


def test_the_order_of_the_images_does_not_matter():
    batch = random_batch()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = make_batch(
        output([batch.student.features[-1].detach()[order]]), output([batch.teacher.features[-1].detach()[order]])
    )
    torch.testing.assert_close(total(build("sp"), shuffled), total(build("sp"), batch))


def test_a_black_row_does_not_blow_up_the_gradient_of_the_others():
    batch = random_batch(dtype=torch.float32)
    maps = batch.student.features[-1].detach().clone()
    maps[1] = 0
    batch = make_batch(output([maps]), batch.teacher)
    total(build("sp", dtype=torch.float32, weight=1.0), batch).backward()
    assert batch.student.features[0].grad.abs().max() < 10
