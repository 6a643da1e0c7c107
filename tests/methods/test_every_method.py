"""Every method with every divergence that it takes, in both precisions, for twenty real steps."""

from __future__ import annotations

import copy
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml

from vkd.config import DatasetConfig, RecipeConfig, config_directory, typed_parameters
from vkd.data import Normalization, load_data
from vkd.divergences import DIVERGENCES, make_divergence
from vkd.methods import METHODS, Combination, MethodContext, Progress, make_method
from vkd.models import Intermediates, create_model
from vkd.training.learner import Learner
from vkd.training.precision import Precision
from vkd.training.teacher import Teacher

CPU = torch.device("cpu")
STUDENT, TEACHER = "cifar_resnet8_width4", "cifar_resnet8"
STEPS, EPOCHS, BATCH_SIZE = 20, 3, 25
COMBINATIONS = [
    (name, divergence) for name in METHODS for divergence in (DIVERGENCES if METHODS[name].uses_divergence else [None])
]


def choice(group: str, name: str) -> dict:
    return yaml.safe_load(Path(config_directory(), group, f"{name}.yaml").read_text())


@cache
def digits():
    config = {"val_fraction": 0.2, **choice("dataset", "digits")["dataset"]}
    return load_data(DatasetConfig(**config), "data", device=CPU, views=2)


def normalization() -> Normalization:
    return Normalization(digits().mean, digits().std, 1)


def network(arch: str, seed: int):
    return create_model(arch, num_classes=10, in_channels=1, image_size=(8, 8), seed=seed)


def learner(student, method, precision="fp32", intermediates=None, cross_entropy_weight=1.0) -> Learner:
    recipe = RecipeConfig(epochs=EPOCHS, batch_size=BATCH_SIZE, optimizer="momentum", learning_rate=0.02)
    return Learner(
        student,
        method,
        recipe,
        precision=Precision(precision, CPU),
        cross_entropy_weight=cross_entropy_weight,
        seed=1,
        device=CPU,
        intermediates=intermediates,
    )


def steps(epoch: int, views: int = 1):
    batches = digits().train_batches(seed=1, epoch=epoch, batch_size=BATCH_SIZE, drop_last=True, views=views)
    for step, batch in enumerate(islice(batches, STEPS), start=1):
        yield batch, Progress(epoch, EPOCHS, (epoch - 1) * STEPS + step, EPOCHS * STEPS)


@cache
def trained_teacher():
    """A network that knows most digits."""
    model = network(TEACHER, 3)
    plain = learner(model, Combination({}))
    for epoch in range(1, 7):
        for batch, progress in steps(epoch):
            plain.step(normalization()(batch.images), None, batch.targets, batch.indices, progress)
    model.zero_grad()
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "divergence"), COMBINATIONS)
def test_twenty_steps_are_finite_lower_the_loss_and_leave_the_teacher_alone(name, divergence, precision):
    kind = METHODS[name]
    model = trained_teacher()
    before = copy.deepcopy(model.state_dict())
    student = network(STUDENT, 1)
    watched = Intermediates(student, (1, 8, 8), arch=STUDENT) if kind.needs_features else None
    teacher = Teacher(
        model=model,
        normalization=normalization(),
        shares_normalization=True,
        precision=Precision(precision, CPU),
        arch=TEACHER,
        source="trained",
        sha256="0",
        saw_val=False,
        intermediates=Intermediates(model, (1, 8, 8), arch=TEACHER) if kind.needs_features else None,
    )
    context = MethodContext(
        divergence=None if divergence is None else make_divergence(**choice("divergence", divergence)),
        num_classes=10,
        train_size=digits().train_size,
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        student=student,
        teacher=model,
        image_shape=(1, 8, 8),
        generator=torch.Generator().manual_seed(1),
        student_features=None if watched is None else watched.shapes,
        teacher_features=None if teacher.intermediates is None else teacher.intermediates.shapes,
        train_targets=digits().train_targets,
    )
    parameters = typed_parameters(kind, choice("method", name), where=f"method.{name}")
    subject = learner(student, make_method({name: parameters}, context, 1), precision, watched, 0.1)
    losses = []
    for batch, progress in steps(1, views=kind.views):
        (images, told), *others = [
            (normalization()(pixels), teacher(pixels, normalization()(pixels)))
            for pixels in (batch.images, *batch.views)
        ]
        subject.start_epoch_sums()
        subject.step(images, told, batch.targets, batch.indices, progress, others)
        subject.check_finite()
        losses.append(subject.epoch_figures()["loss"])
    assert len(losses) == STEPS
    assert all(torch.isfinite(parameter).all() for parameter in subject.parameters)
    assert sum(losses[-5:]) < sum(losses[:5])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_method_and_every_divergence_has_a_config_of_its_name():
    for group, registry in (("method", METHODS), ("divergence", DIVERGENCES)):
        files = {path.stem for path in Path(config_directory(), group).glob("*.yaml")} - {"none"}
        assert files == set(registry)
