"""The memory of a pass follows `batch_tokens`, however many questions there are."""

from __future__ import annotations

import random

import pytest
from small import random_engine

from openelm_mlx.device import mx
from openelm_mlx.evaluate.plan import Request, plan
from openelm_mlx.evaluate.run import answers

SIZES = (256, 512, 1024)
NEAR = 0.2  # MLX frees memory as its threads get along, which differs on a busy machine


@pytest.fixture
def engine(tiny):
    return random_engine(tiny, 3, 256, 128)


def questions(count: int) -> list[Request]:
    """Return questions with four answers, each of which takes 64 tokens of a pass."""
    draw = random.Random(count)
    found = []
    for _ in range(count):
        context = tuple(draw.choices(range(3, 256), k=56))
        firsts = draw.sample(range(3, 256), k=4)  # answers that share nothing but the context
        found += [Request(context, (first, 4, 5)) for first in firsts]
    return found


def peak(engine, asked: list[Request], batch_tokens: int) -> int:
    """Return the bytes that answering takes beyond what is in use before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    answers(engine, asked, batch_tokens=batch_tokens)
    return mx.get_peak_memory() - before


def test_memory_follows_the_tokens_of_a_pass(engine):
    few, many = questions(8), questions(32)
    assert len(plan(many, 256)) == 4 * len(plan(few, 256))
    peak(engine, few, 256)  # what the first passes of a process make stays
    small, middle, large = (peak(engine, many, size) for size in SIZES)
    assert peak(engine, few, 256) == pytest.approx(small, rel=NEAR)
    assert middle == pytest.approx(2 * small, rel=NEAR)
    assert large == pytest.approx(4 * small, rel=NEAR)
