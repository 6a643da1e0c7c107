"""From a config to data that one can train on: reads the source, carves off validation, chooses how to load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vkd.config import DatasetConfig
from vkd.data.augmentation import build_augmentations
from vkd.data.batches import Data, Description
from vkd.data.normalization import Normalization
from vkd.data.resident import ResidentData
from vkd.data.sources import ImageArrays, Images, Source, content_identity, load_source
from vkd.data.splits import held_counts, stratified_split
from vkd.data.streaming import Geometry, StreamingData
from vkd.errors import ConfigError, DataError


def load_data(
    config: DatasetConfig, data_root: str | Path, *, device: torch.device, workers: int = 2, views: int = 1
) -> Data:
    """Reads, checks and splits the data set that `config` names.

    Arrays of pixels are kept on `device` ("resident"); folders of files are read by workers ("streaming").

    Args:
        data_root: folder of packed and downloaded data sets.
        device: where batches are yielded, and where resident pixels lie.
        workers: processes that read image files; 0 reads in this one. No effect on what is yielded.
        views: how many views of a training image will be asked for at most; the augmentation of the further ones is
            looked at only where there are any.

    Raises:
        ConfigError: a key of `dataset.*` is impossible, or does not fit the images.
        DataError: the data are missing, damaged or too few.
    """
    if not 0 <= config.val_fraction < 1:
        raise ConfigError(
            f"dataset.val_fraction={config.val_fraction} is outside [0, 1)",
            expected="the share of train to select on, or 0 for no selection",
            hint="dataset.val_fraction=0.1",
        )
    if not 0 < config.train_fraction <= 1:
        raise ConfigError(
            f"dataset.train_fraction={config.train_fraction} is outside (0, 1]",
            expected="the share of the training images to learn from, or 1 for all of them",
            hint="dataset.train_fraction=1",
        )
    if workers < 0:
        raise ConfigError(f"workers={workers}", expected="0 or more processes")
    source = load_source(config, Path(data_root).expanduser())
    splits, notes = _split(source, config)
    if config.train_fraction < 1:
        splits["train"], note = _share(splits["train"], config)
        notes.append(note)
    resident = isinstance(source.train, ImageArrays)
    channels, image_size = source.train.images.shape[3] if resident else 3, _image_size(source.train, config)
    normalization = Normalization(config.mean, config.std, channels)
    description = Description(
        name=config.name,
        class_names=list(source.class_names),
        channels=channels,
        image_size=image_size,
        mean=normalization.mean,
        std=normalization.std,
        notes=[*source.notes, *notes],
        identity=content_identity(source),
    )
    loading, device, view_augmentations = "resident" if resident else "streaming", torch.device(device), None
    augmentations = build_augmentations(config.augmentation, loading, channels=channels)
    if views > 1:
        key = "dataset.view_augmentation"
        view_augmentations = build_augmentations(config.view_augmentation, loading, channels=channels, key=key)
    if resident:
        return ResidentData(description, splits, augmentations, device, view_augmentations)
    geometry = Geometry(image_size[0], config.crop_fraction, config.interpolation)
    return StreamingData(description, splits, augmentations, geometry, device, workers, view_augmentations)


def _image_size(train: Images, config: DatasetConfig) -> tuple[int, int]:
    """(height, width) of the images as a network sees them."""
    if not isinstance(train, ImageArrays):
        if config.image_size is None:
            raise ConfigError(
                "dataset.image_size is null, and the images of a folder have sizes of their own",
                expected="the side in pixels to which they are cut",
                hint="dataset.image_size=224",
            )
        return config.image_size, config.image_size
    height, width = train.images.shape[1:3]
    if config.image_size is not None and (height, width) != (config.image_size, config.image_size):
        raise ConfigError(
            f"dataset.image_size={config.image_size}, but the images of {config.name!r} are {height}x{width}",
            hint="dataset.image_size=null",
        )
    return height, width


def _share(train: Images, config: DatasetConfig) -> tuple[Images, str]:
    """`dataset.train_fraction` of the training images, at least one of each class, and what to say about it."""
    alone = np.bincount(train.labels)[train.labels] == 1
    _, chosen = stratified_split(train.labels, config.train_fraction, config.split_seed)
    chosen = np.union1d(chosen, np.flatnonzero(alone))
    note = f"{len(chosen):,} of {len(train.labels):,} training images are used (dataset.train_fraction)"
    return train.subset(chosen), note


def _split(source: Source, config: DatasetConfig) -> tuple[dict[str, Images], list[str]]:
    """The splits to use, and what to say about them. `val` never comes from `test`, nor depends on it."""
    splits: dict[str, Images] = {"train": source.train, "test": source.test}
    if config.val_fraction == 0:
        return splits, [
            "the data set's own val split is not used, since dataset.val_fraction is 0"
        ] if source.val else []
    if source.val is not None:
        splits["val"] = source.val
        return splits, ["val is the data set's own val split; dataset.val_fraction only says that it is used"]
    labels = source.train.labels
    counts = np.bincount(labels, minlength=len(source.class_names))
    emptied = np.flatnonzero(held_counts(counts, config.val_fraction) >= counts)
    if len(emptied):
        worst = emptied[0]
        raise DataError(
            f"dataset.val_fraction={config.val_fraction} leaves class {source.class_names[worst]!r} with "
            f"{counts[worst]} image{'s' if counts[worst] > 1 else ''} none to train on",
            expected="a fraction that leaves every class one",
            hint="dataset.val_fraction=0.1, or 0",
        )
    kept, held = stratified_split(labels, config.val_fraction, config.split_seed)
    if len(held) == 0:
        raise DataError(
            f"no class of {config.name!r} has two images, so none can be held for validation",
            hint="dataset.val_fraction=0",
        )
    splits["train"], splits["val"] = source.train.subset(kept), source.train.subset(held)
    lacking = int((counts == 1).sum())
    return splits, [f"{lacking} classes have one image each and are absent from val"] if lacking else []
