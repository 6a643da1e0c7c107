"""Small images: each split lies on the device as one uint8 tensor and is augmented there in batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vkd.data.augmentation import BatchAugmentation
from vkd.data.batches import Data, Description, ImageBatch
from vkd.data.sources import ImageArrays
from vkd.randomness import generator

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
"""Pixels that are gathered and augmented at once, so that small batches share the cost of launching the operations; on
the CPU no more than its cache holds. No effect on what is yielded."""

_Choices = tuple[BatchAugmentation, Tensor]
"""An augmentation with what was drawn for it, int64 [N, k] for N images."""


class ResidentData(Data):
    """A data set whose splits are tensors on the device; see `Data`.

    Args:
        splits: images uint8 [N, H, W, C] and labels int64 [N] under "train", "test" and perhaps "val".
        augmentations: applied in this order to training images.
        device: where the tensors lie.
        view_augmentations: the same for their further views; None where there are to be none.
    """

    loading = "resident"

    def __init__(
        self,
        description: Description,
        splits: Mapping[str, ImageArrays],
        augmentations: Sequence[BatchAugmentation],
        device: torch.device,
        view_augmentations: Sequence[BatchAugmentation] | None = None,
    ) -> None:
        sizes = {split: len(arrays.labels) for split, arrays in splits.items()}
        counts = [augmentation.views(description.image_size) for augmentation in augmentations]
        super().__init__(
            description,
            sizes,
            device,
            has_views=view_augmentations is not None,
            view_count=None if None in counts else math.prod(counts),
        )
        self.augmentations = list(augmentations)
        self.view_augmentations = list(view_augmentations or [])
        self._images = {split: _channels_first(arrays.images).to(device) for split, arrays in splits.items()}
        self._labels = {split: torch.from_numpy(arrays.labels).to(device) for split, arrays in splits.items()}

    @property
    def train_targets(self) -> Tensor:
        return self._labels["train"].cpu()

    def images(self, split: str) -> Tensor:
        """All images of a split as stored on the device, uint8 [N, C, H, W]; not to be written to."""
        return self._images[split]

    def targets(self, split: str) -> Tensor:
        """All classes of a split as stored on the device, int64 [N]; not to be written to."""
        return self._labels[split]

    def _train_batches(self, order: Tensor, batch_size: int, seed: int, epoch: int, views: int) -> Iterator[ImageBatch]:
        drawn = [self._draw(self.augmentations, generator(seed, "augmentation", epoch))]
        for view in range(1, views):
            drawn.append(self._draw(self.view_augmentations, generator(seed, "view augmentation", view, epoch)))
        view_rows = itertools.repeat(None) if self.view_count is None else self._view_rows(drawn[0], order, batch_size)
        drawn = [self._placed(choices) for choices in drawn]
        order = order.to(self.device, non_blocking=True)
        batch_bytes = batch_size * self.channels * self.image_size[0] * self.image_size[1]
        for chunk in order.split(batch_size * max(1, CHUNK_BYTES.get(self.device.type, 1 << 20) // batch_bytes)):
            stored = self._images["train"].index_select(0, chunk)
            images, *others = [_augment(stored, choices, chunk) for choices in drawn]
            tensors = (images, self._labels["train"].index_select(0, chunk), chunk, *others)
            for first, targets, indices, *further in zip(*(part.split(batch_size) for part in tensors), strict=True):
                yield ImageBatch(first, targets, indices, further, next(view_rows))

    def _draw(self, augmentations: Sequence[BatchAugmentation], random: torch.Generator) -> list[_Choices]:
        """Every augmentation with its choices for all training images of an epoch, on the CPU."""
        return [
            (augmentation, augmentation.draw(self.train_size, random, self.image_size))
            for augmentation in augmentations
        ]

    def _placed(self, drawn: list[_Choices]) -> list[_Choices]:
        """The same choices on the device."""
        return [(augmentation, choices.to(self.device, non_blocking=True)) for augmentation, choices in drawn]

    def _view_rows(self, drawn: list[_Choices], order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """`ImageBatch.view_rows` of each batch of an epoch, from all its choices at once, without the device."""
        rows = torch.arange(self.train_size)
        for augmentation, choices in drawn:
            rows = rows * augmentation.views(self.image_size) + augmentation.number(choices, self.image_size)
        return iter(rows.index_select(0, order).split(batch_size))

    def _eval_batches(self, split: str, order: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        part = slice(int(order[0]), int(order[-1]) + 1)
        tensors = (self._images[split][part], self._labels[split][part], order.to(self.device))
        for parts in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
            yield ImageBatch(*parts)


def _augment(images: Tensor, drawn: list[_Choices], indices: Tensor) -> Tensor:
    """The images [B, C, H, W] at the positions `indices` [B], augmented as was drawn for them."""
    for augmentation, choices in drawn:
        images = augmentation.apply(images, choices.index_select(0, indices))
    return images


def _channels_first(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] to a contiguous uint8 tensor [N, C, H, W] of its own memory."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C", copy=True))
