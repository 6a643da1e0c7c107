"""The teacher: judged, frozen, described, and found again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from toys import CHANNELS, CPU, TinyNetwork, configured, recipe, toy_data, write_images

from vkd.config import Config, DatasetConfig, StudentConfig, TeacherConfig, TrackerConfig
from vkd.data import load_data
from vkd.errors import ConfigError, ModelError
from vkd.models import create_model, save_weights, weights_sha256
from vkd.training.run import find_teacher, run
from vkd.training.teacher import freeze, teacher_identity, teacher_normalization


class Scripted(nn.Module):
    """Names the classes it is told to, in the order in which it is asked."""

    def __init__(self, classes: int, predictions) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(classes))
        self.predictions = list(predictions)

    def forward(self, images):
        told, self.predictions = self.predictions[: len(images)], self.predictions[len(images) :]
        return self.table[torch.tensor(told)]


def freeze_scripted(data, predictions, **teacher):
    config = Config(teacher=TeacherConfig(arch="scripted", **teacher), evaluation_batch_size=3)
    model = Scripted(data.num_classes, predictions)
    return freeze(model, config, data, source="checkpoint", sha256="0", saw_val="unknown", device=CPU)


def with_test_hits(data, hits: int) -> list[int]:
    """Right on every image of val and on the first `hits` of test, wrong on the others."""
    test = data.targets("test")
    wrong = torch.where(torch.arange(len(test)) < hits, test, (test + 1) % data.num_classes)
    return [*data.targets("val").tolist(), *wrong.tolist()]


@pytest.fixture
def balanced(tmp_path):
    """Twenty test images, five of each class: chance is 25 %, the bar is 25 + 0.1 * 75 = 32.5 %."""
    return toy_data(tmp_path / "balanced", test=20)


@pytest.fixture
def imbalanced(tmp_path):
    """Sixteen of twenty test images of one class: chance is 80 %, the bar is 82 %."""
    return toy_data(tmp_path / "imbalanced", test=20, test_labels=[0] * 16 + [0, 1, 2, 3][1:] + [1])


@pytest.mark.parametrize(("hits", "passes"), [(0, False), (5, False), (6, False), (7, True), (20, True)])
def test_a_teacher_near_chance_is_refused(balanced, hits, passes):
    predictions = with_test_hits(balanced, hits)
    if passes:
        assert freeze_scripted(balanced, predictions).accuracy["test"] == pytest.approx(100 * hits / 20)
        return
    with pytest.raises(ModelError, match="near chance") as caught:
        freeze_scripted(balanced, predictions)
    assert f"{100 * hits / 20:.2f} %" in str(caught.value)
    assert "25.00 %" in str(caught.value)
    assert "teacher.allow_chance_accuracy=true" in str(caught.value)


@pytest.mark.parametrize(("hits", "passes"), [(12, False), (16, False), (17, True)])
def test_naming_the_commonest_class_is_chance_where_classes_differ_in_size(imbalanced, hits, passes):
    predictions = with_test_hits(imbalanced, hits)
    if passes:
        assert freeze_scripted(imbalanced, predictions).accuracy["test"] == 85
        return
    with pytest.raises(ModelError, match=r"80\.00 %"):
        freeze_scripted(imbalanced, predictions)


def test_with_many_classes_twice_chance_is_enough(tmp_path):
    data = toy_data(tmp_path, train=80, test=40, classes=20)
    with pytest.raises(ModelError, match=r"5\.00 %"):
        freeze_scripted(data, with_test_hits(data, 3))
    assert freeze_scripted(data, with_test_hits(data, 4)).accuracy["test"] == 10


def test_a_teacher_near_chance_is_taken_when_one_asks_for_it(balanced):
    teacher = freeze_scripted(balanced, with_test_hits(balanced, 0), allow_chance_accuracy=True)
    assert teacher.accuracy == {"val": 100.0, "test": 0.0}


def test_accuracy_and_logits_equal_a_count_by_hand(data):
    config = Config(
        teacher=TeacherConfig(arch="tiny", allow_chance_accuracy=True, mean=[0.3], std=[0.7]), evaluation_batch_size=5
    )
    teacher = freeze(TinyNetwork(), config, data, source="checkpoint", sha256="0", saw_val="unknown", device=CPU)
    for split in ("val", "test"):
        hits = 0
        for number, image in enumerate(data.images(split)):
            pixels = (image.numpy()[None] / 255 - np.full((1, CHANNELS, 1, 1), 0.3)) / 0.7
            with torch.no_grad():
                logits = TinyNetwork().eval()(torch.from_numpy(pixels).float())[0]
            torch.testing.assert_close(teacher.logits[split][number], logits, rtol=1e-4, atol=1e-5)
            hits += int(logits.argmax()) == int(data.targets(split)[number])
        assert teacher.accuracy[split] == pytest.approx(100 * hits / data.sizes[split])


def test_without_a_validation_split_its_accuracy_is_null(tmp_path):
    data = toy_data(tmp_path, val_fraction=0)
    teacher = freeze_scripted(data, data.targets("test").tolist())
    assert teacher.accuracy == {"val": None, "test": 100.0}
    assert teacher.as_record() == {
        "arch": "scripted",
        "accuracy": {"val": None, "test": 100.0},
        "sha256": "0",
        "saw_val": "unknown",
        "source": "checkpoint",
        "parameters": 16,
        "macs": None,
    }


def test_a_frozen_teacher_is_in_eval_mode_and_takes_no_gradient(data):
    config = Config(teacher=TeacherConfig(arch="tiny", allow_chance_accuracy=True))
    teacher = freeze(TinyNetwork().train(), config, data, source="checkpoint", sha256="0", saw_val=False, device=CPU)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(entry.requires_grad for entry in teacher.model.parameters())
    images = data.images("test")
    assert not teacher(images, teacher.normalization(images)).logits.requires_grad


@pytest.mark.parametrize("given", [{"mean": [0.5, 0.5, 0.5]}, {"std": [0.5, 0.5, 0.5]}])
def test_a_mean_without_a_std_is_a_config_error(data, given):
    with pytest.raises(ConfigError, match=r"teacher\.mean and teacher\.std"):
        teacher_normalization(TeacherConfig(arch="tiny", **given), TinyNetwork(), data)


def test_the_normalisation_is_its_own_then_that_of_its_pretrained_weights_then_the_data_set_s(data):
    model = TinyNetwork()
    assert teacher_normalization(TeacherConfig(arch="tiny"), model, data).mean == data.mean
    model.pretrained_normalization = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pretrained = TeacherConfig(arch="tiny", pretrained=True)
    assert teacher_normalization(pretrained, model, data).std == [0.4, 0.5, 0.6]
    own = dataclasses.replace(pretrained, mean=[0.9], std=[0.8])
    assert teacher_normalization(own, model, data).mean == [0.9] * 3


def test_a_normalisation_that_cannot_be_names_the_teacher(data):
    with pytest.raises(ConfigError, match=r"teacher\.mean"):
        teacher_normalization(TeacherConfig(arch="tiny", mean=[0.1, 0.2], std=[0.3, 0.4]), TinyNetwork(), data)


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ({}, True),
        ({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}, True),
        ({"mean": [0.4, 0.5, 0.6], "std": [0.2]}, False),
        ({"mean": [0.4], "std": [0.2, 0.3, 0.4]}, False),
    ],
)
def test_the_normalised_images_are_shared_only_where_both_normalise_alike(data, given, shared):
    predictions = [*data.targets("val").tolist(), *data.targets("test").tolist()]
    assert freeze_scripted(data, predictions, **given).shares_normalization == shared


def test_a_student_s_identity_has_the_teacher_s_weights_and_the_normalisation_in_force(data):
    weights = {"sha256": "abc"}

    def identity(weights=weights, **given):
        teacher = TeacherConfig(arch="tiny", **given)
        return teacher_identity("tiny", teacher_normalization(teacher, TinyNetwork(), data), weights)

    assert identity(checkpoint="here.pt") == identity(checkpoint="there.pt")
    # What the data set says, said again for the teacher, is the same input.
    assert identity(mean=list(data.mean), std=list(data.std)) == identity()
    assert identity(mean=[0.5], std=[0.5]) != identity()
    assert identity(weights={"sha256": "def"}) != identity()


@pytest.fixture
def config(tmp_path):
    """A run of one epoch with a teacher that it trains for one epoch."""
    write_images(tmp_path / "data")
    how = recipe(epochs=1, batch_size=10)
    return Config(
        runs_root=str(tmp_path / "runs"),
        data_root=str(tmp_path / "data"),
        device="cpu",
        dataset=DatasetConfig(name="toy", mean=[0.5], std=[0.3], val_fraction=0.25),
        teacher=TeacherConfig(arch="cifar_resnet8", recipe=how, allow_chance_accuracy=True),
        student=StudentConfig(arch="cifar_resnet8"),
        method={"kd": configured("kd")},
        divergence={"name": "fkld", "temperature": 4.0},
        cross_entropy_weight=0.1,
        recipe=how,
        tracker=TrackerConfig(name="none"),
    )


def test_the_teacher_of_a_run_that_is_done_is_found_without_training_one(config):
    data = load_data(config.dataset, config.data_root, device=CPU)
    assert find_teacher(config, data, device=CPU) is None
    outcome = run(config, console=Console(quiet=True))
    recorded = json.loads(outcome.directory.result.read_text())["teacher"]
    teacher = find_teacher(config, data, device=CPU)
    assert recorded["macs"] > 0  # counted where a student learns from it
    assert {**teacher.as_record(), "macs": recorded["macs"]} == recorded
    assert recorded["saw_val"] is False
    assert recorded["source"] == "trained"
    assert weights_sha256(teacher.model.state_dict()) == recorded["sha256"]


def test_a_teacher_that_somebody_else_trained_may_have_seen_val(config, tmp_path):
    data = load_data(config.dataset, config.data_root, device=CPU)
    path = tmp_path / "teacher.safetensors"
    config.teacher.checkpoint = str(path)
    assert find_teacher(config, data, device=CPU) is None
    model = create_model("cifar_resnet8", num_classes=4, in_channels=3, image_size=(6, 6), seed=5)
    save_weights(model, path, {})
    teacher = find_teacher(config, data, device=CPU)
    assert (teacher.saw_val, teacher.source) == ("unknown", "checkpoint")
    assert teacher.sha256 == weights_sha256(model.state_dict())


def test_the_weights_of_another_number_of_classes_are_refused(config, tmp_path):
    data = load_data(config.dataset, config.data_root, device=CPU)
    path = tmp_path / "teacher.safetensors"
    config.teacher.checkpoint = str(path)
    save_weights(create_model("cifar_resnet8", num_classes=7, in_channels=3, image_size=(6, 6)), path, {})
    with pytest.raises(ModelError, match="7 classes"):
        find_teacher(config, data, device=CPU)
