"""Data sets in the form in which their authors publish them: files in the data root, else archives there, else fetched.

torchvision's readers do the reading, the fetching and the checking (md5).
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vkd.config import DatasetConfig
from vkd.data.contract import ImageFiles, Source, given_root
from vkd.data.packed import PACKED_FORMAT
from vkd.errors import DataError, UserError

NETWORK_SECONDS = 30.0
"""A host that stays silent for longer counts as not reached."""
TORCHVISION = "0.24 to 0.29"
"""The versions whose readers were seen to have the attributes that are read here."""


class _NotWhole(Exception):
    """Files of a data set are absent, or fail their md5."""


@dataclass(frozen=True)
class Original:
    """A data set in the form in which its authors publish it, read by torchvision.

    name: as in the config.
    reader: torchvision's class.
    parts: the keyword arguments of the reader for each part of the data set that is read.
    files: files and folders that the reader needs, relative to torchvision's root.
    archives: what it makes them of and their md5, None where it checks none; relative to torchvision's root. A file
        that is fetched as it is stands here too.
    urls: where the archives come from; none where they can no longer be fetched.
    assemble: the source that the readers of all parts and torchvision's root make.
    packs: whether packed files are another way to provide it.
    """

    name: str
    reader: Any
    parts: Mapping[str, Mapping[str, Any]]
    files: Sequence[str]
    archives: Mapping[str, str | None]
    urls: Sequence[str]
    assemble: Callable[[dict[str, Any], Path], Source]
    packs: bool = field(default=False, kw_only=True)

    def source(self, config: DatasetConfig, data_root: Path) -> Source:
        """Reads the files, making them from archives or from a download where need be.

        torchvision's root is `config.root` where that is given, else the data root.

        Raises:
            DataError: saying what to put where, when that is in vain; or naming what is damaged.
        """
        root = given_root(config) or data_root
        try:
            return self._read(root)
        except _NotWhole as error:
            if not self.urls:
                raise DataError(
                    f"data set {self.name!r} is not (whole) in {root}: {error}; it can no longer be fetched from its "
                    "authors",
                    expected=f"in {root}: {', '.join(self.files)}",
                    hint="put it there, or dataset=digits, which needs no download",
                ) from error
            with _one_at_a_time():
                return self._fetch_and_read(root, data_root)

    def _read(self, root: Path) -> Source:
        for file in self.files:
            if not (root / file).exists():
                raise _NotWhole(f"{root / file} is not there")
        try:
            parts = {part: self.reader(str(root), **arguments) for part, arguments in self.parts.items()}
            return self.assemble(parts, root)
        except UserError:
            raise
        except RuntimeError as error:  # torchvision's way to say that files are absent or fail their md5
            raise _NotWhole(" ".join(str(error).split())) from error
        except Exception as error:
            raise DataError(
                f"the files of {self.name!r} in {root} are damaged: {type(error).__name__}: {error}",
                hint=f"restore them, or delete {', '.join(self.files)}, to have them made again",
            ) from error

    def _fetch_and_read(self, root: Path, data_root: Path) -> Source:
        try:
            return self._read(root)  # another run fetched it meanwhile
        except _NotWhole as error:
            self._refuse_half_folders(root, error)
        try:
            self._fetch(root)
            return self._read(root)
        except OSError as error:
            raise DataError(
                f"data set {self.name!r} cannot be put into {root}: {error.strerror or error}",
                hint="data_root=a/folder/of/yours, with room for it",
            ) from error
        except _NotWhole as error:
            host = self.urls[0].split("/")[2]
            ways = [", ".join(self.files)]
            if not set(self.archives) <= set(self.files):
                ways.append(", ".join(self.archives))
            if self.packs:
                packed = data_root / self.name
                ways.append(f"packed files {packed / 'train.npz'} and {packed / 'test.npz'} ({PACKED_FORMAT})")
            raise DataError(
                f"data set {self.name!r} is not (whole) in {root}, and {host} could not be reached or did not "
                f"deliver it: {error}",
                expected=f"in {root}: {'; or '.join(ways)}",
                hint=f"fetch {', '.join(self.urls)} elsewhere and put it there under these names, or dataset=digits, "
                "which needs no download",
            ) from error

    def _refuse_half_folders(self, root: Path, reason: _NotWhole) -> None:
        """Raises DataError when folders of the data set are there: what a user may have put there is not replaced."""
        folders = [str(root / file) for file in self.files if (root / file).is_dir()]
        if folders:
            raise DataError(
                f"{folders[0]} is there, but data set {self.name!r} is not whole: {reason}",
                expected=f"in {root}: {', '.join(self.files)}",
                hint=f"add what is missing, or delete {', '.join(folders)}, to have it made again",
            ) from reason

    def _fetch(self, root: Path) -> None:
        """Makes the files in a folder of its own, then moves them in: an interruption leaves none half written."""
        with _temporary_folder(root) as folder:
            lacking = [archive for archive, md5 in self.archives.items() if not self._offer(root, folder, archive, md5)]
            try:
                with _timeout(), _safe_unpacking(checked=None not in self.archives.values()):
                    for arguments in self.parts.values():
                        self.reader(str(folder), **arguments, download=True)
            except Exception as error:  # whatever the network, an archive and torchvision's parsers may raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                if lacking:
                    raise _NotWhole(reason) from error
                raise DataError(
                    f"{', '.join(str(root / archive) for archive in self.archives)}: data set {self.name!r} cannot be "
                    f"made of this ({reason})",
                    hint="fetch it again, or delete it",
                ) from error
            for file in self.files:
                if not (folder / file).exists():
                    raise _NotWhole(f"what was fetched has no {file}")
                if not (folder / file).is_symlink():  # one that was offered is in its place
                    (root / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).replace(root / file)

    def _offer(self, root: Path, folder: Path, archive: str, md5: str | None) -> bool:
        """Whether an archive lies in the root; it then lies in `folder`, where torchvision looks for it, too.

        A single file's .gz is unpacked here, since torchvision takes it in the authors' own compression alone, and not
        in that of, say, Debian's package; the unpacked file is checked as any placed by hand is.
        """
        from torchvision.datasets.utils import check_integrity

        placed, target = root / archive, folder / archive
        if not placed.is_file():
            return False
        if md5 is not None and not check_integrity(placed, md5):
            if archive in self.files:
                return False  # to be made again
            # torchvision would write over it, through the link
            raise DataError(f"{placed} is damaged: its md5 is not {md5}", hint="fetch it again, or delete it")
        target.parent.mkdir(parents=True, exist_ok=True)
        if placed.suffix != ".gz" or placed.name.endswith(".tar.gz"):
            target.symlink_to(placed.resolve())
            return True
        try:
            with gzip.open(placed) as packed, target.with_suffix("").open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{placed} is damaged: {error}", hint="fetch it again, or delete it") from error
        return True


def attribute(reader: Any, name: str) -> Any:
    """An attribute of one of torchvision's readers. Raises DataError where this version has it not."""
    try:
        return getattr(reader, name)
    except AttributeError:
        import torchvision

        kind = reader if isinstance(reader, type) else type(reader)
        raise DataError(
            f"torchvision {torchvision.__version__} keeps {name} of {kind.__name__} elsewhere, so vkd cannot read it",
            expected=f"torchvision {TORCHVISION}",
            hint="pip install 'torchvision>=0.24,<0.30'",
        ) from None


def image_files(root: Path, paths: Sequence[str | Path], labels: Sequence[int]) -> ImageFiles:
    """Files and labels as a reader lists them, in the order of their paths, which is the same on every machine.

    Args:
        root: a folder that all `paths` start with.

    Raises:
        OSError: a file is not there.
    """
    relative = [Path(path).relative_to(root).as_posix() for path in paths]
    numbers = np.asarray(labels, dtype=np.int64)
    order = sorted(range(len(relative)), key=relative.__getitem__)
    ordered = [relative[position] for position in order]
    sizes = np.array([(root / path).stat().st_size for path in ordered], dtype=np.int64)
    return ImageFiles(root, ordered, numbers[order], sizes)


@contextmanager
def _timeout() -> Iterator[None]:
    """Gives up on hosts that stay silent for `NETWORK_SECONDS`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _safe_unpacking(*, checked: bool) -> Iterator[None]:
    """Keeps archives from writing outside their folder; torchvision does not.

    Args:
        checked: every archive has an md5, which vouches for it on a Python that cannot do that.

    Raises DataError on such a Python where one has none.
    """
    if not hasattr(tarfile, "data_filter"):
        if checked:
            yield
            return
        raise DataError(
            "this Python unpacks archives without a check of where they write to",
            expected="Python 3.10.12, 3.11.4 or any later one",
            hint="unpack the archive by hand, into the data root",
        )
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    """A folder in `root` (made if need be) that is gone afterwards, as is the root if nothing was put in it."""
    made = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if made:
            with suppress(OSError):
                root.rmdir()


def _one_at_a_time() -> FileLock:
    """A lock for this machine and user, so that the runs of a sweep do not all fetch the same data set."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return FileLock(Path(tempfile.gettempdir()) / f"vkd-fetching-{user}.lock")
