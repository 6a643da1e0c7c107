"""Several methods at once: their terms side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        return self._named(lambda method: method(batch))

    def summands(self, share: Batch, fraction: float, whole: Batch, processes: int) -> dict[str, Tensor]:
        """One process's summand of each term: over the processes they add up to the terms of the whole batch.

        Args:
            share: this process's part of the batch.
            fraction: how much of the batch that is, from 0 to 1.
            whole: the batch, with the outputs of the other processes, as `Processes.gather_rows` gives them. Nothing of
                it is looked at unless a method wants to see it.
            processes: how many there are.
        """

        def summands_of(method: nn.Module) -> dict[str, Tensor]:
            terms, factor = (method(share), fraction) if method.per_image else (method(whole), 1 / processes)
            return {term: factor * value for term, value in terms.items()}

        return self._named(summands_of)

    def _named(self, terms_of: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            term if term == name else f"{name}/{term}": value
            for name, method in self.methods.items()
            for term, value in terms_of(method).items()
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
