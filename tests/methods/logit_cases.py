"""What the tests of the methods that compare logits share: contexts, batches, published values, plain formulas."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from vkd.config import config_directory, typed_parameters
from vkd.divergences import make_divergence
from vkd.methods import METHODS, Batch, Method, MethodContext, Output, Progress

OFFICIAL = json.loads((Path(__file__).parent.parent / "reference" / "official_losses.json").read_text())

DIVERGENCES = {
    "fkld": {},
    "rkld": {},
    "abkd": {"alpha": 0.8, "beta": 0.3},
    "js": {},
    "skew_fkld": {"skew": 0.1},
    "skew_rkld": {"skew": 0.3},
    "tvd": {},
}
"""Every divergence with parameters."""


def divergence(name: str = "fkld", temperature: float = 1.0, **parameters):
    return make_divergence(name, temperature=temperature, **(parameters or DIVERGENCES[name]))


def configured(name: str, **changed) -> dict:
    """The parameters in the method's file in `conf`, less what is changed."""
    values = yaml.safe_load((config_directory() / "method" / f"{name}.yaml").read_text())
    return typed_parameters(METHODS[name], {**values, **changed}, where=f"method.{name}")


def method(name: str, compared_by=None, *, classes: int = 10, **changed) -> Method:
    """The method with its parameters in `conf`, less what is changed, drawn from the same seed each time."""
    context = MethodContext(
        divergence=compared_by or divergence(),
        num_classes=classes,
        train_size=100,
        epochs=240,
        steps_per_epoch=3,
        student=nn.Identity(),
        teacher=nn.Identity(),
        image_shape=(3, 8, 8),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return METHODS[name](context, **configured(name, **changed))


def random_logits(count: int, *shape: int, seed: int = 0, scale: float = 2.0) -> list[Tensor]:
    """Tensors of float64 logits."""
    random = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=random, dtype=torch.float64) for _ in range(count)]


def batch(student: Tensor, teacher: Tensor, targets: Tensor | None = None, *, epoch: int = 240, further=()) -> Batch:
    """A batch of these logits; without targets, sample i is of class i. `further` holds more such pairs of logits."""
    if targets is None:
        targets = torch.arange(len(student)) % student.shape[-1]
    views = [(Output(one), Output(other)) for one, other in further]
    progress = Progress(epoch, 240, 3 * epoch, 720)
    return Batch(Output(student), Output(teacher), targets, torch.arange(len(student)), progress, views)


def official_batch(dtype: torch.dtype, epoch: int) -> Batch:
    student, teacher = (torch.tensor(OFFICIAL[name], dtype=dtype) for name in ("student_logits", "teacher_logits"))
    return batch(student, teacher, torch.tensor(OFFICIAL["targets"]), epoch=epoch)


def value_and_gradient(subject: Method, example: Batch) -> tuple[Tensor, Tensor]:
    """The sum of a method's terms, and its gradient by the student's logits on the first view."""
    logits = example.student.logits.detach().clone().requires_grad_()
    example.student.logits = logits
    total = sum(subject(example).values())
    (gradient,) = torch.autograd.grad(total, logits, allow_unused=True)
    return total.detach(), torch.zeros_like(logits) if gradient is None else gradient


def assert_official(subject: Method, case: dict) -> None:
    """The published loss and gradient, to 1e-9 in float64 and 1e-5 in float32."""
    expected = torch.tensor(case["grad"], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        value, gradient = value_and_gradient(subject, official_batch(dtype, case.get("epoch", 240)))
        assert (value.dtype, gradient.dtype) == (dtype, dtype)
        assert abs(value.item() - case["loss"]) <= tolerance * case["loss"]
        assert (gradient.double() - expected).norm() <= tolerance * expected.norm()


def official_cases(name: str) -> list[dict]:
    return [case for case in OFFICIAL["method_cases"] if case["method"] == name]


def official_divergence(case: dict):
    if "alpha" not in case:
        return divergence("fkld", case.get("temperature", 1.0))
    return divergence("abkd", case.get("temperature", 1.0), alpha=case["alpha"], beta=case["beta"])


def plain_divergence(name: str, q: Tensor, p: Tensor) -> Tensor:
    """A divergence of distributions [..., C] by its definition, for autograd to differentiate by both: [...]."""

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x / y).log()).sum(dim=-1)

    parameters = DIVERGENCES[name]
    if name == "fkld":
        return kl(p, q)
    if name == "rkld":
        return kl(q, p)
    if name == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    if name == "skew_fkld":
        return kl(p, parameters["skew"] * p + (1 - parameters["skew"]) * q)
    if name == "skew_rkld":
        return kl(q, parameters["skew"] * q + (1 - parameters["skew"]) * p)
    if name == "tvd":
        return (p - q).abs().sum(dim=-1) / 2
    a, b = parameters["alpha"], parameters["beta"]
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(dim=-1) / (a * b)
