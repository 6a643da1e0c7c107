"""Tiny data sets on disk, and a machine without a network."""

import socket

import numpy as np
import pytest
from PIL import Image

from vkd.config import DatasetConfig


@pytest.fixture
def config():
    """A function that makes a DatasetConfig of one channel, with any field replaced."""

    def make(name="digits", **fields):
        return DatasetConfig(**{"name": name, "mean": [0.5], "std": [0.25], **fields})

    return make


@pytest.fixture
def write_packed(tmp_path):
    """A function that writes one packed split, with any array replaced, and returns its path."""

    def write(name="mine", split="train", count=20, classes=4, size=(6, 5), channels=3, savez=np.savez, **arrays):
        random = np.random.RandomState(len(split))
        contents = {
            "images": random.randint(0, 256, (count, *size, channels), dtype=np.uint8),
            "labels": np.arange(count, dtype=np.int64) % classes,
            "class_names": np.array([f"class {index}" for index in range(classes)]),
        }
        contents.update(arrays)
        path = tmp_path / name / f"{split}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        savez(path, **{key: value for key, value in contents.items() if value is not None})
        return path

    return write


@pytest.fixture
def image_folder(tmp_path):
    """A function that writes an image folder of `per_class` PNG files for each split and class; returns its root."""

    def write(splits=("train", "val", "test"), classes=("ant", "bee", "cat"), per_class=4, name="pictures"):
        random = np.random.RandomState(0)
        root = tmp_path / name
        for split in splits:
            for label, kind in enumerate(classes):
                folder = root / split / kind
                folder.mkdir(parents=True)
                for number in range(per_class):
                    pixels = random.randint(0, 256, (20 + 3 * label, 24 + number, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return write


@pytest.fixture
def no_network(monkeypatch):
    """Name look-ups fail at once, as on a machine that is not connected."""

    def unreachable(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
