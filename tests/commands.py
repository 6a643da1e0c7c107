"""The commands as the tests call them: in this process where that will do, as real processes where it will not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import vkd
import vkd.train

# Later words win, so a test changes any of these by saying it again.
TINY = [
    "dataset=digits",
    "teacher.arch=cifar_resnet8_width4",
    "student.arch=cifar_resnet8_width4",
    "recipe.epochs=1",
    "teacher.recipe.epochs=1",
    "teacher.allow_chance_accuracy=true",
    "tracker=none",
    "device=cpu",
]
TEACHERS = Path("teachers", "cifar_resnet8_width4")
PAIR = Path("digits", "cifar_resnet8_width4-cifar_resnet8_width4")
PLAIN = Path("digits", "cifar_resnet8_width4")
SOME_TIME = {"seconds", "images_per_second"}


def train(*words: str) -> int:
    """The exit code of `vkd.train` with a tiny run's words before `words`; on one thread, as `start` has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return vkd.train.main([*TINY, *words])
    finally:
        torch.set_num_threads(threads)


def start(module: str, *words: str, cwd: Path) -> subprocess.Popen[str]:
    """A command as a process of its own, with its output in pipes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def runs_in(folder: Path) -> list[Path]:
    """The run directories below a folder."""
    return sorted(path.parent for path in folder.rglob("train.log"))


def only_run(folder: Path) -> Path:
    """The one run directory below a folder."""
    (found,) = runs_in(folder)
    return found


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of each file by its relative path, None for a directory."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def weights(run: Path) -> dict[str, tuple[Any, ...]]:
    """The bits of the saved student. (The file's header has its metadata in any order.)"""
    tensors = load_file(run / "student.safetensors")
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def untimed(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Everything that a run recorded of its training but the clock: its lines of metrics, and its result."""
    history = [
        {key: value for key, value in line.items() if key not in SOME_TIME} for line in lines(run / "metrics.jsonl")
    ]
    result = read(run / "result.json")
    return history, {key: value for key, value in result.items() if key not in ("timing", "environment")}


def wait_for_epochs(process: subprocess.Popen[str], folder: Path, count: int) -> Path:
    """Wait until a run below `folder` has `count` epochs behind it; its directory."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for run in runs_in(folder):
            if (run / "metrics.jsonl").exists() and len(lines(run / "metrics.jsonl")) >= count:
                return run
        time.sleep(0.02)
    raise AssertionError(process.communicate())
