"""How many students fit into memory at once, judged before they are trained."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vkd.config import RecipeConfig
from vkd.training.learner import Learner

if TYPE_CHECKING:
    from vkd.training.assembly import Setting

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what the control group of a process may take."""

SHARE = 0.8
"""Of the free memory, what students may be planned to take."""


def available_bytes(device: torch.device) -> float:
    """Memory that students may take: `SHARE` of what is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return SHARE * (free + reserved)
    return SHARE * _free_host_bytes()


def _free_host_bytes() -> float:
    """What the system could give out without swapping; without limit where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return min(1024.0 * int(fields["MemAvailable"].split()[0]), _left_in_container())
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _left_in_container() -> float:
    """What the control group of this process may still take; without limit where it has none."""
    for folder, limit, used, cached in (
        (CONTROL_GROUP, "memory.max", "memory.current", "inactive_file"),
        (CONTROL_GROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that were read and are kept just in case give way.
            taken = int((folder / used).read_text()) - int(figures[cached])
            return float(int((folder / limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):  # "max" is no number
            continue
    return float("inf")


def learner_bytes(learner: Learner) -> int:
    """What a student holds between steps: weights, buffers, gradients, optimizer state, moving average, methods.

    Optimizers keep at most two numbers a parameter (Adam), so two are reckoned with.
    """
    trained = sum(_bytes(entry) for entry in learner.parameters)
    networks = [learner.student, learner.method] + ([] if learner.average is None else [learner.average.module])
    held = sum(_bytes(entry) for network in networks for entry in _tensors(network))
    return held + 3 * trained


def step_bytes(learner: Learner, setting: Setting, recipe: RecipeConfig) -> int:
    """What one step takes on top while it lasts: twice what the student's forward pass keeps for the backward pass.

    Measured on two images of no importance, on a copy, and scaled to the batch; the learner is left alone. 0 for a
    network that cannot be tried like that.
    """
    data = setting.data
    images = torch.zeros(2, data.channels, *data.image_size, device=setting.device)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        student = copy.deepcopy(learner.student).train()
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            student(images)
    except Exception:
        return 0
    weights = {entry.untyped_storage().data_ptr() for entry in _tensors(student)}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    return 2 * activations * recipe.batch_size // len(images)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
