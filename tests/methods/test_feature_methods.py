"""What holds for every method that compares features: its config, its gradients, hard batches, real networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from feature_cases import build, configured, context, make_batch, output, random_batch, total
from torch import Tensor

from vkd.config import typed_parameters
from vkd.methods import METHODS, Output
from vkd.models import Intermediates, create_model

SETTINGS = {
    "fitnet": {"weight": 100.0, "stage": None, "relu": True},
    "at": {"weight": 1000.0, "power": 2.0},
    "nst": {"weight": 50.0},
    "sp": {"weight": 3000.0},
    "pkt": {"weight": 30000.0},
    "rkd": {"weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0},
    "cc": {"weight": 0.02, "embedding_size": 128},
    "vid": {"weight": 1.0, "initial_variance": 5.0},
}
LEARNING = {"fitnet", "cc", "vid"}
SIZE = 32
PAIRS = [
    ("cifar_resnet8", "cifar_resnet20"),
    ("cifar_resnet8", "resnet10t"),
    ("cifar_resnet8", "vit_tiny_patch16_224"),
    ("mobilenetv3_small_050", "cifar_resnet14"),
]
every = pytest.mark.parametrize("name", SETTINGS)


@every
def test_the_config_has_the_literatures_settings_for_exactly_the_methods_parameters(name):
    typed = typed_parameters(METHODS[name], configured(name), where=f"method.{name}")
    assert typed == SETTINGS[name]
    assert METHODS[name].needs_features


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_named_scalars_of_the_features_type(name, dtype):
    terms = build(name, dtype=dtype)(random_batch(dtype=dtype))
    assert set(terms) == ({"distance", "angle"} if name == "rkd" else {name})
    assert all(value.shape == () and value.dtype == dtype and value.isfinite() for value in terms.values())


@every
def test_the_weight_multiplies_every_term(name):
    batch = random_batch()
    once, thrice = build(name, weight=1.0)(batch), build(name, weight=3.0)(batch)
    assert {term: 3 * value.item() for term, value in once.items()} == pytest.approx(
        {term: value.item() for term, value in thrice.items()}
    )


@every
def test_the_student_and_every_parameter_get_a_gradient_and_the_teacher_none(name):
    batch = random_batch()
    method = build(name)
    total(method, batch).backward()
    reached = [entry.grad for entry in (*batch.student.features, batch.student.embedding) if entry.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in reached)
    assert all(entry.grad is None for entry in (*batch.teacher.features, batch.teacher.embedding))
    assert bool(list(method.parameters())) == (name in LEARNING)
    assert all(entry.grad is not None for entry in method.parameters())
    assert sum(entry.grad.abs().sum() for entry in method.parameters()) > 0 or name not in LEARNING


@every
def test_the_gradient_is_that_of_the_loss(name):
    where = context([(3, 4, 4), (4, 2, 1)], [(2, 2, 2), (3, 2, 2)], student_embedding=3, teacher_embedding=4)
    batch = random_batch(where, images=3)
    # BatchNorm changes its running statistics at every call in training mode.
    method = build(name, where, weight=1.0).eval()
    features = [*batch.student.features, batch.student.embedding]

    def loss(*leaves):
        return total(method, make_batch(Output(batch.student.logits, list(leaves[:-1]), leaves[-1]), batch.teacher))

    assert torch.autograd.gradcheck(loss, features, eps=1e-6, atol=1e-6, rtol=1e-4)


def changed(side: Output, change: Callable[[Tensor], Tensor]) -> Output:
    return output([change(entry.detach()) for entry in side.features], change(side.embedding.detach()))


def as_it_is(entry: Tensor) -> Tensor:
    return entry


def one_image_throughout(entry: Tensor) -> Tensor:
    return entry[:1].expand_as(entry)


def one_image_twice(entry: Tensor) -> Tensor:
    return torch.cat([entry[:1], entry[:-1]])


def one_image_of_zeros(entry: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(entry[:1]), entry[1:]])


def a_dead_channel(entry: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(entry[:, :1]), entry[:, 1:]], dim=1)


# What happens to the student's features and to the teacher's.
HARD = {
    "a student of zeros": (torch.zeros_like, as_it_is),
    "a teacher of zeros": (as_it_is, torch.zeros_like),
    "zeros on both sides": (torch.zeros_like, torch.zeros_like),
    "the same image throughout": (one_image_throughout, one_image_throughout),
    "a student to which all images are one": (one_image_throughout, as_it_is),
    "a teacher to which all images are one": (as_it_is, one_image_throughout),
    "an image twice": (one_image_twice, one_image_twice),
    "an image of zeros": (one_image_of_zeros, as_it_is),
    "a dead channel": (a_dead_channel, as_it_is),
    "a constant": (torch.ones_like, as_it_is),
}


def loss_and_largest_gradient(name: str, student: Output, teacher: Output) -> tuple[float, float]:
    method = build(name, dtype=torch.float32, weight=1.0)
    loss = total(method, make_batch(student, teacher))
    loss.backward()
    found = [*student.features, student.embedding, *method.parameters()]
    gradients = [entry.grad.flatten() for entry in found if entry.grad is not None]
    return loss.item(), torch.cat(gradients).abs().max().item()


@every
@pytest.mark.parametrize("images", [2, 5])
@pytest.mark.parametrize("kind", HARD)
def test_loss_and_gradient_stay_finite_and_small_on_hard_batches(name, images, kind):
    batch = random_batch(images=images, dtype=torch.float32)
    sides = (changed(side, change) for side, change in zip((batch.student, batch.teacher), HARD[kind], strict=True))
    loss, gradient = loss_and_largest_gradient(name, *sides)
    assert math.isfinite(loss)
    assert gradient < 100


@every
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_loss_and_gradient_are_finite_whatever_the_size_of_the_features(name, size):
    batch = random_batch(dtype=torch.float32)
    found = loss_and_largest_gradient(name, *(changed(s, lambda x: size * x) for s in (batch.student, batch.teacher)))
    assert all(math.isfinite(value) for value in found)


@every
def test_nothing_waits_for_the_device(name):
    # Reading a value of a tensor on this device, which has none, raises an error.
    batch = random_batch(dtype=torch.float32)
    sides = [changed(side, lambda entry: entry.to("meta")) for side in (batch.student, batch.teacher)]
    method = build(name, dtype=torch.float32).to("meta")
    total(method, make_batch(*sides)).backward()


@every
def test_it_can_be_copied_and_its_state_restores_it(name):
    batch = random_batch()
    method = build(name)
    twin = copy.deepcopy(method)
    method(batch)
    assert total(twin, batch) == total(method, batch)
    other = build(name)
    other.load_state_dict(method.state_dict())
    assert total(other, batch) == total(method, batch)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def networks(request):
    """The archs, the networks and one batch of images."""
    pair = [
        create_model(arch, num_classes=5, image_size=(SIZE, SIZE), seed=seed) for seed, arch in enumerate(request.param)
    ]
    return request.param, pair, torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@every
def test_real_networks_of_any_family_learn_by_it(name, networks):
    archs, pair, images = networks
    student, teacher = copy.deepcopy(pair[0]).train(), pair[1].eval()
    run, run_teacher = (
        Intermediates(network, (3, SIZE, SIZE), arch=arch)
        for network, arch in zip((student, teacher), archs, strict=True)
    )
    where = replace(context(), student_features=run.shapes, teacher_features=run_teacher.shapes)
    method = build(name, where, dtype=torch.float32)
    with torch.no_grad():
        told = Output(*run_teacher(images))
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = total(method, make_batch(Output(*run(images)), told))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stem = next(student.parameters())
    assert stem.grad.isfinite().all()
    assert stem.grad.abs().max() > 0
