"""Carving a validation split off the training images, the same on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np

from vkd.randomness import derive_seed


def held_counts(counts: np.ndarray, fraction: float) -> np.ndarray:
    """How many images of each class are held at `fraction`, before the rule that a class never loses all: int64 [C].

    Args:
        counts: images of each class, int64 [C].
        fraction: share to hold, in [0, 1).
    """
    held = np.floor(counts * fraction + 0.5).astype(np.int64)
    if fraction > 0:
        held = np.maximum(held, np.where(counts >= 2, 1, 0))
    return held


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits positions into kept and held ones, in the same proportion in each class.

    A class of n images has `fraction` * n held, rounded half up; with fraction > 0 and n >= 2 at least one is held, and
    at least one is always kept. The result depends on `labels` and `seed` alone; each class has its own stream, so that
    another class's size does not matter, and what is held at a fraction is also held at every larger one.

    Args:
        labels: class of each image, int64 [N].
        fraction: share to hold, in [0, 1).
        seed: any integer.

    Returns:
        (kept, held): sorted positions, int64 [N - M] and int64 [M].
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), not {fraction}")
    labels = np.asarray(labels, dtype=np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    held_each = np.minimum(held_counts(counts, fraction), counts - 1)
    positions = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    is_held = np.zeros(len(labels), dtype=bool)
    for label, mine, count in zip(classes, positions, held_each, strict=True):
        # numpy promises (NEP 19) that the stream of RandomState never changes; that of default_rng may.
        stream = np.random.RandomState(derive_seed(seed, "split", int(label)) % 2**32)
        is_held[stream.permutation(mine)[:count]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
