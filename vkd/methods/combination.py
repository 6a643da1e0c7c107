"""Several methods at once: their terms side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vkd.methods.contract import METHODS, Batch, MethodContext
from vkd.randomness import derive_seed, generator


class Combination(nn.Module):
    """The sum of methods; with none, plain training.

    Terms keep the name that their method gave them, with the method's name before it where they differ.
    """

    def __init__(self, methods: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.methods = nn.ModuleDict(methods)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def needs_features(self) -> bool:
        """Whether any of the methods wants intermediate features."""
        return any(method.needs_features for method in self.methods.values())

    @property
    def views(self) -> int:
        """How many views of each image the most demanding method wants."""
        return max((method.views for method in self.methods.values()), default=1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted scalar terms of all the methods."""
        return {
            term if term == name else f"{name}/{term}": value
            for name, method in self.methods.items()
            for term, value in method(batch).items()
        }


def make_method(method: Mapping[str, Mapping[str, Any]], context: MethodContext, seed: int) -> Combination:
    """Build the methods of a config (name -> parameters), each with a stream of random numbers of its own.

    Raises ConfigError for an unknown method.
    """
    built = {}
    for name, parameters in method.items():
        own = replace(context, generator=generator(seed, "method", name, "draws"))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reseed every accelerator too.
            torch.default_generator.manual_seed(derive_seed(seed, "method", name))
            built[name] = METHODS[name](own, **parameters)
    return Combination(built)
