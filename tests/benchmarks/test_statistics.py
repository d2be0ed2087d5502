"""Tests and intervals, against books and against a simulation of what they promise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from openelm_mlx.benchmarks.results.statistics import (
    difference,
    holm,
    interval,
    paired_ratio,
    student_t,
    two_sided,
    welch,
)


@pytest.mark.parametrize(  # from the tables of any statistics book
    ("confidence", "freedom", "t"),
    [(0.95, 1, 12.706), (0.95, 4, 2.776), (0.99, 5, 4.032), (0.95, 6, 2.447), (0.995, 9, 3.690),
     (0.95, 120, 1.980), (0.999, 30, 3.646)],
)  # fmt: skip
def test_students_t(confidence, freedom, t):
    assert student_t(confidence, freedom) == pytest.approx(t, abs=6e-4)
    assert two_sided(t, freedom) == pytest.approx(1 - confidence, rel=1e-3)
    assert two_sided(-t, freedom) == two_sided(t, freedom)


@pytest.mark.parametrize("freedom", [0.7, 1.5, 2.5, 4.4, 17.3])
def test_students_t_between_whole_degrees_of_freedom(freedom):
    """The tail, against the sum of the density."""
    t = np.tan(np.linspace(math.atan(1.7), math.pi / 2, 400001)[:-1])  # to infinity in finite steps
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (
        math.exp(scale)
        / math.sqrt(freedom * math.pi)
        * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
    )
    tail = 2 * np.sum((density[1:] + density[:-1]) / 2 * np.diff(t))
    assert two_sided(1.7, freedom) == pytest.approx(tail, rel=0.02 if freedom < 1 else 1e-4)
    assert two_sided(0, freedom) == 1


def test_welchs_test_is_the_one_of_the_books():
    """Student's own data (Biometrika 6, 1908), with t and the degrees of freedom that R gives."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    gap, error, freedom = difference(two, one)
    assert (gap / error, freedom) == pytest.approx((-1.8608, 17.776), rel=1e-4)
    assert welch(one, two) == pytest.approx(0.07939, rel=1e-3) and welch(one, two) == welch(
        two, one
    )
    assert welch([1, 1], [1, 1]) == 1 and welch([1, 1], [2, 2]) == 0
    with pytest.raises(ValueError, match="at least two values"):
        welch([1.0], [1.0, 2.0])


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1] and holm([]) == []


@pytest.mark.parametrize(
    "draw", [random.gauss, lambda m, s: random.expovariate(1)], ids=["normal", "skewed"]
)
def test_an_interval_covers_the_true_mean_about_as_often_as_it_says(draw):
    random.seed(1)
    for count in (5, 7, 15):
        truth = 0 if draw is random.gauss else 1
        found = [interval([draw(0, 1) for _ in range(count)]) for _ in range(2000)]
        share = sum(one.low <= truth <= one.high for one in found) / len(found)
        assert (0.935 if draw is random.gauss else 0.87) <= share <= 0.965
    with pytest.raises(ValueError, match="at least two values"):
        interval([1.0])


@pytest.mark.parametrize("processes", [1, 3, 5])
def test_the_interval_of_a_ratio_covers_the_true_one(processes):
    """Trials off by 3 %, a tenth of them by half as much again; of several processes each side of
    each is off by 2 %.
    """
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        sides = 1 + 0.03 * generator.standard_normal((2, processes, 7))
        sides *= np.where(generator.random(sides.shape) < 0.1, 1.5, 1)
        sides *= np.exp(
            (0.02 if processes > 1 else 0) * generator.standard_normal((2, processes, 1))
        )
        low, _, high = paired_ratio(2 * sides[0], sides[1])
        covered += low <= 2 <= high
    assert 0.93 <= covered / 1000 <= 0.99


def test_the_ratio_of_pairs_ignores_drift_that_hits_both():
    drift = [1.0, 1.2, 1.5, 1.9, 2.4]
    assert paired_ratio([[2 * d for d in drift]], [drift]) == pytest.approx((2, 2, 2))
    sides = [[1, 2, 3.1]], [[2, 4, 6]]
    there, back = paired_ratio(*sides), paired_ratio(*sides[::-1])
    assert math.isclose(there.low * back.high, 1) and math.isclose(there.middle * back.middle, 1)
