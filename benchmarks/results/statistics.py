"""How sure the figures of few trials are: Student's t on logarithms, by the medians of processes.

Times and rates are compared as ratios, so all tests work on logarithms. The values that tell how
sure a figure is are the medians of processes, because trials of one process do not say how
processes differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import NamedTuple

Processes = Sequence[Sequence[float]]


class Interval(NamedTuple):
    low: float
    middle: float
    high: float


def process_medians(processes: Processes) -> list[float]:
    """Return the median of each process that has trials."""
    return [median(trials) for trials in processes if trials]


def samples(processes: Processes) -> list[float]:
    """Return the values that tell how sure a figure is: medians of processes, or the trials if
    there is only one process.
    """
    medians = process_medians(processes)
    return medians if len(medians) > 1 else [value for trials in processes for value in trials]


def paired_ratio(ours: Processes, theirs: Processes) -> Interval:
    """Return the ratio of trials run side by side with its 95 % interval: drift that hits both
    sides of a pair cancels.

    Both sides hold the trials of the same processes; what one side of a process has more of is left
    out. Raises `ValueError` below two pairs, and for values that are not above 0.
    """
    logs = [
        [math.log(a) - math.log(b) for a, b in zip(*process, strict=False)]
        for process in zip(ours, theirs, strict=True)
    ]
    return Interval(*(math.exp(edge) for edge in interval(samples(logs))))


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of `values` with Student's interval. Raises `ValueError` below two values."""
    mean, error = mean_and_error(values)
    half = student_t(confidence, len(values) - 1) * error
    return Interval(mean - half, mean, mean + half)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


@lru_cache(maxsize=256)
def student_t(confidence: float, freedom: float) -> float:
    """Return t with P(|T| <= t) = `confidence` for Student's T, by bisection of `two_sided`."""
    low, high = 0.0, 1.0
    while 1 - two_sided(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided(middle, freedom) < confidence else (low, middle)
    return high


def two_sided(t: float, freedom: float) -> float:
    """Return P(|T| > |t|) for T of Student's distribution, whose degrees of freedom may be a
    fraction (Abramowitz and Stegun, 26.7.1 with 26.5.8).
    """
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized I_x(a, b), by its continued fraction, evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this point only
        return 1 - incomplete_beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 200):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction


def difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return the difference of the means, its standard error, and Welch's degrees of freedom."""
    (mean, error), (other_mean, other_error) = mean_and_error(before), mean_and_error(after)
    total = error**2 + other_error**2
    parts = error**4 / (len(before) - 1) + other_error**4 / (len(after) - 1)
    freedom = total**2 / parts if parts else len(before) + len(after) - 2.0
    return other_mean - mean, math.sqrt(total), freedom


def welch(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the p-value of Welch's two-sided t test of equal means: how often two samples of the
    same thing differ as much. Raises `ValueError` below two values on a side.
    """
    gap, error, freedom = difference(before, after)
    return two_sided(gap / error, freedom) if error else float(gap == 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of a family for their number (Holm 1979): one below 0.05 is then a false
    alarm in at most 5 % of families in which nothing has changed.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for step, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - step)))
        corrected[index] = largest
    return corrected
