"""Unit vectors, down to length zero."""

from __future__ import annotations

import math

import pytest
import torch

from vkd.methods.normalization import unit_vectors


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_vector_is_divided_by_its_length(dim):
    vectors = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for vector, found in zip(
        vectors.movedim(dim, -1).flatten(0, 1), unit_vectors(vectors, dim).movedim(dim, -1).flatten(0, 1), strict=True
    ):
        length = math.sqrt(sum(value**2 for value in vector.tolist()))
        assert found.tolist() == pytest.approx([value / length for value in vector.tolist()], rel=1e-12)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e8])
def test_the_length_does_not_matter(size):
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit_vectors(size * vectors, 1), unit_vectors(vectors, 1))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-14])
def test_vectors_without_a_direction_stay_near_zero_and_their_gradient_is_bounded(size):
    vectors = torch.tensor([[3.0, 4.0], [size, -size]], requires_grad=True)
    found = unit_vectors(vectors, 1)
    assert found[1].abs().max() <= size
    found.sum().backward()
    # d/dx (x + y) / r = 1 / r - x (x + y) / r^3 of the first vector; the second is as it was, and so is its gradient.
    torch.testing.assert_close(vectors.grad, torch.tensor([[0.2 - 21 / 125, 0.2 - 28 / 125], [1.0, 1.0]]))
