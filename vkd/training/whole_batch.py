"""A batch of several processes, for methods that compare images with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from vkd.methods import Batch, Output, Progress
from vkd.training.distribution import Processes


class _Gatherer:
    """Gathers the rows [B, ...] of all processes, whether or not the caller wants a gradient just then."""

    def __init__(self, processes: Processes, sizes: Sequence[int]) -> None:
        self.processes, self.sizes = processes, sizes

    def __call__(self, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.processes.gather_rows(rows, self.sizes)


class _WholeMaps(Sequence):
    """Feature maps, each gathered when it is first asked for: most methods want the last one alone."""

    def __init__(self, maps: Sequence[Tensor], gather: _Gatherer) -> None:
        self._maps, self._gather = maps, gather
        self._gathered: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self[entry] for entry in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self._gathered:
            self._gathered[place] = self._gather(self._maps[place])
        return self._gathered[place]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))


class WholeOutput(Output):
    """An `Output` of all processes' images, each part of it gathered when it is first asked for."""

    def __init__(self, share: Output, gather: _Gatherer) -> None:
        self._share, self._gather = share, gather
        self.features = _WholeMaps(share.features, gather)

    @cached_property
    def logits(self) -> Tensor:
        """[B, C], before softmax."""
        return self._gather(self._share.logits)

    @cached_property
    def embedding(self) -> Tensor | None:
        """[B, D], what enters the classifier; None where no method asks for it."""
        return None if self._share.embedding is None else self._gather(self._share.embedding)


class WholeBatch(Batch):
    """The whole of a batch of which each process has a share, in the order of one process.

    Every process must look at the same parts of it in the same order, as the same code does. Gradients reach the
    student's outputs on the own share (`Processes.gather_rows`).

    Args:
        share: this process's part.
        processes: all of them.
        sizes: how many images each of them has.
    """

    def __init__(self, share: Batch, processes: Processes, sizes: Sequence[int]) -> None:
        self._share, self._gather = share, _Gatherer(processes, sizes)
        self.progress: Progress = share.progress
        self.student = WholeOutput(share.student, self._gather)
        self.teacher = WholeOutput(share.teacher, self._gather)
        self.views = [tuple(WholeOutput(output, self._gather) for output in pair) for pair in share.views]

    @cached_property
    def targets(self) -> Tensor:
        """Labels [B], int64."""
        return self._gather(self._share.targets)

    @cached_property
    def indices(self) -> Tensor:
        """Positions in the training split [B], int64."""
        return self._gather(self._share.indices)
