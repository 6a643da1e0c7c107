"""Files that are there whole or not at all.

Each writer fills a temporary file in the folder of the target, flushes it to the disk and renames it over the target. A
reader, or a run that goes on after a kill, sees the old content or the new one, never a half. The folder must exist.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any


def write_bytes_atomically(path: str | Path, data: bytes, *, previous: Path | None = None) -> None:
    """Make `data` the whole content of the file at `path`. On failure the old file stays and no temporary one is left.

    The temporary file's name begins with a dot, as everything does that a reader of runs skips.

    Args:
        path: of the file.
        data: its content.
        previous: where the file that was there is kept, in the same folder; None: it is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep(path: Path, previous: Path) -> None:
    """Let `previous` be what `path` is, which stays where it is as long as the file system can have it twice."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(path)
    except OSError:
        path.replace(previous)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Like `write_bytes_atomically`, for text as UTF-8, with the line ends it has and lone surrogates escaped."""
    write_bytes_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_json_atomically(path: str | Path, obj: Any) -> None:
    """Write `obj` as strict JSON that any parser reads: keys in their order, indented by 2, NaN and infinity as null.

    Scalars of NumPy and the like become plain numbers, paths become strings. Raises TypeError, before anything is
    written, when something has no form in JSON.
    """
    write_text_atomically(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def _plain(obj: Any) -> Any:
    """`obj` in the types that JSON knows, with null for every float that is not finite."""
    if isinstance(obj, dict):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if getattr(obj, "ndim", None) == 0:  # a scalar of NumPy or torch; json refuses every other array by itself
        return _plain(obj.item())
    return obj
