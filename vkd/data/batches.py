"""What a data set offers to whatever trains or evaluates on it, however its images are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vkd.errors import ConfigError
from vkd.randomness import generator


@dataclass
class ImageBatch:
    """Some images of one split, on the device. Read them only: they may be views of the stored data set.

    images: pixels, uint8 [B, C, H, W].
    targets: classes, int64 [B].
    indices: positions in the split, int64 [B].
    views: further views of the same images, each as `images`, where several were asked for.
    view_rows: which of the `Data.view_count` views of which training image each of `images` is, as one number,
        index * view_count + number of the view: int64 [B], always on the CPU. Equal rows are equal pixels. None where
        views cannot be counted, and for images that are not augmented.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    views: list[Tensor] = field(default_factory=list)
    view_rows: Tensor | None = None


@dataclass(frozen=True)
class Description:
    """What is known of a data set beside its pixels; see `Data`."""

    name: str
    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    notes: list[str]
    identity: str


class Data(ABC):
    """A data set, split and ready to train on.

    Attributes:
        name: as in the config.
        class_names, num_classes: names of the C classes, and C.
        channels: of an image.
        image_size: (height, width) in pixels.
        mean, std: normalisation, one value a channel, for pixels in [0, 1].
        loading: "resident" (all pixels on the device) or "streaming" (files, read by workers).
        notes: what a user should be told.
        identity: sha256 in hex of the content: pixels (or relative paths and sizes of files), labels, class names.
        sizes: number of images of each split present, under "train", "val", "test".
        has_views: whether training images can have further views, which have augmentations of their own.
        view_count: how many different images the augmentations can make of a training image, 1 where there are none;
            None where that cannot be counted, as for images that are read from files.
    """

    loading: str

    def __init__(
        self,
        description: Description,
        sizes: dict[str, int],
        device: torch.device,
        *,
        has_views: bool,
        view_count: int | None = None,
    ) -> None:
        self.name = description.name
        self.class_names = description.class_names
        self.num_classes = len(description.class_names)
        self.channels = description.channels
        self.image_size = description.image_size
        self.mean, self.std = description.mean, description.std
        self.notes = description.notes
        self.identity = description.identity
        self.sizes = sizes
        self.device = device
        self.has_views = has_views
        self.view_count = view_count

    @property
    def splits_present(self) -> set[str]:
        """Of {"train", "val", "test"}, those that there are."""
        return set(self.sizes)

    @property
    def train_size(self) -> int:
        """Number of training images, those carved off for validation not counted."""
        return self.sizes["train"]

    @property
    @abstractmethod
    def train_targets(self) -> Tensor:
        """Classes of the training images by their index, int64 [train_size], on the CPU; not to be written to."""

    def steps_per_epoch(
        self, batch_size: int, drop_last: bool, processes: int = 1, *, key: str = "recipe.batch_size"
    ) -> int:
        """Number of batches of one epoch, at least 1.

        The last, smaller batch is left out when `drop_last`, and always when a process would get one image of it or
        none, since BatchNorm cannot take it.

        Args:
            batch_size: images a batch, those of all processes together.
            drop_last: leave out the last, smaller batch.
            processes: among how many each batch is shared out.
            key: of `batch_size` in the config.

        Raises:
            ConfigError: naming the key, when it is below 1, cannot be shared out evenly, or no batch is left.
        """
        if batch_size < 1:
            raise ConfigError(f"{key}={batch_size}", expected="1 or more")
        if batch_size % processes:
            nearest = max(1, round(batch_size / processes)) * processes
            raise ConfigError(
                f"{key}={batch_size} is that of all {processes} processes together, and cannot be shared "
                "out evenly among them",
                expected=f"a multiple of {processes}",
                hint=f"{key}={nearest}",
            )
        whole, rest = divmod(self.train_size, batch_size)
        steps = whole + (not drop_last and rest >= 2 * processes)
        if steps == 0:
            raise ConfigError(
                f"{key}={batch_size} leaves no batch of the {self.train_size} training images",
                expected=f"at most {self.train_size}, or fewer images dropped",
                hint=f"{key}={self.train_size // processes * processes or processes}",
            )
        return steps

    def train_batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        drop_last: bool,
        start_step: int = 0,
        views: int = 1,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[ImageBatch]:
        """The batches of one training epoch: every training image once, in random order, augmented.

        Order and augmentation depend on (seed, epoch) alone, not on the device, the workers or what was drawn before;
        an image's augmentation does not depend on the batch size either. A last, smaller batch is left out as
        `steps_per_epoch` says.

        Args:
            start_step: leaves out as many batches at the start, at no cost; the others are what they were.
            views: how many views of each image. The first is what one view alone would be; the others depend on
                (seed, epoch) and their number among the views, and are drawn independently of each other.
            part: (k, n) gives the k-th of n processes, from 0, its share of each batch: the k-th of n parts that follow
                one another, in which the first ones have one image more where they cannot be equal.

        Raises:
            ValueError: when the epoch has no such step, or several views are asked of data loaded for one.
        """
        if views < 1:
            raise ValueError(f"views={views} is below 1")
        if views > 1 and not self.has_views:
            raise ValueError(f"views={views}, but the data were loaded for one view: load_data(..., views={views})")
        rank, processes = part
        steps = self.steps_per_epoch(batch_size, drop_last, processes)
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step={start_step} is outside 0 .. {steps}, the steps of the epoch")
        order = torch.randperm(self.train_size, generator=generator(seed, "order", epoch))
        if start_step == steps:
            return iter(())
        order = order[start_step * batch_size : steps * batch_size]
        if processes > 1:
            order = torch.cat([batch.tensor_split(processes)[rank] for batch in order.split(batch_size)])
        return self._train_batches(order, batch_size // processes, seed, epoch, views)

    def eval_batches(self, split: str, *, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[ImageBatch]:
        """All images of a split ("train", "val" or "test") in their own order, not augmented, none left out.

        Args:
            batch_size: images a batch.
            part: (k, n) gives the k-th of n parts of the split, from 0, that follow one another; the first ones have
                one image more where they cannot be equal.

        Raises:
            ValueError: when there is no such split, as "val" when `dataset.val_fraction` is 0.
        """
        if split not in self.sizes:
            raise ValueError(f"data set {self.name!r} has no split {split!r}, but {sorted(self.sizes)}")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}", expected="1 or more")
        mine = torch.arange(self.sizes[split]).tensor_split(part[1])[part[0]]
        return self._eval_batches(split, mine, batch_size) if len(mine) else iter(())

    @abstractmethod
    def _train_batches(self, order: Tensor, batch_size: int, seed: int, epoch: int, views: int) -> Iterator[ImageBatch]:
        """The augmented training images at the positions `order`, int64 [at least 1] on the CPU, in batches."""

    @abstractmethod
    def _eval_batches(self, split: str, order: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        """The images of `split` at the positions `order`, int64 [at least 1] on the CPU, which follow one another."""
