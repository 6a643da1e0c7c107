"""The teacher: found, checked, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vkd.config import Config, TeacherConfig
from vkd.data import Data, Normalization
from vkd.errors import ConfigError, ModelError
from vkd.methods import Output
from vkd.models import (
    Intermediates,
    create_model,
    input_normalization,
    load_into,
    load_weights,
    pretrained_image_size,
    weights_sha256,
)
from vkd.training.forward import forward
from vkd.training.measurement import split_logits
from vkd.training.precision import Precision


@dataclass
class Teacher:
    """A frozen network with what is known about it.

    Calling it gives its output on a batch; it is always in eval mode, takes no gradient, and neither its weights nor
    its buffers ever change.

    arch, source ("checkpoint", "pretrained" or "trained"), sha256 of its weights: which network it is.
    saw_val: whether it was trained on the images of `val`: false, true or "unknown".
    accuracy: top-1 in percent on `val` (null without one) and `test`.
    logits: on every image of these splits, [N, C].
    intermediates: runs the network where a method asks for its features; None for logits alone.
    """

    model: nn.Module
    normalization: Normalization
    shares_normalization: bool
    precision: Precision
    arch: str
    source: str
    sha256: str
    saw_val: bool | str
    accuracy: dict[str, float | None] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    intermediates: Intermediates | None = None

    def __call__(self, images: Tensor, student_images: Tensor) -> Output:
        """The output on a batch.

        Args:
            images: uint8 [B, channels, height, width].
            student_images: the same, normalised for the student; taken as they are where both want them alike.
        """
        with torch.no_grad(), self.precision.autocast():
            inputs = student_images if self.shares_normalization else self.normalization(images)
            return forward(self.model, self.intermediates, inputs)

    def as_record(self) -> dict[str, Any]:
        """What `result.json` says about the teacher."""
        return {
            "arch": self.arch,
            "accuracy": dict(self.accuracy),
            "sha256": self.sha256,
            "saw_val": self.saw_val,
            "source": self.source,
        }


def open_untrained(config: Config, data: Data) -> nn.Module:
    """The teacher's architecture with random weights. Raises ModelError when it does not fit the data set."""
    return _create(config, data, pretrained=False)


def open_weights(config: Config, data: Data, path: str | Path) -> tuple[nn.Module, str]:
    """The teacher's architecture with the weights of a file, and their sha256.

    Raises ModelError when they are missing, damaged or do not fit the data set's classes and channels.
    """
    model = open_untrained(config, data)
    load_into(model, load_weights(path), arch=config.teacher.arch, source=str(path))
    return model, weights_sha256(model.state_dict())


def open_teacher(config: Config, data: Data) -> tuple[nn.Module, str, str]:
    """The teacher that a checkpoint or timm's pretrained weights give: (network, sha256 of its weights, source).

    Raises ModelError when the weights are missing, damaged or do not fit the data set's classes and channels.
    """
    if config.teacher.checkpoint is not None:
        return *open_weights(config, data, config.teacher.checkpoint), "checkpoint"
    model = _create(config, data, pretrained=True)
    return model, weights_sha256(model.state_dict()), "pretrained"


def _create(config: Config, data: Data, *, pretrained: bool) -> nn.Module:
    return create_model(
        config.teacher.arch,
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=_own_image_size(config.teacher) or data.image_size,
        pretrained=pretrained,
        seed=config.teacher.seed,
    )


def _own_image_size(teacher: TeacherConfig) -> tuple[int, int] | None:
    """(height, width) that the teacher wants its images in; None for that of the data."""
    if teacher.image_size is not None:
        return teacher.image_size, teacher.image_size
    return pretrained_image_size(teacher.arch) if teacher.pretrained else None


def teacher_normalization(teacher: TeacherConfig, model: nn.Module, data: Data) -> Normalization:
    """How the teacher's input is made: as its config says, else as its pretrained weights want, else as the data's.

    Raises ConfigError when only one of mean and std is given.
    """
    if (teacher.mean is None) != (teacher.std is None):
        raise ConfigError("teacher.mean and teacher.std belong together", expected="both or neither")
    mean, std = teacher.mean, teacher.std
    if mean is None and teacher.pretrained:
        own = input_normalization(model)
        mean, std = own if own is not None else (None, None)
    if mean is None:
        mean, std = data.mean, data.std
    size = _own_image_size(teacher)
    return Normalization(
        mean, std, data.channels, image_size=None if size == tuple(data.image_size) else size, key="teacher"
    )


def freeze(
    model: nn.Module,
    config: Config,
    data: Data,
    *,
    source: str,
    sha256: str,
    saw_val: bool | str,
    device: torch.device,
) -> Teacher:
    """Put a network in the teacher's place and measure it on `val` and `test`.

    Raises ModelError when it is no better than chance, unless `teacher.allow_chance_accuracy` is set.
    """
    normalization = teacher_normalization(config.teacher, model, data).to(device)
    shared = Normalization(data.mean, data.std, data.channels).to(device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).eval().requires_grad_(False)
    teacher = Teacher(
        model=model,
        normalization=normalization,
        shares_normalization=normalization.image_size is None
        and torch.equal(normalization.scale, shared.scale)
        and torch.equal(normalization.shift, shared.shift),
        precision=Precision(config.precision, device),
        arch=config.teacher.arch,
        source=source,
        sha256=sha256,
        saw_val=saw_val,
    )
    for split in ("val", "test"):
        teacher.accuracy[split] = None
        if split in data.splits_present:
            logits, targets = split_logits(model, data, split, normalization, batch_size=config.evaluation_batch_size)
            teacher.logits[split] = logits
            teacher.accuracy[split] = 100.0 * (logits.argmax(dim=-1) == targets).double().mean().item()
    # Test has more images than val, so it is judged there.
    if not config.teacher.allow_chance_accuracy:
        _refuse_chance(teacher, targets)
    return teacher


def _refuse_chance(teacher: Teacher, targets: Tensor) -> None:
    """A teacher near chance is a mistake (wrong normalisation, other class order, untrained), not a baseline."""
    # Chance is what naming the commonest class would score.
    chance = 100.0 * targets.bincount().max().item() / len(targets)
    measured = teacher.accuracy["test"]
    if measured < min(2.0 * chance, chance + 0.1 * (100.0 - chance)):
        raise ModelError(
            f"the teacher {teacher.arch} has {measured:.2f} % test accuracy, near chance ({chance:.2f} %)",
            expected="a trained teacher: the right checkpoint, dataset.mean and .std as it was trained with, "
            "and classes in the same order",
            hint="teacher.allow_chance_accuracy=true, if that is what you want",
        )


def teacher_identity(arch: str, normalization: Normalization, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What the student's fingerprint takes of the teacher: its weights, and how its input really is normalised.

    Args:
        arch: its architecture.
        normalization: the one in force (`teacher_normalization`), not the config's, which may leave it open.
        weights: {"sha256": ...} of its weights, or {"fingerprint": ...} of the run that trains it.
    """
    resized = {} if normalization.image_size is None else {"image_size": list(normalization.image_size)}
    return {"arch": arch, "mean": list(normalization.mean), "std": list(normalization.std), **resized, **weights}
