"""Large images: files that worker processes read, augment and cut to size while the device computes."""

from __future__ import annotations

import os
import signal
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from vkd.data.augmentation import ImageAugmentation
from vkd.data.batches import Data, Description, ImageBatch
from vkd.data.sources import ImageFiles
from vkd.errors import ConfigError, DataError, nearest
from vkd.randomness import derive_seed

INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}


@dataclass(frozen=True)
class Geometry:
    """How an image of any size becomes a square one.

    image_size: side of the square, pixels.
    crop_fraction: share of the resized image's shorter side that the centre crop of evaluation keeps.
    interpolation: name of torchvision's mode of resizing.

    Raises ConfigError, naming the key, for an impossible value.
    """

    image_size: int
    crop_fraction: float
    interpolation: str

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"dataset.image_size={self.image_size}", expected="a side in pixels, 1 or more")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"dataset.crop_fraction={self.crop_fraction}", expected="above 0, at most 1")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"dataset.interpolation={self.interpolation!r} is unknown",
                expected=", ".join(sorted(INTERPOLATIONS)),
                hint=" or ".join(nearest(self.interpolation, INTERPOLATIONS)),
            )

    def eval_transforms(self) -> list[nn.Module]:
        """Resizes the shorter side to image_size / crop_fraction, rounded, and cuts the centre; for PIL images."""
        side = round(self.image_size / self.crop_fraction)
        resize = v2.Resize(side, interpolation=INTERPOLATIONS[self.interpolation])
        return [resize, v2.CenterCrop(self.image_size)]

    def train_transforms(self, augmentations: Sequence[ImageAugmentation], key: str) -> list[nn.Module]:
        """The augmentations in their order, after the resizing of evaluation unless the first one resizes itself.

        Raises ConfigError, naming the config's `key`, when one that resizes comes later.
        """
        mode = INTERPOLATIONS[self.interpolation]
        if any(augmentation.resizes for augmentation in augmentations[1:]):
            raise ConfigError(
                f"an augmentation that resizes must come first in {key}",
                expected="random_resized_crop before the others, and once",
            )
        first = [] if augmentations and augmentations[0].resizes else self.eval_transforms()
        return first + [augmentation.transform(self.image_size, mode) for augmentation in augmentations]


@dataclass(frozen=True)
class _Request:
    """One batch that a worker is asked for; `seed` is None for images that are not to be augmented."""

    split: str
    indices: Tensor
    seed: int | None = None
    epoch: int = 0
    views: int = 1


@dataclass(frozen=True)
class _BrokenImage:
    """What a worker answers instead of a batch when a file cannot be decoded."""

    path: str
    reason: str


class _Files(Dataset):
    """Reads the batches that are asked for; a copy lives in each worker.

    Paths are kept as one array of bytes a split: a list of strings would be copied, page by page, into every worker.
    An answer is the images' first view [B, C, H, W], their classes and positions [B], and their further views.
    """

    def __init__(
        self,
        splits: Mapping[str, ImageFiles],
        train_transforms: list[nn.Module],
        view_transforms: list[nn.Module],
        eval_transforms: list[nn.Module],
    ) -> None:
        self.roots = {split: str(files.root) for split, files in splits.items()}
        self.paths = {split: np.array([os.fsencode(path) for path in files.paths]) for split, files in splits.items()}
        self.labels = {split: torch.from_numpy(files.labels) for split, files in splits.items()}
        self.train_transforms, self.view_transforms = train_transforms, view_transforms
        self.eval_transforms = eval_transforms

    def __getitem__(self, request: _Request) -> tuple[Tensor, ...] | _BrokenImage:
        views: list[list[Tensor]] = [[] for _ in range(request.views)]
        for index in request.indices.tolist():
            path = Path(self.roots[request.split], os.fsdecode(self.paths[request.split][index]))
            image = _decode(path)
            if isinstance(image, _BrokenImage):
                return image
            for view, images in enumerate(views):
                images.append(functional.pil_to_tensor(self._transform(image, request, index, view)))
        first, *further = [torch.stack(images) for images in views]
        return first, self.labels[request.split][request.indices], request.indices, *further

    def _transform(self, image: Image.Image, request: _Request, index: int, view: int) -> Image.Image:
        if request.seed is None:
            for transform in self.eval_transforms:
                image = transform(image)
            return image
        purpose = ("augmentation",) if view == 0 else ("view augmentation", view)
        # Only the CPU's generator is used and restored; torch.manual_seed would reseed the GPU's as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(request.seed, *purpose, request.epoch, index))
            for transform in self.train_transforms if view == 0 else self.view_transforms:
                image = transform(image)
        return image


def _decode(path: Path) -> Image.Image | _BrokenImage:
    """The file as an RGB image. Whatever Pillow raises means that the file is bad; its decoders raise many kinds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.convert("RGB")
    except Exception as error:
        return _BrokenImage(str(path), f"{type(error).__name__}: {error}")


class _Requests:
    """The requests that the next pass over a loader sends to its workers."""

    def __init__(self) -> None:
        self.pending: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.pending)

    def __len__(self) -> int:
        return len(self.pending)


def _unchanged(batch: object) -> object:
    return batch


def _start_worker(_worker: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to workers too, to the process that started them; it ends them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _release(_loader: DataLoader) -> None:
    """Held by `weakref.finalize` until the data set is gone.

    Without that reference the garbage collector, when it frees a data set that an exception's traceback holds, closes
    the queues before the workers have been told to end, and each of them is waited for in vain for 5 s.
    """


class StreamingData(Data):
    """A data set whose images are read from files by workers; see `Data`.

    One pool of workers, started at the first batch, serves all splits and epochs.

    Args:
        splits: files and labels under "train", "test" and perhaps "val".
        augmentations: applied in this order to training images.
        geometry: the size that images get.
        device: where batches go.
        workers: processes that read; 0 reads in the calling one.
        view_augmentations: applied in this order to their further views; None where there are to be none.
    """

    loading = "streaming"

    def __init__(
        self,
        description: Description,
        splits: Mapping[str, ImageFiles],
        augmentations: Sequence[ImageAugmentation],
        geometry: Geometry,
        device: torch.device,
        workers: int,
        view_augmentations: Sequence[ImageAugmentation] | None = None,
    ) -> None:
        sizes = {split: len(files.labels) for split, files in splits.items()}
        super().__init__(description, sizes, device, has_views=view_augmentations is not None)
        self._files = _Files(
            splits,
            geometry.train_transforms(augmentations, "dataset.augmentation"),
            geometry.train_transforms(view_augmentations or [], "dataset.view_augmentation"),
            geometry.eval_transforms(),
        )
        self._workers = workers
        self._requests = _Requests()
        self._loader = self._make_loader(self._requests, persistent=workers > 0)
        self._busy = False
        weakref.finalize(self, _release, self._loader).atexit = False

    @property
    def train_targets(self) -> Tensor:
        return self._files.labels["train"]

    def _make_loader(self, requests: _Requests, *, persistent: bool) -> DataLoader:
        return DataLoader(
            self._files,
            sampler=requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self._workers,
            persistent_workers=persistent,
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise each pass would draw from the global generator
        )

    def _train_batches(self, order: Tensor, batch_size: int, seed: int, epoch: int, views: int) -> Iterator[ImageBatch]:
        return self._stream([_Request("train", indices, seed, epoch, views) for indices in order.split(batch_size)])

    def _eval_batches(self, split: str, order: Tensor, batch_size: int) -> Iterator[ImageBatch]:
        return self._stream([_Request(split, indices) for indices in order.split(batch_size)])

    def _stream(self, requests: list[_Request]) -> Iterator[ImageBatch]:
        """Sends the requests and yields the answers, in order. A pass within a pass gets workers of its own."""
        if self._busy:
            mine = _Requests()
            mine.pending = requests
            yield from self._receive(self._make_loader(mine, persistent=False))
            return
        self._busy, self._requests.pending = True, requests
        try:
            yield from self._receive(self._loader)
        finally:
            self._busy = False

    def _receive(self, loader: DataLoader) -> Iterator[ImageBatch]:
        for answer in loader:
            if isinstance(answer, _BrokenImage):
                raise DataError(
                    f"{answer.path} cannot be read as an image ({answer.reason})",
                    expected="a whole image file",
                    hint="restore or delete the file",
                )
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in answer]
            yield ImageBatch(*tensors[:3], views=tensors[3:])
