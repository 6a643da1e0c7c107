"""What methods get beside logits: features, further views, and a teacher with an image size of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from toys import CHANNELS, CLASSES, CPU, SIZE, recipe, rig, toy_data

from vkd.config import Config, TeacherConfig
from vkd.data import Normalization
from vkd.methods import Combination, Method, Output, Progress
from vkd.models import Intermediates, create_model
from vkd.training import teacher as teachers
from vkd.training.learner import Learner
from vkd.training.precision import Precision
from vkd.training.teacher import Teacher, freeze, teacher_identity, teacher_normalization

ARCH = "cifar_resnet8_width4"


class Watching(Method):
    """Keeps what it was given, and asks for nothing of the student."""

    needs_features = True
    views = 2

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, batch):
        self.seen.append(batch)
        return {"watching": batch.student.logits.square().mean()}


def network(seed: int = 0):
    return create_model(ARCH, num_classes=CLASSES, in_channels=CHANNELS, image_size=SIZE, seed=seed)


def frozen(data, *, precision: str = "fp32", image_size=None) -> Teacher:
    model = network(5).eval().requires_grad_(False)
    normalization = Normalization(data.mean, data.std, data.channels, image_size=image_size)
    return Teacher(
        model=model,
        normalization=normalization,
        shares_normalization=image_size is None,
        precision=Precision(precision, CPU),
        arch=ARCH,
        source="checkpoint",
        sha256="0",
        saw_val="unknown",
    )


def watched(precision: str = "fp32") -> tuple[Learner, Watching]:
    student, method = network(1), Watching()
    learner = Learner(
        student,
        Combination({"watching": method}),
        recipe(),
        precision=Precision(precision, CPU),
        cross_entropy_weight=0.1,
        seed=1,
        device=CPU,
        intermediates=Intermediates(student, (CHANNELS, *SIZE), arch=ARCH),
    )
    return learner, method


def step(learner: Learner, count: int = 4, views=()):
    images = torch.randn(count, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(2))
    teacher = Output(torch.zeros(count, CLASSES))
    indices = torch.arange(count)
    learner.step(images, teacher, indices % CLASSES, indices, Progress(1, 3, 1, 12), views)
    return images


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_students_features_are_float32_with_a_gradient_and_belong_to_its_logits(precision):
    learner, method = watched(precision)
    step(learner)
    output = method.seen[0].student
    assert [tuple(entry.shape) for entry in output.features] == [(4, 4, 6, 6), (4, 4, 3, 3), (4, 4, 2, 2)]
    for tensor in (output.logits, output.embedding, *output.features):
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad
    torch.testing.assert_close(output.embedding, output.features[-1].mean(dim=(2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teachers_features_come_without_a_gradient_and_leave_it_as_it_was(tmp_path, precision):
    data = toy_data(tmp_path)
    teacher = frozen(data, precision=precision)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    pixels = data.images("test")
    plain = teacher(pixels, Normalization(data.mean, data.std, data.channels)(pixels))
    assert (plain.features, plain.embedding) == ([], None)
    teacher.intermediates = Intermediates(teacher.model, (CHANNELS, *SIZE), arch=ARCH)
    output = teacher(pixels, Normalization(data.mean, data.std, data.channels)(pixels))
    assert torch.equal(output.logits, plain.logits)
    assert len(output.features) == 3
    for tensor in (output.logits, output.embedding, *output.features):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_method_of_two_views_gets_both_networks_on_the_second_one():
    learner, method = watched()
    view = torch.randn(4, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(3))
    teacher = Output(torch.ones(4, CLASSES))
    step(learner, views=[(view, teacher)])
    ((student, told),) = method.seen[0].views
    assert told is teacher
    assert student.logits.requires_grad
    assert len(student.features) == 3
    assert not torch.equal(student.logits, method.seen[0].student.logits)


def test_a_method_of_one_view_is_not_given_what_another_student_of_the_same_loop_wants():
    learner, method = watched()
    method.views = 1
    step(learner, views=[(torch.zeros(4, CHANNELS, *SIZE), Output(torch.ones(4, CLASSES)))])
    assert method.seen[0].views == []


def test_the_trainer_asks_the_data_for_as_many_views_as_the_method_wants(tmp_path, monkeypatch):
    data = toy_data(tmp_path)
    asked = []
    original = type(data).train_batches

    def spying(self, *, views=1, **options):
        asked.append(views)
        return original(self, views=1, **options)

    monkeypatch.setattr(type(data), "train_batches", spying)
    method = Watching()
    method.views = 1
    rig(data, recipe(epochs=1), method=Combination({"watching": method})).trainer.fit()
    method.views = 3
    rig(data, recipe(epochs=1), method=Combination({"watching": method})).trainer.fit()
    assert asked == [1, 3]


def test_a_teacher_of_another_image_size_sees_the_same_view_resized(tmp_path):
    data = toy_data(tmp_path)
    teacher = frozen(data, image_size=(12, 10))
    pixels = data.images("test")
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    resized = functional.interpolate((pixels / 255 - mean) / std, (12, 10), mode="bilinear", antialias=True)
    told = teacher(pixels, torch.full((len(pixels), CHANNELS, *SIZE), float("nan")))
    torch.testing.assert_close(told.logits, teacher.model(resized), rtol=1e-4, atol=1e-5)
    teacher.intermediates = Intermediates(teacher.model, (CHANNELS, 12, 10), arch=ARCH)
    assert teacher(pixels, pixels).features[0].shape[1:] == (4, 12, 10)


def test_the_image_size_of_a_teacher_is_its_configs_else_its_pretrained_weights_else_the_datas(tmp_path, monkeypatch):
    data, model = toy_data(tmp_path), network()
    monkeypatch.setattr(teachers, "pretrained_image_size", lambda arch: (24, 20))

    def size(**teacher):
        return teacher_normalization(TeacherConfig(arch=ARCH, **teacher), model, data).image_size

    assert size(checkpoint="x") is None
    assert size(checkpoint="x", image_size=12) == (12, 12)
    assert size(pretrained=True) == (24, 20)
    assert size(pretrained=True, image_size=12) == (12, 12)
    assert size(checkpoint="x", image_size=SIZE[0]) is None


def test_a_teacher_that_resizes_is_measured_at_its_size_and_another_teacher_in_the_fingerprint(tmp_path):
    data = toy_data(tmp_path)
    config = Config(teacher=TeacherConfig(arch=ARCH, checkpoint="x", image_size=12, allow_chance_accuracy=True))
    teacher = freeze(network(5), config, data, source="checkpoint", sha256="0", saw_val="unknown", device=CPU)
    assert not teacher.shares_normalization
    pixels = data.images("test")
    torch.testing.assert_close(teacher.logits["test"], teacher(pixels, pixels).logits, rtol=1e-4, atol=1e-5)
    plain = Normalization(data.mean, data.std, data.channels)
    weights = {"sha256": "0"}
    assert "image_size" not in teacher_identity(ARCH, plain, weights)
    assert teacher_identity(ARCH, teacher.normalization, weights)["image_size"] == [12, 12]
