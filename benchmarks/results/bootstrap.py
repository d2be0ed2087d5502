"""How sure a median of few trials is: intervals from resampling, widened for the small number of
trials.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

RESAMPLES = 2000


class Interval(NamedTuple):
    low: float
    middle: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def standard_error(values: Sequence[float], seed: int = 0) -> float:
    """Of the median of `values`, by resampling; a single value has none."""
    if len(values) < 2:
        raise ValueError("a standard error needs at least two trials")
    return resampled_error(tuple(values), seed)


@lru_cache(maxsize=1024)
def resampled_error(values: tuple[float, ...], seed: int) -> float:
    generator = random.Random(seed)
    return statistics.pstdev(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )


def interval(
    values: Sequence[float],
    confidence: float = 0.95,
    resolution: float = 0.0,
    least_error: float = 0.0,
    seed: int = 0,
) -> Interval:
    """The median of `values` with an interval that holds the true one with probability
    `confidence`.

    Half the width is Student's t times the bootstrap standard error of the median: percentiles of
    resampled medians would be too narrow for five trials (Hesterberg, arXiv:1411.5279, section 3),
    and cannot reach past the extremes. `least_error` is a standard error known from elsewhere,
    which a lucky few trials shall not undercut; `resolution` is the least half width, that of the
    instrument. Needs two values.
    """
    error = max(standard_error(values, seed), least_error)
    middle = statistics.median(values)
    half = max(student_t(confidence, len(values) - 1) * error, resolution)
    return Interval(middle - half, middle, middle + half)


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Ratio of trials run side by side, with its interval: drift that hits both sides of a pair
    cancels.

    Pairs are in order; what one side has more of is left out. Works on logarithms, so a/b and b/a
    mirror each other.
    """
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=False)]
    return Interval(*(math.exp(edge) for edge in interval(logs, confidence)))


def student_t(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = `confidence` for T of Student's distribution; by bisection of its closed
    form.
    """
    low, high = 0.0, 1.0
    while central(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle, freedom) < confidence else (low, middle)
    return high


def central(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
