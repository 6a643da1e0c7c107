"""Correlation congruence against the published code, plain loops and its invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from feature_cases import assert_official, build, context, make_batch, official, output, random_batch, total

from vkd.errors import ConfigError
from vkd.methods.cc import congruence_loss


def loss_by_loops(student, teacher):
    gaps = [[abs(x - y) for x, y in zip(*rows, strict=True)] for rows in zip(student, teacher, strict=True)]
    products = [sum(x * y for x, y in zip(*rows, strict=True)) for rows in itertools.pairwise(gaps)]
    return sum(products) / len(products)


def embedded_by_loops(layer, vectors):
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        [
            sum(x * y for x, y in zip(row, vector, strict=True)) + offset
            for row, offset in zip(weight, bias, strict=True)
        ]
        for vector in vectors.tolist()
    ]


@pytest.mark.parametrize("case", official("cc"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student = case["student"].requires_grad_()
    assert_official(case, student, congruence_loss(student, case["teacher"]))


@pytest.mark.parametrize("images", [2, 3, 7])
def test_the_method_compares_both_embeddings_through_a_linear_map_each(images):
    batch = random_batch(images=images)
    method = build("cc", embedding_size=3)
    student = embedded_by_loops(method.student_embedding, batch.student.embedding)
    teacher = embedded_by_loops(method.teacher_embedding, batch.teacher.embedding)
    assert total(method, batch).item() == pytest.approx(0.02 * loss_by_loops(student, teacher), rel=1e-12)


def test_both_linear_maps_have_the_configured_length_and_learn():
    method = build("cc", context(student_embedding=10, teacher_embedding=20))
    assert [tuple(entry.weight.shape) for entry in (method.student_embedding, method.teacher_embedding)] == [
        (128, 10),
        (128, 20),
    ]
    assert len(list(method.parameters())) == 4


def test_equal_vectors_have_no_loss_and_a_common_shift_does_not_matter():
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, generator=random, dtype=torch.float64)
    assert congruence_loss(student, student) == 0
    torch.testing.assert_close(congruence_loss(student + 3, teacher + 3), congruence_loss(student, teacher))
    assert congruence_loss(student, teacher) > 0.1


def test_a_batch_of_one_image_has_no_neighbours_and_no_loss():
    vectors = torch.randn(1, 6)
    batch = make_batch(output([vectors], vectors), output([torch.randn(1, 9)], torch.randn(1, 9)))
    assert total(build("cc", dtype=torch.float32), batch) == 0


@pytest.mark.parametrize("size", [0, -1])
def test_vectors_of_no_length_are_refused(size):
    with pytest.raises(ConfigError, match=rf"method\.cc\.embedding_size = {size}"):
        build("cc", embedding_size=size)
