"""Relational knowledge distillation against the published code, plain loops and its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from feature_cases import assert_official, build, make_batch, official, output, random_batch, rotation, total
from torch.nn import functional

from vkd.methods.rkd import angles, differences, relative_distances


def vectors(seed: int, images: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(images, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_embeddings(student: torch.Tensor, teacher: torch.Tensor):
    return make_batch(output([student], student), output([teacher], teacher))


def smooth_l1(one, other):
    gaps = [abs(x - y) for x, y in zip(one, other, strict=True)]
    return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)


def distances_by_loops(embedding):
    rows = embedding.tolist()
    distances = [math.dist(one, other) for one in rows for other in rows]
    mean = sum(distances) / (len(rows) * (len(rows) - 1))
    return [distance / mean for distance in distances]


def angles_by_loops(embedding):
    rows = embedding.tolist()

    def cosine(at, one, other):
        length = math.dist(one, at) * math.dist(other, at)
        return sum((x - z) * (y - z) for x, y, z in zip(one, other, at, strict=True)) / length if length else 0.0

    return [cosine(at, one, other) for at in rows for one in rows for other in rows]


@pytest.mark.parametrize("case", official("rkd"))
def test_loss_and_gradient_are_those_of_the_published_code(case):
    batch = with_embeddings(case["student"], case["teacher"])
    weights = {name: float(case[name]) for name in ("distance_weight", "angle_weight")}
    assert_official(case, batch.student.embedding, total(build("rkd", **weights), batch))


@pytest.mark.parametrize("images", [2, 3, 7])
def test_the_terms_are_smooth_l1_of_distances_and_angles(images):
    batch = random_batch(images=images)
    student, teacher = batch.student.embedding, batch.teacher.embedding
    terms = build("rkd", weight=2.0)(batch)
    distance = smooth_l1(distances_by_loops(student), distances_by_loops(teacher))
    angle = smooth_l1(angles_by_loops(student), angles_by_loops(teacher))
    assert terms["distance"].item() == pytest.approx(2 * 25 * distance, rel=1e-12, abs=1e-12)
    assert terms["angle"].item() == pytest.approx(2 * 50 * angle, rel=1e-12, abs=1e-12)


def test_a_term_without_weight_is_not_computed():
    batch = random_batch()
    assert list(build("rkd")(batch)) == ["distance", "angle"]
    assert list(build("rkd", angle_weight=0.0)(batch)) == ["distance"]
    assert list(build("rkd", distance_weight=0.0)(batch)) == ["angle"]


def test_equal_embeddings_have_no_loss_though_they_are_moved_rotated_and_scaled():
    teacher = vectors(0)
    moved = 0.03 * teacher @ rotation(6) + 5
    method = build("rkd")
    assert total(method, with_embeddings(teacher, teacher)).item() == 0
    assert total(method, with_embeddings(moved, teacher)).item() == pytest.approx(0, abs=1e-20)


def test_one_image_that_moves_away_does_matter():
    teacher = vectors(0)
    moved = teacher.clone()
    moved[2] += 1
    terms = build("rkd")(with_embeddings(moved, teacher))
    assert all(value > 0.01 for value in terms.values())


def test_the_same_image_twice_has_distance_zero_and_a_finite_gradient():
    student = vectors(0)
    student[3] = student[1]
    batch = with_embeddings(student.float(), vectors(1).float())
    distance = relative_distances(differences(student))
    assert distance[1, 3] == 0
    assert distance.sum() == pytest.approx(12)
    total(build("rkd", dtype=torch.float32), batch).backward()
    assert batch.student.embedding.grad.isfinite().all()
    assert batch.student.embedding.grad.abs().max() < 1e3


def test_near_vectors_far_from_zero_keep_their_digits_in_float32():
    near = (1000 + vectors(0)).float()
    for relation in (relative_distances, angles):
        found = relation(differences(near)).double()
        torch.testing.assert_close(found, relation(differences(near.double())), rtol=1e-5, atol=1e-6)
    loss = functional.smooth_l1_loss(relative_distances(differences(near)), relative_distances(differences(near)))
    assert loss == 0
