"""The teacher: found, checked, frozen, and made fast."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vkd.config import Config, TeacherConfig
from vkd.data import Data, Normalization
from vkd.errors import ConfigError, ModelError, UserError
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
from vkd.models.folding import fold_batch_norms
from vkd.training.distribution import ONE, Processes
from vkd.training.forward import forward
from vkd.training.measurement import split_logits
from vkd.training.precision import Precision
from vkd.training.switches import Switches
from vkd.training.teacher_views import TeacherViews

logger = logging.getLogger("vkd")


@dataclass
class Teacher:
    """A frozen network with what is known about it.

    Calling it gives its output on a batch; it is always in eval mode, takes no gradient, and neither its weights nor
    its buffers ever change.

    model: the network as it was found.
    network: what is run: the same, or a faster one with the same outputs (`made_fast`).
    arch, source ("checkpoint", "pretrained" or "trained"), sha256 of its weights: which network it is.
    saw_val: whether it was trained on the images of `val`: false, true or "unknown".
    accuracy: top-1 in percent on `val` (null without one) and `test`.
    logits: on every image of these splits, [N, C].
    intermediates: runs the network where a method asks for its features; None for logits alone.
    padded_to: batches are filled up to this size, since a compiled network is compiled again for another; 0: never.
    views: its logits for every view of every training image; None where it is asked anew each time.
    macs: multiply-accumulates for one image, as far as they were counted.
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
    network: nn.Module | None = None
    intermediates: Intermediates | None = None
    padded_to: int = 0
    views: TeacherViews | None = None
    macs: int | None = None

    def __call__(
        self, images: Tensor, student_images: Tensor, view_rows: Tensor | None = None, out: Output | None = None
    ) -> Output:
        """The output on a batch, in tensors of its own or in those of `out`.

        Args:
            images: uint8 [B, channels, height, width].
            student_images: the same, normalised for the student; taken as they are where both want them alike.
            view_rows: which row of `views` belongs to each image, int64 [B], on the CPU; only where there are views.
            out: where the output is to be written; None for new tensors.
        """
        if self.views is None or view_rows is None:
            return self._run(images, student_images, out)
        try:
            logits = self.views.logits(view_rows, lambda chosen: self._logits_of(images, student_images, chosen))
        except UserError as error:  # no room on the disk, for instance; the network itself is still there
            logger.warning("the teacher's logits are no longer kept: %s", error)
            self.views = None
            return self._run(images, student_images, out)
        if out is None:
            return Output(logits)
        out.logits.copy_(logits)
        return out

    def _logits_of(self, images: Tensor, student_images: Tensor, chosen: Tensor) -> Tensor:
        """Logits of the images at the positions `chosen` of a batch."""
        chosen = chosen.to(images.device)
        return self._run(images.index_select(0, chosen), student_images.index_select(0, chosen)).logits

    def _run(self, images: Tensor, student_images: Tensor, out: Output | None = None) -> Output:
        count = len(images)
        with torch.inference_mode(), self.precision.autocast():
            inputs = student_images if self.shares_normalization else self.normalization(images)
            if count < self.padded_to:
                inputs = inputs[torch.arange(self.padded_to, device=inputs.device).clamp_(max=count - 1)]
            output = forward(self.model if self.network is None else self.network, self.intermediates, inputs)
        # Tensors of inference mode cannot take part in a loss, and a compiled network may write over its last output.
        if out is None:
            return output.map(lambda entry: entry[:count].clone())
        for mine, entry in zip(out.tensors, output.tensors, strict=True):
            mine.copy_(entry[:count])
        return out

    def made_fast(
        self, switches: Switches, images: Tensor, *, batch_size: int, needs_features: bool = False
    ) -> Teacher:
        """The same teacher with folded BatchNorms and a compiled forward pass, as far as the switches say so.

        What cannot be done is said, and left; its outputs agree with the unfolded ones to 1e-5 of the largest.

        Args:
            switches: what is on.
            images: some images of the data set, uint8 [B, channels, height, width], to compare on.
            batch_size: of training.
            needs_features: whether its features will be asked for, and not its logits alone.
        """
        network, intermediates = self.model, None
        inputs = self.normalization(images)
        if switches.fold:
            network, folded = fold_batch_norms(self.model, inputs)
            network = network.to(memory_format=switches.layout)
            if not folded:
                logger.info("the teacher %s has no BatchNorm that could be folded", self.arch)
        if needs_features:
            intermediates = Intermediates(network, tuple(inputs.shape[1:]), arch=self.arch)
        fast = replace(self, network=network, intermediates=intermediates)
        return fast._compiled(images, batch_size) if switches.compile_teacher else fast

    def _compiled(self, images: Tensor, batch_size: int) -> Teacher:
        """The same with its forward pass compiled; itself where that fails, for instance without a C++ compiler."""
        inputs = self.normalization(images)
        try:
            if self.intermediates is None:
                compiled = replace(self, network=torch.compile(self.network), padded_to=batch_size)
            else:
                intermediates = Intermediates(self.network, tuple(inputs.shape[1:]), arch=self.arch)
                intermediates.compile()
                compiled = replace(self, intermediates=intermediates, padded_to=batch_size)
            compiled._run(images[:batch_size], inputs[:batch_size])
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("the teacher could not be compiled and runs as it is (%s)", reason)
            return self
        return compiled

    def keep_views(self) -> None:
        """Make what was added to the table of its logits durable; where that fails, say so: no run depends on it."""
        if self.views is not None:
            try:
                self.views.flush()
            except UserError as error:
                logger.warning("the teacher's logits are not kept: %s", error)

    def as_record(self) -> dict[str, Any]:
        """What `result.json` says about the teacher."""
        return {
            "arch": self.arch,
            "accuracy": dict(self.accuracy),
            "sha256": self.sha256,
            "saw_val": self.saw_val,
            "source": self.source,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "macs": self.macs,
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
    layout: torch.memory_format = torch.contiguous_format,
    measure: bool = True,
    processes: Processes = ONE,
) -> Teacher:
    """Put a network in the teacher's place and, unless `measure` is false, measure it on `val` and `test`.

    Several processes share out the measuring.

    Raises ModelError when it is no better than chance, unless `teacher.allow_chance_accuracy` is set.
    """
    normalization = teacher_normalization(config.teacher, model, data).to(device)
    normalization.memory_format = layout
    shared = Normalization(data.mean, data.std, data.channels).to(device)
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
    if not measure:
        return teacher
    for split in ("val", "test"):
        teacher.accuracy[split] = None
        if split in data.splits_present:
            logits, targets = split_logits(
                model,
                data,
                split,
                normalization,
                batch_size=config.evaluation_batch_size,
                processes=processes,
            )
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
