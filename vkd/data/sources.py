"""Where pixels come from. A new data set is one function here (or one pair of packed files) and one yaml.

Packed files, `<data_root>/<name>/{train,test}.npz` and perhaps `val.npz`, are used wherever they are found, whatever
the name; they are never unpickled. Otherwise the function registered under the name reads the data set or fetches it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import math
import os
import shutil
import socket
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vkd.config import DatasetConfig
from vkd.data.splits import stratified_split
from vkd.errors import ConfigError, DataError, list_names, nearest
from vkd.registry import Registry

MOST_BYTES = 64 << 30
"""A packed array that declares more is refused unread."""
MOST_COMPRESSION = 1000
"""A packed array above 64 MiB that was compressed harder is refused unread: no photographs are, a zip bomb is."""
NETWORK_SECONDS = 30.0
"""A host that stays silent for longer counts as not reached."""
PACKED_FORMAT = "images uint8 [N, H, W, C], labels int64 [N], class_names str [C]"


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
        return _packed(folder)
    if name not in SOURCES:
        near = nearest(name, {*SOURCES, *_packed_names(data_root)})
        raise DataError(
            f"there is no data set {name!r}",
            expected=f"{list_names(SOURCES)}, or packed files at {folder / 'train.npz'} and {folder / 'test.npz'} "
            f"({PACKED_FORMAT})",
            hint=" or ".join(f"dataset.name={choice}" for choice in near),
        )
    source = SOURCES[name](config, data_root)
    _check_splits(source, {split: f"{split} of data set {name!r}" for split in ("train", "val", "test")})
    return source


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


def _check_splits(source: Source, where: dict[str, str]) -> None:
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


# Packed files


def _packed_names(data_root: Path) -> list[str]:
    """Names under which packed files lie in the data root."""
    return [file.parent.name for file in data_root.glob("*/train.npz")]


def _packed(folder: Path) -> Source:
    """Reads `folder`/{train,val,test}.npz; val.npz may be absent."""
    files = {split: folder / f"{split}.npz" for split in ("train", "val", "test")}
    if not files["val"].is_file():
        del files["val"]
    arrays = {split: _read_packed(file) for split, file in files.items()}
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
    _check_splits(source, {split: str(file) for split, file in files.items()})
    return source


def _read_packed(file: Path) -> tuple[ImageArrays, list[str]]:
    """The images and class names of one packed file. Raises DataError, naming it, for whatever is wrong with it."""
    try:
        with zipfile.ZipFile(file) as archive:
            images, labels, names = (_read_array(file, archive, key) for key in ("images", "labels", "class_names"))
    except _DAMAGE as error:
        raise _damaged(file, str(error)) from error
    except MemoryError as error:
        raise DataError(f"{file} does not fit into memory") from error
    for key, array, right, shape in (
        ("images", images, images.dtype == np.uint8 and images.ndim == 4, "uint8 [N, H, W, C]"),
        ("labels", labels, labels.dtype == np.int64 and labels.ndim == 1, "int64 [N]"),
        ("class_names", names, names.dtype.kind == "U" and names.ndim == 1, "str [C]"),
    ):
        if not right:
            raise DataError(f"{file}: {key} is {array.dtype} {list(array.shape)}", expected=shape)
    if 0 in images.shape[1:]:
        raise DataError(f"{file}: images is uint8 {list(images.shape)}, so there are no pixels")
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
    with archive.open(member) as handle:
        version = np.lib.format.read_magic(handle)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} has version {version} of numpy's format")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(handle)
        header_bytes = handle.tell()
    if dtype.hasobject:
        raise DataError(f"{file}: {key} is an array of Python objects, which are not loaded", expected=PACKED_FORMAT)
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared + header_bytes != size:
        raise ValueError(
            f"{key} declares {list(shape)} of {dtype}, {declared:,} bytes, but has {size - header_bytes:,}"
        )
    with archive.open(member) as handle:
        array = np.lib.format.read_array(handle, allow_pickle=False)
        handle.read(1)  # at the end of the member, where its checksum is compared
    return array


# Built in and downloaded


@SOURCES.register("digits")
def digits(_config: DatasetConfig, _data_root: Path) -> Source:
    """1,797 scans of handwritten digits, 8x8, from scikit-learn; a fixed stratified 500 of them are the test split."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.rint(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    arrays = ImageArrays(images, scans.target.astype(np.int64))
    kept, held = stratified_split(arrays.labels, 500 / 1797, seed=0)
    return Source(arrays.subset(kept), None, arrays.subset(held), [str(digit) for digit in range(10)])


@SOURCES.register("cifar10")
def cifar10(_config: DatasetConfig, data_root: Path) -> Source:
    """CIFAR-10: 50,000 + 10,000 photos, 32x32x3."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, data_root)


@SOURCES.register("cifar100")
def cifar100(_config: DatasetConfig, data_root: Path) -> Source:
    """CIFAR-100: 50,000 + 10,000 photos, 32x32x3, fine labels."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, data_root)


@SOURCES.register("fashion_mnist")
def fashion_mnist(_config: DatasetConfig, data_root: Path) -> Source:
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28x28x1."""
    from torchvision.datasets import FashionMNIST

    archives = [f"FashionMNIST/raw/{file}" for file, _ in FashionMNIST.resources]
    original = _Original(
        name="fashion_mnist",
        reader=FashionMNIST,
        files=[archive.removesuffix(".gz") for archive in archives],
        archives=archives,
        url=FashionMNIST.mirrors[0],
    )
    return original.source(data_root)


def _cifar(name: str, reader: Any, data_root: Path) -> Source:
    files = [file for file, _ in (*reader.train_list, *reader.test_list)] + [reader.meta["filename"]]
    original = _Original(
        name=name,
        reader=reader,
        files=[f"{reader.base_folder}/{file}" for file in files],
        archives=[reader.filename],
        url=reader.url,
    )
    return original.source(data_root)


@dataclass(frozen=True)
class _Original:
    """A data set in the form in which its authors publish it, which torchvision reads, fetches and checks (md5).

    files: what torchvision reads; archives: what it makes them of. Both relative to the data root.
    """

    name: str
    reader: Any
    files: list[str]
    archives: list[str]
    url: str

    def source(self, data_root: Path) -> Source:
        """Reads the files, making them from archives in the data root or from a download where need be."""
        try:
            return self._read(data_root)
        except RuntimeError:  # torchvision's way to say that files are absent or fail their md5
            with _one_at_a_time():
                return self._fetch_and_read(data_root)

    def _fetch_and_read(self, data_root: Path) -> Source:
        with suppress(RuntimeError):
            return self._read(data_root)  # another run fetched it meanwhile
        try:
            self._fetch(data_root)
            return self._read(data_root)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            host = self.url.split("/")[2]
            raise DataError(
                f"data set {self.name!r} is not (whole) in {data_root}, and {host} could not be reached or did not "
                f"deliver it: {' '.join(str(error).split())}",
                expected=f"in {data_root}: {', '.join(self.files)}; or {', '.join(self.archives)}; or packed files "
                f"{self.name}/train.npz and {self.name}/test.npz ({PACKED_FORMAT})",
                hint=f"fetch {self.url} elsewhere and put it there, or dataset=digits, which needs no download",
            ) from error

    def _read(self, data_root: Path) -> Source:
        try:
            splits = [self.reader(str(data_root), train=train) for train in (True, False)]
        except RuntimeError:
            raise
        except Exception as error:
            raise DataError(
                f"the files of {self.name!r} in {data_root} are damaged: {type(error).__name__}: {error}",
                hint=f"delete {', '.join(self.files)}, to have them made again",
            ) from error
        arrays = []
        for split in splits:
            pixels = np.asarray(split.data)
            pixels = pixels[..., None] if pixels.ndim == 3 else pixels
            arrays.append(ImageArrays(np.ascontiguousarray(pixels), np.asarray(split.targets, dtype=np.int64)))
        return Source(arrays[0], None, arrays[1], [str(name) for name in splits[0].classes])

    def _fetch(self, data_root: Path) -> None:
        """Makes the files in a folder of its own, then moves them in: an interruption leaves none half written."""
        with _temporary_folder(data_root) as folder:
            for archive in self.archives:
                if (data_root / archive).is_file():
                    (folder / archive).parent.mkdir(parents=True, exist_ok=True)
                    _place(data_root / archive, folder / archive)
            patience = socket.getdefaulttimeout()
            socket.setdefaulttimeout(NETWORK_SECONDS)
            try:
                self.reader(str(folder), train=True, download=True)
            finally:
                socket.setdefaulttimeout(patience)
            for file in self.files:
                (data_root / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).replace(data_root / file)


def _place(archive: Path, target: Path) -> None:
    """Offers an archive that lies in the data root to torchvision, under `target`.

    A single file's .gz is unpacked here, since torchvision takes it in the authors' own compression alone, and not in
    that of, say, Debian's package; the unpacked file is checked as any placed by hand is.
    """
    if archive.suffix != ".gz" or archive.name.endswith(".tar.gz"):
        target.symlink_to(archive.resolve())
        return
    try:
        with gzip.open(archive) as packed, target.with_suffix("").open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{archive} is damaged: {error}", hint="fetch it again, or delete it") from error


@contextmanager
def _temporary_folder(data_root: Path) -> Iterator[Path]:
    """A folder in `data_root` (made if need be) that is gone afterwards, as is the root if nothing was put in it."""
    made = not data_root.exists()
    data_root.mkdir(parents=True, exist_ok=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=data_root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if made:
            with suppress(OSError):
                data_root.rmdir()


def _one_at_a_time() -> FileLock:
    """A lock for this machine and user, so that the runs of a sweep do not all fetch the same data set."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return FileLock(Path(tempfile.gettempdir()) / f"vkd-fetching-{user}.lock")


# Image folders


@SOURCES.register("imagefolder")
def imagefolder(config: DatasetConfig, _data_root: Path) -> Source:
    """Images in `config.root`/{train,val,test}/<class>/**; without test/, val/ is the test split and a note says so."""
    if config.root is None:
        raise DataError(
            "dataset.root is null, so there is no image folder to read",
            expected="a folder with train/<class>/ and test/<class>/ or val/<class>/",
            hint="dataset.root=path/to/folder",
        )
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"dataset.root={root} is not a folder" if root.exists() else f"dataset.root={root} does not exist"
        )
    present = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if "train" not in present:
        raise DataError(f"{root / 'train'} is not there", expected="a folder with one folder a class")
    if len(present) == 1:
        raise DataError(f"neither {root / 'test'} nor {root / 'val'} is there", expected="images to test on")
    try:
        class_names = _class_folders(root / "train")
        scanned = {split: _scan(root, split, class_names) for split in present}
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    notes = [
        f"left out of {root / split}, by the end of the name: {skipped:,} file{'s' if skipped > 1 else ''}"
        for split, (_, skipped) in scanned.items()
        if skipped
    ]
    splits = {split: files for split, (files, _) in scanned.items()}
    if "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"{root} has no test/, so val/ is the test split, and nothing is selected on it")
    lacking = len(class_names) - len(np.unique(splits["test"].labels))
    if lacking:
        notes.append(f"{lacking} of the {len(class_names)} classes have no test image")
    return Source(splits["train"], splits.get("val"), splits["test"], class_names, notes)


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
        found: list[tuple[str, int]] = []
        for folder, inner, files in os.walk(root / split / name):
            inner[:] = [part for part in inner if not part.startswith(".")]
            for file in files:
                if file.startswith("."):
                    continue
                if not file.lower().endswith(IMG_EXTENSIONS):
                    skipped += 1
                    continue
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path.stat().st_size))
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
