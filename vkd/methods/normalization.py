"""Vectors of length one, for the methods that compare directions."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST = 1e-12


def unit_vectors(vectors: Tensor, dim: int) -> Tensor:
    """The vectors along `dim` divided by their Euclidean length; any shape, and the same comes back.

    A vector shorter than 1e-12 stays as it is: a zero vector (a dead channel, a black image) gives zero, and its
    gradient is bounded, where a division by a small constant would blow it up and a root at zero would make it NaN.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > _SHORTEST, length, torch.ones_like(length))
