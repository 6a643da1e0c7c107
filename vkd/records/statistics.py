"""Means, spreads and differences over seeds: the only numbers that a table states.

The spread is the sample standard deviation (n - 1 in the denominator), so one run has none. A difference is paired by
seed where it can be, because two students of one seed saw the same weights and order of data: what they share cancels.

What chance alone does to the mean of paired differences d_1 .. d_n is told in two ways:

- An interval at `CONFIDENCE`: the mean plus and minus t * std / sqrt(n), t the quantile of Student's distribution with
  n - 1 degrees of freedom. It holds for differences that are normally distributed.
- A two-sided p-value, against differences whose distribution is symmetric about 0. Up to `MOST_FLIPPED` pairs it is
  that of the exact sign-flip permutation test (Fisher, The Design of Experiments, 1935): the share of the 2^n ways to
  choose the signs of the differences whose mean is at least as far from 0, which needs no normality and cannot lie
  below 2^(1 - n). Beyond, it is that of the paired t test (Student, The Probable Error of a Mean, Biometrika 1908).

Both are computed here rather than by scipy.stats, whose import takes longer than all the rest of collecting a study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

CONFIDENCE = 0.95
"""Of the interval of a difference."""

MOST_FLIPPED = 10
"""Pairs up to which all ways to choose their signs are gone through: 2^10 of them."""

SIGN_FLIP, PAIRED_T = "sign-flip permutation", "paired t"
"""The tests that a p-value may be of."""

_TIE = 1e-9
"""Share of the sum of all sizes within which two sums of differences are one: accuracies are no sums of powers of 2."""

_MOST_TERMS = 10_000
_SMALLEST = 1e-300
_PRECISION = 1e-15


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
    interval: of the mean at `CONFIDENCE`; p: two-sided, of `test`. None and "" where there are not two pairs.
    """

    mean: float
    std: float | None
    n: int
    paired: bool
    interval: tuple[float, float] | None = None
    p: float | None = None
    test: str = ""


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
    means, which has no spread of its own here. Of one pair there is neither an interval nor a p-value.
    """
    if not values or not baseline:
        return None
    common = sorted(values.keys() & baseline.keys())
    if len(common) > 1 or values.keys() == baseline.keys():
        differences = [values[seed] - baseline[seed] for seed in common]
        mean, std, n = (made := summarise(differences)).mean, made.std, made.n
        if n < 2:
            return Difference(mean, std, n, paired=True)
        test = SIGN_FLIP if n <= MOST_FLIPPED else PAIRED_T
        p = sign_flip_p_value(differences) if test == SIGN_FLIP else paired_t_p_value(differences)
        return Difference(mean, std, n, paired=True, interval=mean_interval(differences), p=p, test=test)
    return Difference(summarise(values.values()).mean - summarise(baseline.values()).mean, None, 0, paired=False)


def mean_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of the mean of at least two `differences` by Student's t distribution, lower bound first."""
    made = summarise(differences)
    half = t_quantile(made.n - 1, confidence) * made.std / math.sqrt(made.n)
    return made.mean - half, made.mean + half


def paired_t_p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of the paired t test over at least two `differences`.

    Differences that are all the same have no spread, and t has no value: 1 where they are all 0, and 0 otherwise.
    """
    made = summarise(differences)
    if made.std == 0:
        return 1.0 if made.mean == 0 else 0.0
    return t_tails(made.mean / (made.std / math.sqrt(made.n)), made.n - 1)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """The two-sided p-value of the exact sign-flip permutation test: 2^(n - 1) sums, so for few `differences` only."""
    first, *others = (abs(difference) for difference in differences)
    sums = [first]  # turning all signs changes no size, so the first one keeps its own
    for size in others:
        sums = [total + size for total in sums] + [total - size for total in sums]
    least = abs(math.fsum(differences)) - _TIE * sums[0]
    return sum(abs(total) >= least for total in sums) / len(sums)


def t_tails(t: float, degrees: int) -> float:
    """The probability that Student's t with `degrees` of freedom lies further from 0 than `t`, on either side."""
    if math.isinf(t):
        return 0.0
    # I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2); 1 - x is passed on, since it would be lost near x = 1.
    square = t * t
    return _incomplete_beta(degrees / (degrees + square), square / (degrees + square), degrees / 2, 0.5)


@lru_cache(maxsize=256)
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t between whose negative and itself Student's t with `degrees` of freedom lies with that probability."""
    low, high = 0.0, 1.0
    while t_tails(high, degrees) > 1 - confidence:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if t_tails(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), with `rest` = 1 - x, by its continued fraction.

    The fraction converges fast below the mean of the beta distribution only; above, I_x(a, b) = 1 - I_rest(b, a).
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    # Lentz's way to evaluate 1 / (1 + d1 x / (1 + d2 x / (1 + ...))) from its beginning (Applied Optics, 1976).
    value, numerator, denominator = 1.0, 1.0, 0.0
    for term in range(_MOST_TERMS):
        half = term // 2
        if term == 0:
            factor = 1.0
        elif term % 2:
            factor = -(a + half) * (a + b + half) / ((a + 2 * half) * (a + 2 * half + 1)) * x
        else:
            factor = half * (b - half) / ((a + 2 * half - 1) * (a + 2 * half)) * x
        denominator = 1 / ((1 + factor * denominator) or _SMALLEST)
        numerator = (1 + factor / numerator) or _SMALLEST
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < _PRECISION:
            break
    return math.exp(logarithm) / a * (value - 1)
