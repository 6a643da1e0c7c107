"""What a method is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from vkd.registry import Registry

if TYPE_CHECKING:
    from vkd.divergences import Divergence
    from vkd.models import FeatureShapes

METHODS: Registry[type[Method]] = Registry("method")


@dataclass
class Output:
    """What a network said about one view of a batch.

    logits: [B, C], before softmax, float32 whatever precision the network ran in.
    features: the map after each stage [B, c, h, w], first stage first, float32; empty unless the method asks for
        features (`needs_features`).
    embedding: the vector that enters the classifier [B, D], float32; None unless the method asks for features.
    """

    logits: Tensor
    features: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them: the logits, the features, and the embedding where there is one."""
        return [self.logits, *self.features, *([] if self.embedding is None else [self.embedding])]

    def map(self, function: Callable[[Tensor], Tensor]) -> Output:
        """An output of what `function` makes of each tensor."""
        embedding = None if self.embedding is None else function(self.embedding)
        return Output(function(self.logits), [function(entry) for entry in self.features], embedding)


@dataclass
class Progress:
    """How far training is: the epoch in hand (from 1), epochs in all, steps done, steps in all."""

    epoch: int
    epochs: int
    step: int
    steps: int


@dataclass
class Batch:
    """One step's worth of what a method may look at.

    student: the student's output, with gradient.
    teacher: the teacher's output on the same view, without gradient.
    targets: labels [B], int64.
    indices: position of each image in the training split [B], int64.
    progress: how far training is, for warm-ups.
    views: (student, teacher) outputs of further views of the same images, where the method asks for several (`views`).
    """

    student: Output
    teacher: Output
    targets: Tensor
    indices: Tensor
    progress: Progress
    views: list[tuple[Output, Output]] = field(default_factory=list)


@dataclass
class MethodContext:
    """What a method may need to know when it is built.

    divergence: the configured divergence; None where no method of the run uses one.
    num_classes, train_size: C and the number of training images.
    epochs, steps_per_epoch: the length of training.
    student, teacher: the networks, to look at shapes only; the method must neither keep nor change them.
    image_shape: (channels, height, width) of the images the student sees.
    generator: the method's own stream of random numbers, for its draws, on the CPU; parameters are initialised from
        another one. Kept as an attribute of the method itself, its state goes into the checkpoint.
    student_features, teacher_features: shapes of what `Output` holds; None unless the method asks for features.
    train_targets: labels of the training images by their index [train_size], int64, on the CPU.
    """

    divergence: Divergence | None
    num_classes: int
    train_size: int
    epochs: int
    steps_per_epoch: int
    student: nn.Module
    teacher: nn.Module
    image_shape: tuple[int, int, int]
    generator: torch.Generator
    student_features: FeatureShapes | None = None
    teacher_features: FeatureShapes | None = None
    train_targets: Tensor | None = None


class Method(nn.Module, ABC):
    """How a student is taught.

    Calling it with a `Batch` gives named, already weighted scalar terms that the trainer adds up. Cross-entropy with
    the labels belongs to no method: the trainer adds it. Parameters go to the optimizer, buffers into the checkpoint,
    and none of them into the saved student.

    It is built as `SomeMethod(context, **parameters)`: the keyword-only parameters of its `__init__`, with their type
    hints, are the keys under `method.<name>` in the config. Where a name ends in `weight` or `epochs`, no negative
    value is taken.
    """

    cross_entropy_weight: ClassVar[float] = 1.0
    """Weight of the cross-entropy beside which the literature's weights of the method stand; the config's default."""
    uses_divergence: ClassVar[bool] = False
    """Whether the method compares distributions by the configured divergence."""
    uses_temperature: ClassVar[bool] = True
    """Whether it does so at the divergence's own temperature, rather than at temperatures of its own."""
    needs_features: ClassVar[bool] = False
    """Whether `Output.features` and `Output.embedding` must be filled."""
    capturable: ClassVar[bool] = False
    """Whether a step may be recorded in a CUDA graph, which repeats what the host did in one of them. It may where
    `forward` computes from the batch, from parameters and buffers alone, changes buffers in place, and neither draws,
    counts nor looks at values on the host. Of `Batch.progress` it may look at all but the step."""
    per_image: ClassVar[bool] = False
    """Whether each term is a mean over the images of the batch of what every image gives by itself, without draws and
    without a state of the method's own that a batch changes (BatchNorm aside). Several processes that train one student
    then call it on a share of the batch each. Otherwise each of them calls it on the whole batch, with a gradient to
    the outputs of its own share: always right, at the price of doing the same work everywhere."""
    views: ClassVar[int] = 1
    """How many views of each image the method wants: `dataset.augmentation` makes the first, and
    `dataset.view_augmentation` the others, which lie in `Batch.views`."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted scalar terms of the loss, in float32 or wider."""
