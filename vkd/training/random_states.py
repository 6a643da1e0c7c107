"""The states of torch's default generators, as one dictionary."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded_states(seed: int, device: torch.device) -> dict[str, Tensor]:
    """Those of generators that start from `seed`: of the CPU's, and of the device's where that is CUDA."""
    states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return states


def get_states(device: torch.device) -> dict[str, Tensor]:
    """Those of the default generators now."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Let the default generators go on from here."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
