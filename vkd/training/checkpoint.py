"""`last.ckpt`: everything that going on exactly needs, in one file that is either whole or not there."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from vkd.errors import TrainingError
from vkd.records.atomic import write_bytes_atomically

_MARK = b"vkd-checkpoint-1"
_TRAILER = len(_MARK) + 32


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts and containers of them) with a checksum, atomically.

    Raises TrainingError when the file cannot be written; the previous one is then still there.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    try:
        write_bytes_atomically(path, payload + _MARK + hashlib.sha256(payload).digest())
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written: {error}",
            expected="room on the disk and permission to write",
            hint="the same command again once there is; it goes on from the checkpoint before",
        ) from error


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
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise _unusable(path, "holds something other than data, and is not opened") from error
    if not isinstance(state, dict):
        raise _unusable(path, "holds no checkpoint")
    return state


def _unusable(path: Path, fault: str) -> TrainingError:
    return TrainingError(
        f"{path} {fault}",
        expected="a checkpoint that vkd wrote to its end",
        hint=f"remove {path.name} there, and the same command starts this run again",
    )
