"""Methods: one, several, their terms and their random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vkd.divergences import make_divergence
from vkd.errors import ConfigError
from vkd.methods import METHODS, Batch, Method, MethodContext, Output, Progress, make_method


class Noisy(Method):
    """Two terms, drawn parameters, and a draw at every call."""

    def __init__(self, context: MethodContext, *, size: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)
        self.generator = context.generator

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        draw = torch.rand((), generator=self.generator)
        return {"noisy": batch.student.logits.sum() * 0 + draw, "other": batch.student.logits.square().mean()}


@pytest.fixture
def noisy(monkeypatch):
    """Two registered methods that differ in name alone."""
    for name in ("noisy", "twin"):
        monkeypatch.setitem(METHODS._entries, name, Noisy)


KD = {"weight": 0.9, "temperature_squared": True}


def context(temperature: float = 4.0, name: str = "fkld", **parameters) -> MethodContext:
    return MethodContext(
        divergence=make_divergence(name, temperature=temperature, **parameters),
        num_classes=5,
        train_size=100,
        epochs=2,
        steps_per_epoch=3,
        student=nn.Identity(),
        teacher=nn.Identity(),
        image_shape=(3, 8, 8),
        generator=torch.Generator().manual_seed(0),
    )


def batch(seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 6, 5, generator=random)
    targets = torch.randint(0, 5, (6,), generator=random)
    return Batch(
        Output(student.clone().requires_grad_()), Output(teacher), targets, torch.arange(6), Progress(1, 2, 1, 6)
    )


def softened(logits: torch.Tensor, temperature: float) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        exponentials = [math.exp(value / temperature) for value in row]
        rows.append([value / sum(exponentials) for value in exponentials])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("weight", [0.9, 32.0])
def test_kd_is_its_weight_times_the_softened_kl_and_t_squared_if_asked(temperature, squared, weight):
    example = batch()
    p = softened(example.teacher.logits, temperature)
    q = softened(example.student.logits, temperature)
    each = [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in zip(p, q, strict=True)]
    expected = weight * (temperature**2 if squared else 1) * sum(each) / 6
    method = make_method({"kd": {"weight": weight, "temperature_squared": squared}}, context(temperature), 1)
    terms = method(example)
    assert list(terms) == ["kd"]
    assert terms["kd"].item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_kd_is_the_textbook_one():
    example = batch()
    make_method({"kd": KD}, context(4.0), 1)(example)["kd"].backward()
    p, q = (torch.tensor(softened(output.logits, 4.0)) for output in (example.teacher, example.student))
    torch.testing.assert_close(example.student.logits.grad, 0.9 * 4.0 * (q - p) / 6, rtol=1e-4, atol=1e-6)


def test_kd_takes_any_divergence():
    example = batch()
    p, q = (torch.tensor(softened(output.logits, 2.0)) for output in (example.teacher, example.student))
    method = make_method({"kd": KD}, context(2.0, "abkd", alpha=1.0, beta=1.0), 1)
    expected = 0.9 * 4 * 0.5 * (p - q).square().sum(-1).mean()
    assert method(example)["kd"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures("noisy")
def test_the_sum_of_two_methods_has_the_terms_of_both():
    together = make_method({"kd": KD, "noisy": {}}, context(), 1)
    terms = together(batch())
    assert list(terms) == ["kd", "noisy", "noisy/other"]
    alone = {**make_method({"kd": KD}, context(), 1)(batch()), **make_method({"noisy": {}}, context(), 1)(batch())}
    assert {name: value.item() for name, value in terms.items()} == {n: v.item() for n, v in alone.items()}
    assert all(value.shape == () for value in terms.values())
    assert len(together) == 2


def test_no_method_has_no_terms():
    nothing = make_method({}, context(), 1)
    assert nothing(batch()) == {}
    assert len(nothing) == 0
    assert (nothing.needs_features, nothing.views) == (False, 1)


def test_the_most_demanding_method_decides_about_features_and_views(monkeypatch):
    class Wanting(Noisy):
        needs_features = True
        views = 3

    monkeypatch.setitem(METHODS._entries, "wanting", Wanting)
    both = make_method({"kd": KD, "wanting": {}}, context(), 1)
    assert (both.needs_features, both.views) == (True, 3)


@pytest.mark.usefixtures("noisy")
def test_parameters_and_draws_depend_on_the_seed_and_the_name_alone():
    def of(names, seed, name):
        torch.manual_seed(len(names) * 100 + seed)
        method = make_method({entry: KD if entry == "kd" else {} for entry in names}, context(), seed)
        chosen = method.methods[name]
        return chosen.layer.weight.tolist(), [chosen(batch())["noisy"].item() for _ in range(3)]

    alone = of(["noisy"], 1, "noisy")
    assert of(["kd", "twin", "noisy"], 1, "noisy") == alone
    assert of(["noisy", "twin"], 1, "noisy") == alone
    for other in (of(["noisy"], 2, "noisy"), of(["twin"], 1, "twin")):
        assert other[0] != alone[0]
        assert other[1] != alone[1]
    assert len(set(alone[1])) == 3


@pytest.mark.usefixtures("noisy")
def test_building_a_method_leaves_every_global_generator_alone(monkeypatch):
    def reseeded(*_arguments):
        raise AssertionError("the accelerators were reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    before = torch.get_rng_state()
    make_method({"noisy": {}, "twin": {}}, context(), 1)(batch())
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_method_is_named_with_the_nearest_ones():
    with pytest.raises(ConfigError, match="no method 'kdd'") as caught:
        make_method({"kdd": {}}, context(), 1)
    assert "kd" in str(caught.value).splitlines()[-1]
