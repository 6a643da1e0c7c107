"""DIST: published values, plain loops, what a correlation is blind to, constant rows."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from logit_cases import assert_official, batch, method, official_cases, random_logits, value_and_gradient

from vkd.errors import ConfigError


@pytest.mark.parametrize("case", official_cases("dist"), ids=["inter-and-intra"])
def test_the_published_loss_and_gradient_are_reproduced(case):
    keys = ("inter_weight", "intra_weight", "temperature")
    assert_official(method("dist", **{key: case[key] for key in keys}), case)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_terms_are_those_of_plain_loops(temperature):
    logits = random_logits(2, 6, 5)
    q, p = (
        [[math.exp(value / temperature) / sum(math.exp(v / temperature) for v in row) for value in row] for row in rows]
        for rows in (tensor.tolist() for tensor in logits)
    )
    inter = statistics.mean(1 - statistics.correlation(a, b) for a, b in zip(q, p, strict=True))
    columns = zip(zip(*q, strict=True), zip(*p, strict=True), strict=True)
    intra = statistics.mean(1 - statistics.correlation(a, b) for a, b in columns)
    terms = method("dist", inter_weight=2.0, intra_weight=3.0, temperature=temperature)(batch(*logits))
    assert list(terms) == ["inter", "intra"]
    assert terms["inter"].item() == pytest.approx(2 * temperature**2 * inter, rel=1e-5)
    assert terms["intra"].item() == pytest.approx(3 * temperature**2 * intra, rel=1e-5)


def test_outputs_that_only_correlate_are_as_good_as_equal_ones():
    (teacher,) = random_logits(1, 6, 10)
    p = teacher.softmax(-1)
    blurred = (0.6 * p + 0.04).log()
    for student in (teacher, blurred):
        value, gradient = value_and_gradient(method("dist", temperature=1.0), batch(student, teacher))
        assert abs(value) < 1e-5
        assert gradient.abs().max() < 1e-5
    sharper, _ = value_and_gradient(method("dist", temperature=1.0), batch(3 * teacher, teacher))
    assert sharper > 1e-3


def test_a_constant_row_correlates_with_nothing():
    (teacher,) = random_logits(1, 6, 10)
    flat = torch.zeros(6, 10, dtype=torch.float64)
    for student, told in ((flat, teacher), (teacher, flat)):
        terms = method("dist", temperature=4.0)(batch(student, told))
        assert [value.item() for value in terms.values()] == pytest.approx([16.0, 16.0])


def test_a_student_whose_logits_are_constant_learns():
    (teacher,) = random_logits(1, 6, 10)
    student = torch.zeros(6, 10, dtype=torch.float64)
    for _ in range(300):
        value, gradient = value_and_gradient(method("dist"), batch(student, teacher))
        student = student - 0.02 * gradient
    assert value < 0.05 * 32


def test_a_batch_of_one_has_no_relation_within_a_class_and_no_gradient_from_it():
    told = batch(*random_logits(2, 1, 10))
    terms = method("dist")(told)
    assert terms["intra"].item() == pytest.approx(16.0)
    _, gradient = value_and_gradient(method("dist", inter_weight=0.0), told)
    assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.0, -4.0])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(ConfigError, match=rf"method\.dist\.temperature={temperature} is not above 0"):
        method("dist", temperature=temperature)
