"""Probabilistic knowledge transfer against the published code, plain loops and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import assert_official, build, make_batch, official, output, random_batch, rotation, total

from vkd.methods.pkt import neighbour_probabilities, probability_loss


def vectors(seed: int, images: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(images, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_embeddings(student: torch.Tensor, teacher: torch.Tensor):
    return make_batch(output([student], student), output([teacher], teacher))


def probabilities_by_loops(embedding):
    rows = embedding.tolist()
    lengths = [math.sqrt(sum(value**2 for value in row)) + 1e-7 for row in rows]
    units = [[value / length for value in row] for row, length in zip(rows, lengths, strict=True)]
    kernel = [[(sum(x * y for x, y in zip(one, other, strict=True)) + 1) / 2 for other in units] for one in units]
    return [[value / sum(row) for value in row] for row in kernel]


def loss_by_loops(student, teacher):
    result = 0.0
    for q_row, p_row in zip(probabilities_by_loops(student), probabilities_by_loops(teacher), strict=True):
        result += sum(p * math.log((p + 1e-7) / (q + 1e-7)) for p, q in zip(p_row, q_row, strict=True))
    return result / len(student) ** 2


@pytest.mark.parametrize("case", official("pkt"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    student = case["student"].requires_grad_()
    assert_official(case, student, probability_loss(student, case["teacher"]))


@pytest.mark.parametrize("images", [2, 3, 7])
def test_the_method_compares_the_embeddings_of_both_networks(images):
    batch = random_batch(images=images)
    expected = loss_by_loops(batch.student.embedding, batch.teacher.embedding)
    assert total(build("pkt"), batch).item() == pytest.approx(30000 * expected, rel=1e-9)


def test_rows_are_probabilities():
    rows = neighbour_probabilities(vectors(0))
    torch.testing.assert_close(rows.sum(1), torch.ones(4, dtype=torch.float64))
    assert (rows >= 0).all()


def test_equal_embeddings_have_no_loss_though_they_are_rotated_and_each_is_scaled():
    teacher = vectors(0)
    sizes = torch.tensor([[0.1], [1.0], [3.0], [50.0]], dtype=torch.float64)
    method = build("pkt")
    assert total(method, with_embeddings(teacher, teacher)).item() == 0
    turned = sizes * teacher @ rotation(6)
    assert total(method, with_embeddings(turned, teacher)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_of_other_embeddings_is_positive():
    assert all(probability_loss(vectors(seed), vectors(seed + 100)) > 1e-3 for seed in range(20))


def test_opposite_vectors_whose_probability_is_zero_have_a_finite_gradient():
    one = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[1.0, 0.2], [1.0, 0.0], [0.3, -1.0]])
    for student, teacher in ((one, other), (other, one), (one, one)):
        student = student.clone().requires_grad_()
        loss = probability_loss(student, teacher)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_a_zero_vector_gets_no_gradient_and_the_others_get_theirs():
    student = vectors(0)
    student[1] = 0
    student.requires_grad_()
    probability_loss(student, vectors(1)).backward()
    assert (student.grad[1] == 0).all()
    assert (student.grad[[0, 2, 3]].abs().amax(1) > 1e-4).all()
    assert student.grad.abs().max() < 1
