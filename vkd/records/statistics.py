"""Means, spreads and differences over seeds: the only numbers that a table states.

The spread is the sample standard deviation (n - 1 in the denominator), so one run has none. A difference is paired by
seed where it can be, because two students of one seed saw the same weights and order of data: what they share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (None for one value) and number of the values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How far one set of runs lies above another.

    mean: the difference; std: sample standard deviation of the paired differences, None where there are not two pairs.
    n: number of pairs, 0 where `paired` is false and `mean` is the difference of the two means.
    """

    mean: float
    std: float | None
    n: int
    paired: bool


def summarise(values: Iterable[float]) -> Summary | None:
    """The summary of `values`; None where there are none."""
    values = list(values)
    if not values:
        return None
    n = len(values)
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Summary(mean, std, n)


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """`values` minus `baseline`, both seed -> value; None where either is empty.

    Paired over the common seeds when the seeds are the same or at least two are common; otherwise the difference of the
    means, which has no spread of its own here.
    """
    if not values or not baseline:
        return None
    common = sorted(values.keys() & baseline.keys())
    if len(common) > 1 or values.keys() == baseline.keys():
        summary = summarise(values[seed] - baseline[seed] for seed in common)
        return Difference(summary.mean, summary.std, summary.n, paired=True)
    return Difference(summarise(values.values()).mean - summarise(baseline.values()).mean, None, 0, paired=False)
