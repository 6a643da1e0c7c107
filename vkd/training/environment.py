"""The facts about a machine and an installation that a record keeps."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vkd
from vkd.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device that `device` names; `auto` takes CUDA, then MPS, then the CPU.

    Raises ConfigError when it does not exist here.
    """
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
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return describe.stdout.strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, the commit, where vkd was imported from, and the command, as `result.json` keeps them."""
    packages = ("torchvision", "timm", "numpy", "hydra-core", "wandb")
    versions = {name.replace("-core", ""): _version(name) for name in packages}
    return {
        "vkd": vkd.__version__,
        "torch": str(torch.__version__),
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe_device(device),
        "git": git_revision(),
        "package": str(Path(vkd.__file__).resolve().parent),
        "command": shlex.join(["python", "-m", "vkd.train", *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
