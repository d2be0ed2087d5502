"""Tasks of ten thousand questions: what is around the model takes work in proportion to them."""

from __future__ import annotations

import random
import sys

import pytest

from openelm_mlx.evaluate.plan import Request, plan


def work_of(asked: list[Request]) -> int:
    """Count the calls of functions while requests are planned."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        plan(asked, 256)
    finally:
        sys.setprofile(None)
    return calls


def questions(count: int, before: int, own: int) -> list[Request]:
    """Questions of two choices, of so many tokens after so many that all have in common."""
    rng = random.Random(6)
    shared, *contexts = (
        tuple(rng.randrange(3, 4000) for _ in range(length)) for length in [before, *[own] * count]
    )
    return [Request(shared + one, (n,)) for one in contexts for n in range(2)]


@pytest.mark.parametrize(
    "before, own",
    [(0, 30), (100, 30), pytest.param(0, 400, id="each has a prefix of its own"), (100, 0)],
)
def test_plans_of_twice_as_many_questions_take_twice_the_work(before, own):
    few, many = (work_of(questions(count, before, own)) for count in (100, 200))
    assert few < many < 2.4 * few
