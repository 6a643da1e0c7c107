"""`last.ckpt`: everything that going on exactly needs, in one file that is either whole or not there.

The one before it is kept as `previous.ckpt`, for the case that a disk or a copy damages the last one.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vkd.errors import TrainingError
from vkd.models.weights import check_unpacked_size
from vkd.records.atomic import write_bytes_atomically

logger = logging.getLogger("vkd")

_MARK = b"vkd-checkpoint-1"
_TRAILER = len(_MARK) + 32


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name("previous.ckpt")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts and containers of them) with a checksum, atomically, and keep the one
    that was there as `previous_checkpoint`.

    Raises TrainingError when the file cannot be written; the previous one is then still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    try:
        content = payload + _MARK + hashlib.sha256(payload).digest()
        write_bytes_atomically(path, content, previous=previous_checkpoint(path))
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written: {error}",
            expected="room on the disk and permission to write",
            hint="the same command again once there is; it goes on from the checkpoint before",
        ) from error


def remove_checkpoints(path: Path) -> None:
    """Remove the checkpoint at `path` and the one before it, as far as they are there."""
    path.unlink(missing_ok=True)
    previous_checkpoint(path).unlink(missing_ok=True)


def read_newest_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or the one before it where that cannot be used, which is then said; None without any.

    One that is damaged is removed once the one before it has been read, so that this is not lost to the next writing.

    Raises TrainingError when there are checkpoints and none of them can be read.
    """
    fault: TrainingError | None = None
    for candidate in (path, previous_checkpoint(path)):
        if not candidate.exists():
            continue
        try:
            state = read_checkpoint(candidate)
        except TrainingError as error:
            fault = fault or error
            continue
        if fault is not None:
            logger.warning("%s; going on from the checkpoint before it", fault.problem)
            path.unlink(missing_ok=True)
        return state
    if fault is not None:
        raise fault
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU. Only data is read, never code.

    Raises TrainingError when the file cannot be read, is torn, altered or not a checkpoint.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror or error}") from error
    payload, mark, digest = content[:-_TRAILER], content[-_TRAILER:-32], content[-32:]
    if mark != _MARK or hashlib.sha256(payload).digest() != digest:
        raise _unusable(path, "is damaged: its checksum does not match")
    try:
        check_unpacked_size(path)
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # what a forged file makes torch raise is of many kinds
        raise _unusable(path, "holds something other than data, and is not opened") from error
    if not isinstance(state, dict):
        raise _unusable(path, "holds no checkpoint")
    return state


def require_entries(path: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    """Raise TrainingError where the checkpoint that was read from `path` lacks any of these entries."""
    missing = sorted(set(names) - set(state))
    if missing:
        raise _unusable(path, f"lacks {', '.join(missing)}")


def _unusable(path: Path, fault: str) -> TrainingError:
    return TrainingError(
        f"{path} {fault}",
        expected="a checkpoint that vkd wrote to its end",
        hint=f"remove {path.name} there, and the same command starts this run again",
    )
