"""One independent stream of random numbers for each purpose, all derived from the run's seed.

A purpose that draws more or fewer numbers (a wider student, another method) then leaves every other stream as it was.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose` under `seed`: the same on every machine, unrelated for any two purposes."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded for `purpose` under `seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
