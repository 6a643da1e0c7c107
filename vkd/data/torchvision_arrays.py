"""Data sets of small images of one size, which torchvision reads into arrays."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vkd.config import DatasetConfig
from vkd.data.contract import SOURCES, ImageArrays, Source
from vkd.data.originals import Original, attribute


@SOURCES.register("cifar10")
def cifar10(config: DatasetConfig, data_root: Path) -> Source:
    """CIFAR-10: 50,000 + 10,000 photos, 32x32x3."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10).source(config, data_root)


@SOURCES.register("cifar100")
def cifar100(config: DatasetConfig, data_root: Path) -> Source:
    """CIFAR-100: 50,000 + 10,000 photos, 32x32x3, fine labels."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100).source(config, data_root)


@SOURCES.register("fashion_mnist")
def fashion_mnist(config: DatasetConfig, data_root: Path) -> Source:
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28x28x1."""
    from torchvision.datasets import FashionMNIST

    archives = [f"FashionMNIST/raw/{file}" for file, _ in FashionMNIST.resources]
    original = Original(
        name="fashion_mnist",
        reader=FashionMNIST,
        parts={"train": {"train": True}, "test": {"train": False}},
        files=[archive.removesuffix(".gz") for archive in archives],
        archives=dict.fromkeys(archives),  # of any compression, so of any md5
        urls=[FashionMNIST.mirrors[0]],
        assemble=_assemble,
        packs=True,
    )
    return original.source(config, data_root)


@SOURCES.register("svhn")
def svhn(config: DatasetConfig, data_root: Path) -> Source:
    """SVHN, Street View House Numbers: 73,257 + 26,032 photos of digits, 32x32x3, without the 531,131 "extra" ones.

    Label 0 is the digit 0, which the authors' files call 10.
    """
    from torchvision.datasets import SVHN

    published = {split: attribute(SVHN, "split_list")[split] for split in ("train", "test")}
    original = Original(
        name="svhn",
        reader=SVHN,
        parts={split: {"split": split} for split in published},
        files=[file for _, file, _ in published.values()],
        archives={file: md5 for _, file, md5 in published.values()},
        urls=[url for url, _, _ in published.values()],
        assemble=partial(
            _assemble, labels="labels", channels_first=True, class_names=[str(digit) for digit in range(10)]
        ),
        packs=True,
    )
    return original.source(config, data_root)


@SOURCES.register("stl10")
def stl10(config: DatasetConfig, data_root: Path) -> Source:
    """STL-10: 5,000 + 8,000 photos, 96x96x3, of 10 classes.

    The 100,000 unlabelled images are in the archive, but neither kept nor needed; nor are the ten folds of 1,000
    training images.
    """
    from torchvision.datasets import STL10

    labelled = [entry for entry in STL10.train_list if not entry[0].startswith("unlabeled")]
    files = [file for file, _ in (*labelled, *STL10.test_list)] + [STL10.class_names_file]
    original = Original(
        name="stl10",
        reader=type("LabelledSTL10", (STL10,), {"train_list": labelled}),
        parts={split: {"split": split} for split in ("train", "test")},
        files=[f"{STL10.base_folder}/{file}" for file in files],
        archives={STL10.filename: STL10.tgz_md5},
        urls=[STL10.url],
        assemble=partial(_assemble, labels="labels", channels_first=True),
        packs=True,
    )
    return original.source(config, data_root)


def _cifar(name: str, reader: Any) -> Original:
    files = [file for file, _ in (*reader.train_list, *reader.test_list)] + [reader.meta["filename"]]
    return Original(
        name=name,
        reader=reader,
        parts={"train": {"train": True}, "test": {"train": False}},
        files=[f"{reader.base_folder}/{file}" for file in files],
        archives={reader.filename: reader.tgz_md5},
        urls=[reader.url],
        assemble=_assemble,
        packs=True,
    )


def _assemble(
    parts: dict[str, Any],
    _root: Path,
    *,
    labels: str = "targets",
    channels_first: bool = False,
    class_names: list[str] | None = None,
) -> Source:
    """The source of the readers of "train" and "test".

    Args:
        labels: the reader's attribute that holds them.
        channels_first: whether its pixels are [N, C, H, W], not [N, H, W, C] or [N, H, W].
        class_names: where the reader has none.
    """
    arrays = []
    for reader in parts.values():
        pixels = np.asarray(attribute(reader, "data"))
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        pixels = pixels.transpose(0, 2, 3, 1) if channels_first else pixels
        numbers = np.asarray(attribute(reader, labels)).astype(np.int64)
        arrays.append(ImageArrays(np.ascontiguousarray(pixels), numbers))
    names = class_names or attribute(parts["train"], "classes")
    return Source(arrays[0], None, arrays[1], [str(name) for name in names])
