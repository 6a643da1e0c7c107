"""Decoupled distillation: published values, the decomposition of KL, the warm-up, plain loops."""

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


@pytest.mark.parametrize("case", official_cases("dkd"), ids=lambda c: f"{c['alpha']}-T{c['temperature']}-e{c['epoch']}")
def test_the_published_losses_and_gradients_are_reproduced(case):
    keys = ("target_weight", "nontarget_weight", "warmup_epochs", "temperature_squared")
    assert_official(method("dkd", official_divergence(case), **{key: case[key] for key in keys}), case)


def softened(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_terms_are_those_of_plain_loops(temperature):
    student, teacher = random_logits(2, 6, 7)
    targets = torch.tensor([6, 0, 3, 3, 1, 6])
    expected = {"target": 0.0, "nontarget": 0.0}
    for s, t, target in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        p, q = softened(t, temperature), softened(s, temperature)
        expected["target"] += kl([p[target], 1 - p[target]], [q[target], 1 - q[target]]) / 6
        others = [k for k in range(7) if k != target]
        rest = [softened([row[k] for k in others], temperature) for row in (t, s)]
        expected["nontarget"] += kl(*rest) / 6
    subject = method("dkd", divergence("fkld", temperature), target_weight=2.0, nontarget_weight=5.0)
    terms = subject(batch(student, teacher, targets))
    assert list(terms) == ["target", "nontarget"]
    for name, weight in (("target", 2.0), ("nontarget", 5.0)):
        assert terms[name].item() == pytest.approx(weight * temperature**2 * expected[name], rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_target_part_and_the_rest_weighted_by_what_the_teacher_leaves_it(temperature):
    students, teachers = random_logits(2, 8, 10)
    plain = {"target_weight": 1.0, "nontarget_weight": 1.0, "temperature_squared": False}
    for sample in range(8):
        told = batch(students[sample : sample + 1], teachers[sample : sample + 1], torch.tensor([sample]))
        terms = method("dkd", divergence("fkld", temperature), **plain)(told)
        left = 1 - (teachers[sample] / temperature).softmax(-1)[sample]
        whole = divergence("fkld", temperature)(told.student.logits, told.teacher.logits)
        torch.testing.assert_close(terms["target"] + left * terms["nontarget"], whole, rtol=1e-11, atol=1e-14)


def test_the_weights_rise_over_the_warm_up_and_then_stay():
    student, teacher = random_logits(2, 6, 10)

    def at(epoch, warmup_epochs=20):
        return method("dkd", warmup_epochs=warmup_epochs)(batch(student, teacher, epoch=epoch))

    full = at(240)
    for epoch, factor in ((1, 1 / 20), (10, 0.5), (19, 0.95), (20, 1.0), (21, 1.0)):
        for name, value in at(epoch).items():
            torch.testing.assert_close(value, factor * full[name])
    for warmup_epochs in (0, 1):
        assert at(1, warmup_epochs) == full


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "fkld"])
def test_the_target_part_stays_forward_kl_unless_it_is_to_be_the_same(name):
    told = batch(*random_logits(2, 6, 10))
    forward = method("dkd", divergence("fkld", 4.0))(told)
    usual, same = (method("dkd", divergence(name, 4.0), target_divergence=choice)(told) for choice in ("fkld", "same"))
    assert usual["target"] == forward["target"]
    assert usual["nontarget"] != forward["nontarget"]
    assert same["nontarget"] == usual["nontarget"]
    p, q = (
        (output.logits / 4).softmax(-1).gather(-1, told.targets[:, None]) for output in (told.teacher, told.student)
    )
    two_way = [torch.cat([share, 1 - share], dim=-1).log() for share in (q, p)]
    torch.testing.assert_close(same["target"], 16 * divergence(name)(*two_way), rtol=1e-9, atol=0)


def test_the_logit_of_the_target_takes_no_part_in_the_rest():
    student, teacher = random_logits(2, 6, 10)
    told = batch(student, teacher)
    moved = student.clone()
    moved[torch.arange(6), told.targets] += 7.0
    one, other = (method("dkd")(batch(logits, teacher)) for logits in (student, moved))
    assert one["nontarget"] == other["nontarget"]
    assert one["target"] != other["target"]
    _, gradient = value_and_gradient(method("dkd", target_weight=0.0), told)
    assert not gradient[torch.arange(6), told.targets].any()


def test_two_classes_leave_the_rest_nothing_to_tell():
    student, teacher = random_logits(2, 6, 2)
    terms = method("dkd", divergence("fkld", 4.0), classes=2)(batch(student, teacher))
    assert terms["nontarget"] == 0
    torch.testing.assert_close(terms["target"], 16 * divergence("fkld", 4.0)(student, teacher))


def test_a_target_probability_that_underflows_keeps_its_exact_loss():
    # Both masses are 0 or 1 in float32 at a gap of 150 temperatures; the divergence of the two-way logits is not.
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    student[0, 1], teacher[0, 0] = 600.0, 600.0
    value = method("dkd", divergence("fkld", 4.0))(batch(student, teacher, torch.tensor([0])))["target"]
    assert value.item() == pytest.approx(16 * 150.0, rel=1e-6)


def test_an_unknown_comparison_of_the_target_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="target_divergence=rkld") as caught:
        method("dkd", target_divergence="rkld")
    assert "fkld, or same" in str(caught.value)
