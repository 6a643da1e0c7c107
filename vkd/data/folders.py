"""Data sets that lie in folders of image files, a folder a class: your own, ImageNet, Tiny-ImageNet."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vkd.config import DatasetConfig
from vkd.data.contract import SOURCES, ImageFiles, Source, given_root, noting_size
from vkd.errors import DataError, nearest


@SOURCES.register("imagefolder")
def imagefolder(config: DatasetConfig, _data_root: Path) -> Source:
    """Images in `config.root`/{train,val,test}/<class>/**; without test/, val/ is the test split and a note says so."""
    root = given_root(config)
    if root is None:
        raise DataError(
            "dataset.root is null, so there is no image folder to read",
            expected="a folder with train/<class>/ and test/<class>/ or val/<class>/",
            hint="dataset.root=path/to/folder",
        )
    present = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if "train" not in present:
        raise DataError(f"{root / 'train'} is not there", expected="a folder with one folder a class")
    if len(present) == 1:
        raise DataError(f"neither {root / 'test'} nor {root / 'val'} is there", expected="images to test on")
    splits = {split: split for split in present}
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    source = _read_folders(root, splits)
    if splits["test"] == "val":
        source.notes.append(f"{root} has no test/, so val/ is the test split, and nothing is selected on it")
    return source


@SOURCES.register("imagenet")
def imagenet(config: DatasetConfig, data_root: Path) -> Source:
    """ImageNet-1k: 1,281,167 photos of 1,000 classes to train on, and its 50,000 val photos as the test split.

    They lie in train/<wnid>/ and val/<wnid>/ of `config.root` (default: imagenet/ of the data root). The labels count
    the sorted wnids, as those of published networks do, and the wnids are the class names.

    Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 2015.
    """
    root = given_root(config) or data_root / "imagenet"
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(
                f"data set 'imagenet' is not (whole) in {root}: {root / split} is not there, and it cannot be fetched "
                "without an account",
                expected=f"{root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG; or dataset.root=...",
                hint="get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
                f"image-net.org, put them into {root}, and torchvision.datasets.ImageNet(root, split='train') and "
                "(root, split='val') unpack them into these folders",
            )
    with _named_errors(root), os.scandir(root / "val") as entries:
        is_flat = not any(entry.is_dir() for entry in entries)
    if is_flat:
        raise DataError(
            f"{root / 'val'} has no class folders",
            expected=f"{root}/val/<wnid>/*.JPEG, not the flat folder of the archive",
            hint=f"delete it, put the archive and the devkit into {root}, and torchvision.datasets.ImageNet(root, "
            "split='val') sorts them",
        )
    source = _read_folders(root, {"train": "train", "test": "val"})
    source.notes.append("ImageNet's val split is the test split, since its own has no labels")
    return noting_size(source, train=1_281_167, test=50_000, classes=1_000)


@SOURCES.register("tiny_imagenet")
def tiny_imagenet(config: DatasetConfig, data_root: Path) -> Source:
    """Tiny-ImageNet: 100,000 photos, 64x64x3, of 200 classes to train on, and its 10,000 val photos as the test split.

    They lie as published, in train/<wnid>/images/ and in val/images/ with val/val_annotations.txt, in `config.root`
    (default: tiny_imagenet/ or tiny-imagenet-200/ of the data root); val/<wnid>/, into which many sort it, is read too.
    The labels count the sorted wnids. The class names are the words of words.txt, or the wnids where it is not there.

    Le, Yang: Tiny ImageNet Visual Recognition Challenge. CS 231N, Stanford 2015.
    """
    usual = [data_root / name for name in ("tiny_imagenet", "tiny-imagenet-200")]
    root = given_root(config) or next((folder for folder in usual if folder.is_dir()), usual[1])
    annotations = root / "val" / "val_annotations.txt"
    is_published = (root / "val" / "images").is_dir()
    needed = [root / "train", *([annotations] if is_published else [root / "val"])]
    absent = [path for path in needed if not path.exists()]
    if absent:
        raise DataError(
            f"data set 'tiny_imagenet' is not (whole) in {root}: {absent[0]} is not there",
            expected=f"in {root}: train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt, words.txt; "
            "or another folder: dataset.root=...",
            hint=f"fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in {data_root}",
        )
    if is_published:
        with _named_errors(root):
            wnids = _class_folders(root / "train")
            train, _ = _scan(root, "train", wnids)
            source = _with_lacking_noted(Source(train, None, _annotated(annotations, wnids), wnids))
    else:
        source = _read_folders(root, {"train": "train", "test": "val"}, left_out_noted=False)  # as the *_boxes.txt are
    source.notes.append("Tiny-ImageNet's val split is the test split, since its own has no labels")
    with _named_errors(root):
        names = _words(root / "words.txt", source.class_names)
    return noting_size(dataclasses.replace(source, class_names=names), train=100_000, test=10_000, classes=200)


def _annotated(annotations: Path, wnids: Sequence[str]) -> ImageFiles:
    """The images beside Tiny-ImageNet's val_annotations.txt, whose lines begin with <file>, tab, <wnid>, tab."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labelled: dict[str, int] = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        file, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in label_of or "/" in file:
            raise DataError(
                f"{annotations}, line {number}: {line!r} names no class of {annotations.parent.parent / 'train'}",
                expected="<file>, a tab, <wnid>, a tab and a box, such as val_0.JPEG, n03444034, ...",
            )
        labelled[f"val/images/{file}"] = label_of[wnid]
    root = annotations.parent.parent
    paths = sorted(labelled)
    sizes = [(root / path).stat().st_size for path in paths]
    labels = [labelled[path] for path in paths]
    return ImageFiles(root, paths, np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64))


def _words(file: Path, wnids: Sequence[str]) -> list[str]:
    """What words.txt (<wnid>, tab, words) calls the classes; a wnid stays where it has none, and beside equal words."""
    if not file.is_file():
        return list(wnids)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    words_of = dict(line.split("\t", 1) for line in lines if "\t" in line)
    names = [words_of.get(wnid, wnid).strip() for wnid in wnids]
    return [name if names.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def _read_folders(root: Path, folders: dict[str, str], *, left_out_noted: bool = True) -> Source:
    """The source whose split "train", "test", perhaps "val", lies in the folder of the root that `folders` names.

    Args:
        left_out_noted: whether a note says how many files are no images.
    """
    with _named_errors(root):
        class_names = _class_folders(root / folders["train"])
        scanned = {split: _scan(root, folder, class_names) for split, folder in folders.items()}
    notes = [
        f"left out of {root / folders[split]}, by the end of the name: {skipped:,} file{'s' if skipped > 1 else ''}"
        for split, (_, skipped) in scanned.items()
        if skipped and left_out_noted
    ]
    splits = {split: files for split, (files, _) in scanned.items()}
    return _with_lacking_noted(Source(splits["train"], splits.get("val"), splits["test"], class_names, notes))


def _with_lacking_noted(source: Source) -> Source:
    """The source, with a note where classes have no test image."""
    lacking = len(source.class_names) - len(np.unique(source.test.labels))
    if lacking:
        source.notes.append(f"{lacking} of the {len(source.class_names)} classes have no test image")
    return source


@contextmanager
def _named_errors(root: Path) -> Iterator[None]:
    """Turns what the operating system raises into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, hidden ones left out. DataError when there are none."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders", expected=f"{folder}/<class>/<image>")
    return names


def _scan(root: Path, split: str, class_names: Sequence[str]) -> tuple[ImageFiles, int]:
    """The image files of one split, sorted by path, and how many files were left out for their extension."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    skipped = 0
    for name in _class_folders(root / split):
        if name not in label_of:
            raise DataError(
                f"{root / split / name} is a class that {root / 'train'} lacks",
                expected="class folders of the same names",
                hint=" or ".join(nearest(name, class_names)),
            )
        found, others = _images_below(root, f"{split}/{name}", IMG_EXTENSIONS)
        skipped += others
        if not found:
            raise DataError(
                f"{root / split / name} has no images", expected=f"files that end in {', '.join(IMG_EXTENSIONS)}"
            )
        found.sort()
        paths += [path for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label_of[name]] * len(found)
    files = ImageFiles(root, paths, np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64))
    return files, skipped


def _images_below(root: Path, folder: str, extensions: tuple[str, ...]) -> tuple[list[tuple[str, int]], int]:
    """(path relative to the root, size in bytes) of the images at any depth of a folder, and how many other files.

    What begins with a dot is passed over, and so is a link to a folder. There may be a million images, hence no `Path`.
    """
    found: list[tuple[str, int]] = []
    others = 0
    pending = [folder]
    while pending:
        current = pending.pop()
        with os.scandir(root / current) as entries:
            for entry in entries:
                path = f"{current}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if not entry.is_symlink():
                        pending.append(path)
                elif entry.name.lower().endswith(extensions):
                    found.append((path, entry.stat().st_size))
                else:
                    others += 1
    return found, others
