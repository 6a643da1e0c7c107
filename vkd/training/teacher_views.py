"""The teacher's logits on every view of every training image, kept on disk for all runs to come.

Where the augmentations can make a countable number of images out of one (crop and flip: 162 of a CIFAR image), the
logits of a frozen teacher are a finite table, with a row for each view of each image (`ImageBatch.view_rows`). It is
filled as training asks for rows, by all runs that have the same teacher, data, normalisation and augmentation.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from vkd.data import AUGMENTATIONS, Data
from vkd.data.resident import ResidentData
from vkd.errors import ConfigError, TrainingError, UserError, list_names
from vkd.records.atomic import write_json_atomically

SMALLEST_BATCH = 16
"""Fewer images than this a network may round in another way than more of them."""

QUEUE_ROWS = 4096
"""So many new rows are gathered on the device before they are fetched, for which it has to be waited for."""

FLUSH_ROWS = 1 << 17
"""So many new rows are flushed without being asked to: what a power cut costs at most."""

FORMAT = 1
"""Counts up when the files change their meaning; a table of another format is made anew."""

_MISSING, _READABLE, _QUEUED = 0, 1, 2
_ELSEWHERE = "teacher.cache=none, or runs_root=SOME_OTHER_FOLDER on a disk with more space"

logger = logging.getLogger("vkd")


def require_discrete(data: Data) -> None:
    """Raise ConfigError unless the views of a training image can be counted, saying what stands in the way."""
    if data.view_count is not None:
        return
    hint = "teacher.cache=none"
    if isinstance(data, ResidentData):
        uncounted = [
            name
            for name in AUGMENTATIONS
            for augmentation in data.augmentations
            if type(augmentation) is AUGMENTATIONS[name] and augmentation.views(data.image_size) is None
        ]
        problem = f"the augmentation {list_names(uncounted)} of {data.name!r} makes too many to number"
        hint += ", or " + " ".join(f"dataset.augmentation.{name}=null" for name in uncounted)
    else:
        problem = f"the images of {data.name!r} are read from files, and cut and resized in too many ways to number"
    raise ConfigError(
        f"teacher.cache=views keeps the teacher's logits on every view of an image, and {problem}",
        expected="images that lie on the device, such as those of cifar100, under crop and flip alone",
        hint=hint,
    )


def describe(data: Data, dtype: torch.dtype) -> str:
    """What a table of these training images would hold, and how large it would be, in words.

    Raises ConfigError when their views cannot be counted.
    """
    require_discrete(data)
    size = data.train_size * data.view_count * data.num_classes * dtype.itemsize
    return (
        f"{data.num_classes:,} logits for {data.view_count:,} view{'s' * (data.view_count > 1)} of each of "
        f"{data.train_size:,} images in {_name(dtype)}, {_in_words(size)} when full"
    )


class TeacherViews:
    """A table of logits [rows, classes] in a folder of its own, filled as its rows are asked for.

    `logits.bin` holds the rows, as sparse as they are; `filled.bin` a byte for each, 1 where the row is there;
    `identity.json` what they are of. Any number of processes of one machine may read and fill a table at once: no byte
    of `filled.bin` is ever set back, none is set before its row is on the disk, and a row, once there, is the same
    whoever wrote it. Neither a kill nor a power cut leaves a row that counts as filled and is not; it costs the rows
    that were not yet flushed.

    In float32 a row is the logits to the last bit, as they were where it was first asked for; a network that rounds an
    image by its place in the batch, as one of very few channels may, would give it others elsewhere. In float16 it is
    the nearest such number, a finite one, and that is what is given back from the first time on: what a student learns
    does not depend on who filled the table.

    Made by `TeacherViews.open`; not for several threads at once.
    """

    def __init__(self, folder: Path, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.rows, self.classes, self.dtype, self.device = folder, rows, classes, dtype, device
        self._logits_file = _logits_path(folder).open("r+b", buffering=0)
        self._filled_file = _filled_path(folder).open("r+b", buffering=0)
        # Read through these, written through the files: a full disk is then an error and not the process's end.
        self._logits = _mapped(_logits_path(folder), (rows, classes), dtype)
        self._filled = _mapped(_filled_path(folder), (rows,), torch.uint8)
        self._state = (self._filled == 1).to(torch.uint8)  # of each row, as this process knows it
        self._queue: list[tuple[Tensor, Tensor]] = []  # rows that are not written, and their logits on the device
        self._queue_rows = 0
        self._unflushed: list[Tensor] = []  # rows that are written and have no byte in `filled.bin`
        self._unflushed_rows = 0

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        rows: int,
        classes: int,
        dtype: torch.dtype,
        identity: dict[str, Any],
        device: torch.device,
    ) -> TeacherViews:
        """The table in `folder`, which is made when it is not there, and anew when its files are damaged.

        Args:
            rows: number of training images times `Data.view_count`.
            classes: number of logits in a row.
            dtype: float16 or float32, in which they are kept.
            identity: what decides the logits, as JSON has it. Where a mapping's order matters, give it as a list.
            device: where logits are computed and wanted.

        Raises:
            ConfigError: the folder cannot be written to, has too little space for the whole table, or holds a table of
                something else.
        """
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype={dtype} is neither float16 nor float32")
        description = {"format": FORMAT, "rows": rows, "classes": classes, "dtype": _name(dtype), "identity": identity}
        description = json.loads(json.dumps(description))
        with _explained(folder, ConfigError):
            _require_space(folder, rows * classes * dtype.itemsize + rows)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with filelock.FileLock(folder / ".lock"):
                sizes = {_logits_path(folder): rows * classes * dtype.itemsize, _filled_path(folder): rows}
                if not _is_there(folder, description, sizes):
                    _create(folder, description, sizes)
                return cls(folder, rows, classes, dtype, torch.device(device))

    def logits(self, view_rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The teacher's logits on a batch, from the table as far as it has them; the others are computed and kept.

        A batch of which nothing is there is computed as it is, if it has `SMALLEST_BATCH` images; otherwise those that
        are missing are, with some of them repeated up to a multiple of that number, so that a network rounds them as
        it does in the whole batch.

        Args:
            view_rows: the batch's rows, int64 [B] on the CPU.
            compute: from positions in the batch, int64 [P] on the device, to their logits [P, classes] there.

        Returns:
            float32 [B, classes] on the device, in memory of its own. The device is waited for once in `QUEUE_ROWS`
            rows that were missing, never for a batch of which all are there.

        Raises:
            IndexError: for a row that there is not.
            TrainingError: the rows cannot be written, for instance because the disk is full.
        """
        missing = self._missing(view_rows)
        count = len(missing)
        if count == 0:
            return self._read(view_rows)
        if SMALLEST_BATCH <= count == len(view_rows):
            positions = missing
        else:
            positions = missing[torch.arange(-(-count // SMALLEST_BATCH) * SMALLEST_BATCH) % count]
        positions = self._placed(positions)
        kept = self._kept(compute(positions)[:count])
        computed = kept.to(torch.float32, copy=True)
        self._add(view_rows[missing], kept)
        if count == len(view_rows):
            return computed
        return self._read(view_rows).index_copy_(0, positions[:count], computed)

    def store(self, view_rows: Tensor, logits: Tensor) -> None:
        """Fill rows with logits that are known already; rows that are filled stay as they are.

        Args:
            view_rows: int64 [B] on the CPU.
            logits: [B, classes] on the device.

        Raises:
            IndexError: for a row that there is not.
            TrainingError: the rows cannot be written, for instance because the disk is full.
        """
        missing = self._missing(view_rows)
        if len(missing):
            self._add(view_rows[missing], self._kept(logits.index_select(0, self._placed(missing))))

    @property
    def filled_share(self) -> float:
        """Share of the rows that are there, in this process or flushed by another."""
        return int(torch.count_nonzero((self._state != _MISSING) | (self._filled == 1))) / self.rows

    @property
    def bytes(self) -> int:
        """Size of all logits when the table is full."""
        return self.rows * self.classes * self.dtype.itemsize

    def __str__(self) -> str:
        return (
            f"the teacher's views in {self.folder} "
            f"({100 * self.filled_share:.1f} % of {self.rows:,} rows, {_in_words(self.bytes)} when full)"
        )

    def flush(self) -> None:
        """Bring everything that was computed to the disk, for good and for other processes to see: rows, then flags.

        Raises TrainingError when that fails; the rows then count as missing again.
        """
        with self._writing():
            self._write_queue()
            if not self._unflushed:
                return
            _sync(self._logits_file)
            rows = torch.cat(self._unflushed).unique().numpy()
            for start, end in _runs(rows):
                _write(self._filled_file, b"\1" * (end - start), int(rows[start]))
            _sync(self._filled_file)
            self._unflushed, self._unflushed_rows = [], 0

    def close(self) -> None:
        """Flush, and let go of the files; the table cannot be used afterwards."""
        if self._logits_file.closed:
            return
        try:
            self.flush()
        finally:
            self._logits_file.close()
            self._filled_file.close()

    def _missing(self, view_rows: Tensor) -> Tensor:
        """Positions in the batch of the rows that are not there, int64; the others can be read afterwards."""
        state = self._state.index_select(0, view_rows)
        if bool((state == _READABLE).all()):
            return torch.empty(0, dtype=torch.int64)
        if bool((state == _QUEUED).any()):
            with self._writing():
                self._write_queue()
        missing = (state == _MISSING).nonzero().squeeze(1)
        # Another process may have filled some since this one looked last.
        theirs = self._filled.index_select(0, view_rows[missing]) == 1
        self._state.index_fill_(0, view_rows[missing[theirs]], _READABLE)
        return missing[~theirs]

    def _read(self, view_rows: Tensor) -> Tensor:
        """float32 [B, classes] on the device, of whatever the table has."""
        if self.device.type != "cuda":
            return self._logits.index_select(0, view_rows).to(self.device, torch.float32)
        # PyTorch gives pinned memory out again only when the copy from it is done.
        found = torch.empty(len(view_rows), self.classes, dtype=self.dtype, pin_memory=True)
        torch.index_select(self._logits, 0, view_rows, out=found)
        return found.to(self.device, non_blocking=True).float()

    def _placed(self, positions: Tensor) -> Tensor:
        """Positions on the device, without waiting for it."""
        if self.device.type == "cuda":
            positions = positions.pin_memory()
        return positions.to(self.device, non_blocking=True)

    def _kept(self, logits: Tensor) -> Tensor:
        """Logits as the table holds them, on the device and in memory of their own."""
        if self.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            logits = logits.clamp(-largest, largest)
        return logits.detach().to(self.dtype, copy=True)

    def _add(self, rows: Tensor, kept: Tensor) -> None:
        if kept.shape != (len(rows), self.classes):
            raise ValueError(f"logits of shape {tuple(kept.shape)} for {len(rows)} rows of {self.classes}")
        self._queue.append((rows, kept))
        self._queue_rows += len(rows)
        self._state.index_fill_(0, rows, _QUEUED)
        if self._queue_rows >= QUEUE_ROWS:
            with self._writing():
                self._write_queue()
        if self._unflushed_rows >= FLUSH_ROWS:
            self.flush()

    def _write_queue(self) -> None:
        """Write the queue into the file, where this process can read it from then on, and others when it is flushed."""
        if not self._queue:
            return
        rows, order = torch.cat([rows for rows, _ in self._queue]).sort()
        logits = torch.cat([kept for _, kept in self._queue]).cpu()[order]
        content, row_bytes = memoryview(logits.numpy()).cast("B"), self.classes * self.dtype.itemsize
        for start, end in _runs(rows.numpy()):
            _write(self._logits_file, content[start * row_bytes : end * row_bytes], int(rows[start]) * row_bytes)
        self._state.index_fill_(0, rows, _READABLE)
        self._unflushed.append(rows)
        self._unflushed_rows += len(rows)
        self._queue, self._queue_rows = [], 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells the user why something cannot be written; nothing that was not flushed counts as filled then."""
        try:
            with _explained(self.folder, TrainingError):
                yield
        except UserError:
            for rows in [rows for rows, _ in self._queue] + self._unflushed:
                self._state.index_fill_(0, rows, _MISSING)
            self._queue, self._queue_rows = [], 0
            self._unflushed, self._unflushed_rows = [], 0
            raise


def _logits_path(folder: Path) -> Path:
    return folder / "logits.bin"


def _filled_path(folder: Path) -> Path:
    return folder / "filled.bin"


def _identity_path(folder: Path) -> Path:
    return folder / "identity.json"


def _is_there(folder: Path, description: dict[str, Any], sizes: dict[Path, int]) -> bool:
    """Whether the folder holds a whole table of what is described. Raises ConfigError when it is of something else."""
    if not _identity_path(folder).exists():
        return False
    try:
        found = json.loads(_identity_path(folder).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("format") == FORMAT and found != description:
        different = sorted(key for key in {*found, *description} if found.get(key) != description.get(key))
        raise ConfigError(
            f"{folder} holds the logits of another teacher, or on other images (its {', '.join(different)} differ)",
            expected="a folder of its own for each teacher, data set, normalisation and augmentation",
            hint=f"delete {folder}, or teacher.cache=none",
        )
    if found == description and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items()):
        return True
    logger.warning("the teacher's views in %s are damaged or of another version of vkd; they are made anew", folder)
    return False


def _create(folder: Path, description: dict[str, Any], sizes: dict[Path, int]) -> None:
    """An empty table. Processes that still use the old files keep them."""
    # Last made and first removed: where it is, the others are.
    _identity_path(folder).unlink(missing_ok=True)
    for path, size in sizes.items():
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.truncate(size)
    write_json_atomically(_identity_path(folder), description)


def _require_space(folder: Path, size: int) -> None:
    """Raise ConfigError when what the table does not hold of its `size` in bytes yet would not fit on the disk."""
    for path in (_logits_path(folder), _filled_path(folder)):
        with suppress(FileNotFoundError):
            size -= path.stat().st_blocks * 512
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if free < size:
        raise ConfigError(
            f"the teacher's logits on all views would take {_in_words(size)} more in {folder}, "
            f"whose disk has {_in_words(free)} free",
            expected="enough space for the table when it is full",
            hint=_ELSEWHERE,
        )


@contextmanager
def _explained(folder: Path, kind: type[UserError]) -> Iterator[None]:
    """Turns an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"the teacher's views cannot be kept in {folder}: {error.strerror or error}",
            expected="a folder that you may write to, on a disk with enough space",
            hint=_ELSEWHERE,
        ) from error


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor, of which only what is looked at is read, and which follows what is written to the file."""
    return torch.from_numpy(np.memmap(path, dtype=_name(dtype), mode="r+", shape=shape))


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where in the sorted `rows` [N], N at least 1, each run of rows that follow one another starts and ends."""
    cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return zip([0, *cuts], [*cuts, len(rows)], strict=True)


def _write(file: FileIO, content: bytes | memoryview, offset: int) -> None:
    while len(content):
        written = os.pwrite(file.fileno(), content, offset)
        content, offset = content[written:], offset + written


def _sync(file: FileIO) -> None:
    """Waits until the file's content would survive a power cut."""
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_words(size: int) -> str:
    """Bytes as a number that one can read, in decimal units."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
