"""Packed files: `<data_root>/<name>/{train,test}.npz` and perhaps `val.npz`. They are never unpickled."""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vkd.data.contract import ImageArrays, Source, check_splits
from vkd.errors import DataError, list_names

MOST_BYTES = 64 << 30
"""A packed array that declares more is refused unread."""
MOST_COMPRESSION = 1000
"""A packed array above 64 MiB that was compressed harder is refused unread: no photographs are, a zip bomb is."""
MOST_CLASSES = 2**20
MOST_NAME_LENGTH = 1000
"""Of a class, in characters."""
MOST_HEADER_BYTES = 10_000
"""Of the text that says what an array is; NumPy reads no longer one, but makes room for it first."""
PACKED_FORMAT = "images uint8 [N, H, W, C], labels int64 [N], class_names str [C]"


def packed_names(data_root: Path) -> list[str]:
    """Names under which packed files lie in the data root."""
    return [file.parent.name for file in data_root.glob("*/train.npz")]


def read_packed(folder: Path) -> Source:
    """Reads `folder`/{train,val,test}.npz; val.npz may be absent."""
    files = {split: folder / f"{split}.npz" for split in ("train", "val", "test")}
    if not files["val"].is_file():
        del files["val"]
    arrays = {split: _read_split(file) for split, file in files.items()}
    names = arrays["train"][1]
    for split, file in files.items():
        if arrays[split][1] != names:
            raise DataError(f"{file} and {files['train']} have different class_names", expected="the same in both")
    source = Source(
        train=arrays["train"][0],
        val=arrays["val"][0] if "val" in arrays else None,
        test=arrays["test"][0],
        class_names=names,
        notes=[f"read from the packed files in {folder}"],
    )
    check_splits(source, {split: str(file) for split, file in files.items()})
    return source


def _read_split(file: Path) -> tuple[ImageArrays, list[str]]:
    """The images and class names of one packed file. Raises DataError, naming it, for whatever is wrong with it."""
    try:
        with zipfile.ZipFile(file) as archive:
            images, labels, names = (_read_array(file, archive, key) for key in ("images", "labels", "class_names"))
    except _DAMAGE as error:
        raise _damaged(file, str(error)) from error
    except MemoryError as error:
        raise DataError(f"{file} does not fit into memory") from error
    return ImageArrays(images, labels), [str(name) for name in names]


_DAMAGE = (
    *(OSError, ValueError, EOFError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(f"{file} is damaged: {reason}", expected=f"an npz file with {PACKED_FORMAT}", hint="make it again")


def _read_array(file: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array of an npz file, after a look at what its header and the archive's directory declare."""
    try:
        member = archive.getinfo(f"{key}.npy")
    except KeyError:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        raise DataError(f"{file} has no {key}, but {list_names(found) or 'nothing'}", expected=PACKED_FORMAT) from None
    size, compression = member.file_size, member.file_size / max(member.compress_size, 1)
    if size > MOST_BYTES or (size > 64 << 20 and compression > MOST_COMPRESSION):
        raise DataError(
            f"{file}: {key} would unpack to {size:,} bytes from {member.compress_size:,}, and is refused",
            expected=f"at most {MOST_BYTES >> 30} GiB, compressed at most {MOST_COMPRESSION} to 1",
            hint="write it with np.savez, uncompressed, or use an image folder",
        )
    if size > _memory_bytes():
        raise DataError(f"{file} does not fit into memory: {key} alone has {size:,} bytes")
    shape, dtype, header_bytes = _read_header(archive, member, key)
    if dtype.hasobject:
        raise DataError(f"{file}: {key} is an array of Python objects, which are not loaded", expected=PACKED_FORMAT)
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared + header_bytes != size:
        raise ValueError(
            f"{key} declares {list(shape)} of {dtype}, {declared:,} bytes, but has {size - header_bytes:,}"
        )
    _check_array(file, key, shape, dtype)
    with archive.open(member) as handle:
        array = np.lib.format.read_array(handle, allow_pickle=False)
        handle.read(1)  # at the end of the member, where its checksum is compared
    return array


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and dtype that the header of an array declares, and the header's length in bytes, itself included.

    Raises ValueError where it is no header.
    """
    with archive.open(member) as handle:
        version = np.lib.format.read_magic(handle)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} has version {version} of numpy's format")
        digits = 2 if version == (1, 0) else 4
        before = handle.tell()
        length = int.from_bytes(handle.read(digits), "little")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"{key} has a header of {length:,} bytes")
        handle.seek(before)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(handle)
        return shape, dtype, handle.tell()


def _check_array(file: Path, key: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises DataError where an array of this shape and dtype, not read yet, is not what belongs under `key`."""
    right, expected = {
        "images": (dtype == np.uint8 and len(shape) == 4, "uint8 [N, H, W, C]"),
        "labels": (dtype == np.int64 and len(shape) == 1, "int64 [N]"),
        "class_names": (dtype.kind == "U" and len(shape) == 1, "str [C]"),
    }[key]
    if not right:
        raise DataError(f"{file}: {key} is {dtype} {list(shape)}", expected=expected)
    if key == "images" and 0 in shape[1:]:
        raise DataError(f"{file}: images is uint8 {list(shape)}, so there are no pixels")
    # Names without a letter take no room, however many there are.
    is_long = shape[0] > MOST_CLASSES or not 0 < dtype.itemsize <= MOST_NAME_LENGTH * np.dtype("U1").itemsize
    if key == "class_names" and shape[0] > 0 and is_long:
        raise DataError(
            f"{file}: class_names is {dtype} {list(shape)}",
            expected=f"at most {MOST_CLASSES:,} names of 1 to {MOST_NAME_LENGTH:,} characters",
        )


def _memory_bytes() -> float:
    """The memory of this machine; without limit where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf
