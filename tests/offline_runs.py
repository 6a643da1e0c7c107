"""What W&B's offline files say about a run."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> Iterator[Any]:
    """The records of a W&B file: protobuf messages in LevelDB's log format, in parts that fit blocks of 32 KiB."""
    content = path.read_bytes()
    assert content[:4] in (b"", b":W&B")
    position, parts = 7, []
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def finished(directory: Path) -> list[Any]:
    """The records of the one W&B run of a directory, once its file is whole."""
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    found, deadline = [], time.monotonic() + 30
    # W&B's own process may write the end of the file a moment after it has told ours that the run is finished.
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < deadline, f"{path} does not end"
        found = list(records(path))
    return found


def offline_run(directory: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]], int | None]:
    """(the run's record, its config, its logged lines, its exit code) from the W&B files of a run directory."""
    run, config, history, exit_code = None, {}, [], None
    for record in finished(directory):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config.update({entry.key: json.loads(entry.value_json) for entry in run.config.update})
        elif kind == "history":
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return run, config, history, exit_code


def offline_summary(directory: Path) -> dict[str, Any]:
    """The summary of the W&B run of a directory, W&B's own entries left out; what is nested has a name with dots."""
    summary: dict[str, Any] = {}
    for record in finished(directory):
        for item in record.summary.update:
            summary[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.summary.remove:
            summary.pop(".".join(item.nested_key) or item.key, None)
    return {name: value for name, value in summary.items() if not name.startswith("_")}


def offline_artifacts(directory: Path) -> dict[str, Any]:
    """The artifacts that the W&B run of a directory has logged, by name."""
    logged = (record.artifact for record in finished(directory) if record.HasField("artifact"))
    return {artifact.name: artifact for artifact in logged}
