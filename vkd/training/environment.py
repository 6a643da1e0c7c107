"""The facts about a machine and an installation that a record keeps."""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vkd
from vkd.errors import ConfigError
from vkd.training.distribution import ONE, Processes


def choose_device(name: str, processes: Processes = ONE) -> torch.device:
    """The device that `device` names; `auto` takes CUDA, then MPS, then the CPU.

    Of several processes each takes a CUDA device of its own, by its number on the machine; `auto` takes no MPS there.

    Raises ConfigError when it does not exist here.
    """
    if processes.several:
        return _own_device(name, processes)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(
            f"device={name} is not on this machine", expected=", ".join(["auto", *here]), hint="device=auto"
        ) from error
    return device


def _own_device(name: str, processes: Processes) -> torch.device:
    """The device of one of several processes."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ConfigError(
            f"device={name} is one device, and each of the {processes.world_size} processes of this run wants its own",
            expected="auto, cuda or cpu",
            hint="device=auto, and CUDA_VISIBLE_DEVICES=... for a choice among GPUs",
        )
    count = torch.cuda.device_count()
    if processes.local_rank >= count:
        raise ConfigError(
            f"process {processes.local_rank} of this machine, counted from 0, has no GPU: there are {count} here",
            expected="one process a GPU",
            hint=f"torchrun --nproc-per-node {count} ..." if count else "device=cpu",
        )
    return torch.device("cuda", processes.local_rank)


def describe_device(device: torch.device) -> str:
    """The device in words: `cpu (2 threads, x86_64)` or `cuda:0 (NVIDIA H100)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {platform.machine()})"
    return str(device)


def git_revision() -> str | None:
    """The commit of the checkout that vkd runs from, `+` where it has changes; None outside a checkout."""
    folder = Path(vkd.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    return _output_of("git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*", folder=folder)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers may depend on outside its config, as `result.json` keeps it.

    Versions, the device, the machine, the commit, where vkd was imported from, and the command. Of the environment's
    variables the one alone that says which GPUs there are.
    """
    packages = ("torchvision", "timm", "numpy", "hydra-core", "omegaconf", "wandb", "safetensors")
    versions = {name.replace("-core", ""): _version(name) for name in packages}
    return {
        "vkd": vkd.__version__,
        "torch": str(torch.__version__),
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": describe_device(device),
        "cpu": {"name": processor_name(), "count": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpu": _gpu(device),
        "git": git_revision(),
        "package": str(Path(vkd.__file__).resolve().parent),
        "command": shlex.join(["python", "-m", "vkd.train", *sys.argv[1:]]),
    }


@functools.cache
def processor_name() -> str:
    """The processor's name as its maker sells it; its architecture where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any] | None:
    """The GPU that `device` is, with what runs it; None where it is none."""
    if device.type != "cuda":
        return None
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "driver": _driver_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "count": torch.cuda.device_count(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


@functools.cache
def _driver_version() -> str | None:
    """The version of NVIDIA's driver; None where neither the system nor `nvidia-smi` says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    found = re.search(r"\b\d{3,}(\.\d+)+\b", text)
    return found.group() if found else None


def _output_of(*words: str, folder: Path | None = None) -> str | None:
    """What a command prints; None where there is no such command, or it fails."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
