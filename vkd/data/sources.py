"""Where pixels come from. A new data set is one function here (or one pair of packed files) and one yaml.

Packed files, `<data_root>/<name>/{train,test}.npz` and perhaps `val.npz`, are used wherever they are found, whatever
the name. Otherwise the function registered under the name reads the data set or fetches it: `folders` has those of
image folders, `torchvision_arrays` and `torchvision_files` those that torchvision reads.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np

from vkd.config import DatasetConfig
from vkd.data import folders, torchvision_arrays, torchvision_files  # noqa: F401  (they register what they read)
from vkd.data.contract import SOURCES, ImageArrays, ImageFiles, Images, Source, check_splits, content_identity
from vkd.data.packed import PACKED_FORMAT, packed_names, read_packed
from vkd.data.splits import stratified_split
from vkd.errors import ConfigError, DataError, list_names, nearest

__all__ = ["SOURCES", "ImageArrays", "ImageFiles", "Images", "Source", "content_identity", "load_source"]


def load_source(config: DatasetConfig, data_root: Path) -> Source:
    """Reads the data set called `config.name`: its packed files in `data_root`, else the registered function's.

    Raises:
        ConfigError: the name is not a plain word.
        DataError: there is no such data set, or it is missing or damaged.
    """
    name = str(config.name)
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ConfigError(
            f"dataset.name={name!r} is not a plain name", expected="a data set, or a folder of the data root"
        )
    folder = data_root / name
    present = [split for split in ("train", "test") if (folder / f"{split}.npz").is_file()]
    if len(present) == 1:
        missing = folder / ("test.npz" if present == ["train"] else "train.npz")
        raise DataError(f"{folder / present[0]}.npz is there, but {missing} is not", expected="both packed files")
    if present:
        return read_packed(folder)
    if name not in SOURCES:
        near = nearest(name, {*SOURCES, *packed_names(data_root)})
        raise DataError(
            f"there is no data set {name!r}",
            expected=f"{list_names(SOURCES, most=40)}, or packed files at {folder / 'train.npz'} and "
            f"{folder / 'test.npz'} ({PACKED_FORMAT})",
            hint=" or ".join(f"dataset.name={choice}" for choice in near),
        )
    source = SOURCES[name](config, data_root)
    check_splits(source, {split: f"{split} of data set {name!r}" for split in ("train", "val", "test")})
    return source


@SOURCES.register("digits")
def digits(_config: DatasetConfig, _data_root: Path) -> Source:
    """1,797 scans of handwritten digits, 8x8, from scikit-learn; a fixed stratified 500 of them are the test split."""
    # Its file alone: importing scikit-learn and with it SciPy takes longer than the first epochs.
    file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    scans = np.loadtxt(file, delimiter=",")  # 64 pixels from 0 to 16 and the class in each row
    images = np.rint(scans[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    arrays = ImageArrays(images, scans[:, -1].astype(np.int64))
    kept, held = stratified_split(arrays.labels, 500 / 1797, seed=0)
    return Source(arrays.subset(kept), None, arrays.subset(held), [str(digit) for digit in range(10)])
