"""Curriculum temperature: the gradient of the temperature by both softmaxes, its reversal, the dual divergences."""

from __future__ import annotations

import math

import pytest
import torch
from logit_cases import DIVERGENCES, batch, divergence, method, plain_divergence, random_logits, value_and_gradient

from vkd import divergences
from vkd.divergences import Divergence, make_divergence
from vkd.errors import ConfigError

every = pytest.mark.parametrize("name", DIVERGENCES)
scopes = pytest.mark.parametrize("scope", ["global", "instance"])


# ---------------------------------------------------------------------------------------------- dual divergences


def test_every_divergence_has_a_dual():
    assert set(divergences.DUALS) == set(divergences.DIVERGENCES) == set(DIVERGENCES)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*DIVERGENCES.items(), ("abkd", {"alpha": 1.2, "beta": -0.3, "match_kl_scale": True}), ("skew_fkld", {})],
)
def test_the_dual_is_the_divergence_with_its_arguments_exchanged(name, parameters):
    one, other = random_logits(2, 6, 10)
    subject = make_divergence(name, temperature=3.0, **parameters)
    for reduction in ("none", "mean", "sum"):
        value, dual = subject(one, other, reduction=reduction), subject.dual(other, one, reduction=reduction)
        torch.testing.assert_close(dual, value, rtol=1e-11, atol=0)
    assert subject.dual.temperature == 3.0
    assert subject.dual.dual == subject


@every
def test_the_dual_has_the_gradient_by_the_teachers_logits(name):
    student, teacher = random_logits(2, 6, 10)
    logits = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(name, 3.0).dual(logits, student), logits)
    plain = plain_divergence(name, (student / 3).softmax(-1), (logits / 3).softmax(-1)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, logits)[0], rtol=1e-9, atol=1e-13)


def test_a_divergence_without_a_known_dual_is_refused_with_the_place_to_name_it(monkeypatch):
    monkeypatch.delitem(divergences.DUALS, "js")
    with pytest.raises(ConfigError, match="'js' by the teacher's logits is not known") as caught:
        method("ctkd", Divergence("js"))
    assert "vkd.divergences.DUALS" in str(caught.value)


# ---------------------------------------------------------------------------------------------- value and gradient


def plain_loss(name, student, teacher, temperature, squared):
    """The mean over the samples of T^2 D, for temperatures [B, 1], by the definition of D."""
    each = plain_divergence(name, (student / temperature).softmax(-1), (teacher / temperature).softmax(-1))
    return ((temperature.squeeze(-1) ** 2 if squared else 1.0) * each).mean()


def reversal(epoch: int, epochs: int = 10, largest: float = 1.0) -> float:
    return largest * (1 - math.cos(math.pi * min(epoch, epochs) / epochs)) / 2


@every
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("raw", [-4.0, 1.0, 3.0])
def test_the_global_temperature_climbs_the_loss_by_both_softmaxes(name, squared, raw):
    student, teacher = random_logits(2, 6, 10)
    subject = method("ctkd", divergence(name), weight=0.9, temperature_squared=squared).double()
    with torch.no_grad():
        subject.raw_temperature.fill_(raw)
    logits = student.clone().requires_grad_()
    value = subject(batch(logits, teacher, epoch=7))["ctkd"]
    value.backward()

    x = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
    same_logits = student.clone().requires_grad_()
    temperature = (1 + 20 * x.sigmoid()).expand(6, 1)
    expected = 0.9 * plain_loss(name, same_logits, teacher, temperature, squared)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, same_logits.grad, rtol=1e-7, atol=1e-13)
    assert subject.raw_temperature.grad.item() == pytest.approx(-reversal(7) * x.grad.item(), rel=1e-7)


@every
@pytest.mark.parametrize("squared", [True, False])
def test_the_temperature_of_a_sample_climbs_the_loss_of_that_sample(name, squared):
    student, teacher = random_logits(2, 6, 10)
    subject = method("ctkd", divergence(name), scope="instance", weight=0.9, temperature_squared=squared).double()
    first, last = subject.network[0], subject.network[2]
    assert (first.in_features, first.out_features, last.out_features) == (20, 256, 1)
    with torch.no_grad():
        last.weight.copy_(torch.randn(1, 256, generator=torch.Generator().manual_seed(5)))
    logits = student.clone().requires_grad_()
    value = subject(batch(logits, teacher, epoch=3))["ctkd"]
    value.backward()

    weights = [parameter.detach().clone().requires_grad_() for parameter in subject.parameters()]
    both = torch.cat([student.softmax(-1), teacher.softmax(-1)], dim=-1)
    raw = (both @ weights[0].t() + weights[1]).clamp(min=0) @ weights[2].t() + weights[3]
    same_logits = student.clone().requires_grad_()
    expected = 0.9 * plain_loss(name, same_logits, teacher, 1 + 20 * raw.sigmoid(), squared)
    gradients = torch.autograd.grad(expected, [same_logits, *weights])
    assert raw.std() > 0.05
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, gradients[0], rtol=1e-7, atol=1e-13)
    for parameter, gradient in zip(subject.parameters(), gradients[1:], strict=True):
        torch.testing.assert_close(parameter.grad, -reversal(3) * gradient, rtol=1e-6, atol=1e-12)


@scopes
def test_the_temperature_starts_where_it_should(scope):
    student, teacher = random_logits(2, 6, 10)
    temperature = 1 + 20 / (1 + math.exp(-1.0)) if scope == "global" else 11.0
    value = method("ctkd", scope=scope, weight=1.0)(batch(student, teacher))["ctkd"]
    expected = temperature**2 * divergence("fkld", temperature)(student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@scopes
def test_the_student_learns_as_if_the_temperature_were_fixed(scope):
    student, teacher = random_logits(2, 6, 10)
    subject = method("ctkd", scope=scope)
    _, gradient = value_and_gradient(subject, batch(student, teacher, epoch=5))
    _, again = value_and_gradient(method("ctkd", scope=scope, reversal_weight=0.0), batch(student, teacher))
    torch.testing.assert_close(gradient, again, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- the reversal


def gradient_of_temperature(epoch: int, **changed) -> float:
    subject = method("ctkd", **changed).double()
    subject(batch(*random_logits(2, 6, 10), epoch=epoch))["ctkd"].backward()
    return subject.raw_temperature.grad.item()


def test_the_reversal_rises_along_a_cosine_and_stays():
    full = gradient_of_temperature(240)
    for epoch in (1, 2, 5, 9, 10, 11, 100):
        assert gradient_of_temperature(epoch) == pytest.approx(reversal(epoch) * full, rel=1e-9)
    assert gradient_of_temperature(5) == pytest.approx(full / 2)
    assert gradient_of_temperature(20, reversal_epochs=40) == pytest.approx(full / 2)
    assert gradient_of_temperature(1, reversal_epochs=0) == pytest.approx(full)
    assert gradient_of_temperature(240, reversal_weight=0.25) == pytest.approx(full / 4)


@scopes
def test_a_step_of_the_optimizer_makes_the_task_harder(scope):
    told = batch(*random_logits(2, 6, 10))
    subject = method("ctkd", scope=scope)
    optimizer = torch.optim.SGD(subject.parameters(), lr=0.01)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = subject(told)["ctkd"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scope": "sample"}, r"method\.ctkd\.scope=sample is not a choice"),
        ({"minimum_temperature": 0.0}, "temperatures from 0.0 on"),
        ({"temperature_range": -1.0}, "over a range of -1.0"),
    ],
)
def test_values_out_of_range_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        method("ctkd", **changed)
