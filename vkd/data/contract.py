"""What a data set is before it is split and loaded: arrays or files with labels. And the table of all there are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vkd.config import DatasetConfig
from vkd.errors import DataError
from vkd.registry import Registry


@dataclass(frozen=True)
class ImageArrays:
    """Decoded images of one size. images: uint8 [N, H, W, C]; labels: int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def subset(self, positions: np.ndarray) -> ImageArrays:
        """The images at `positions`, int64 [M]."""
        return ImageArrays(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class ImageFiles:
    """Images in files. paths: N, relative to `root`, with `/`; labels: int64 [N]; sizes_in_bytes: int64 [N]."""

    root: Path
    paths: list[str]
    labels: np.ndarray
    sizes_in_bytes: np.ndarray

    def subset(self, positions: np.ndarray) -> ImageFiles:
        """The images at `positions`, int64 [M]."""
        paths = [self.paths[position] for position in positions]
        return ImageFiles(self.root, paths, self.labels[positions], self.sizes_in_bytes[positions])


Images = ImageArrays | ImageFiles


@dataclass(frozen=True)
class Source:
    """A data set as it was published.

    train, test: the splits; val: the published validation split, or None where there is none.
    class_names: names of the C classes that labels count from 0.
    notes: what the user should be told.
    """

    train: Images
    val: Images | None
    test: Images
    class_names: list[str]
    notes: list[str] = field(default_factory=list)


SOURCES: Registry[Callable[[DatasetConfig, Path], Source]] = Registry("data set")


def given_root(config: DatasetConfig) -> Path | None:
    """The folder that `dataset.root` names, or None where it is null. Raises DataError when it is not a folder."""
    if config.root is None:
        return None
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"dataset.root={root} is not a folder" if root.exists() else f"dataset.root={root} does not exist"
        )
    return root


def content_identity(source: Source) -> str:
    """The sha256, in hex, of what a source holds: pixels or (relative path, size) of files, labels, class names."""
    digest = hashlib.sha256(json.dumps(list(source.class_names)).encode())
    for split in ("train", "val", "test"):
        images = getattr(source, split)
        if images is None:
            continue
        if isinstance(images, ImageArrays):
            digest.update(f"{split} {images.images.shape}".encode())
            digest.update(np.ascontiguousarray(images.images))
        else:
            digest.update(f"{split} {len(images.paths)}".encode())
            digest.update(b"\0".join(os.fsencode(path) for path in images.paths))
            digest.update(images.sizes_in_bytes.astype("<i8"))
        digest.update(images.labels.astype("<i8"))
    return digest.hexdigest()


def check_splits(source: Source, where: dict[str, str]) -> None:
    """Raises DataError, naming the place in `where`, when labels, classes and shapes do not belong together."""
    names = source.class_names
    if len(names) < 2 or len(set(names)) != len(names):
        problem = "has one class" if len(names) == 1 else "has no class" if not names else "has two classes of one name"
        raise DataError(f"{where['train']} {problem}", expected="two classes or more, of different names")
    for split, place in where.items():
        images = getattr(source, split)
        if images is None:
            continue
        count = len(images.images) if isinstance(images, ImageArrays) else len(images.paths)
        if len(images.labels) != count:
            raise DataError(f"{place} has {count} images, but {len(images.labels)} labels")
        if count == 0:
            raise DataError(f"{place} has no images")
        outside = images.labels[(images.labels < 0) | (images.labels >= len(names))]
        if len(outside):
            raise DataError(
                f"{place} has label {outside[0]}", expected=f"0 to {len(names) - 1}, for {len(names)} classes"
            )
        if isinstance(images, ImageArrays) and images.images.shape[1:] != source.train.images.shape[1:]:
            raise DataError(
                f"{place} has images of shape {list(images.images.shape[1:])}",
                expected=f"{list(source.train.images.shape[1:])}, as in {where['train']}",
            )
    empty = np.flatnonzero(np.bincount(source.train.labels, minlength=len(names)) == 0)
    if len(empty):
        raise DataError(f"{where['train']} has no image of class {names[empty[0]]!r} ({len(empty)} such classes)")


def noting_size(source: Source, **published: int) -> Source:
    """The source, with a note where it is not as large as it was published.

    Args:
        published: number of images under "train", "val" and "test", and of classes under "classes".
    """
    splits = {split: getattr(source, split) for split in ("train", "val", "test")}
    here = {split: len(images.labels) for split, images in splits.items() if images is not None}
    here["classes"] = len(source.class_names)
    if here == published:
        return source
    words = [", ".join(f"{sizes.get(key, 0):,} {key}" for key in published) for sizes in (here, published)]
    note = f"this is not the whole data set, so its figures compare with no others': {words[0]}; published: {words[1]}"
    return dataclasses.replace(source, notes=[*source.notes, note])
