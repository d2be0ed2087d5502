"""The plan of a run: each example once an epoch, little padding, the same for several processes."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.engine.ranks import Ranks
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.examples import Example
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.plan import Plan

LENGTH = 64
options_of = FinetuneOptions
sizes_of_examples = st.lists(st.integers(1, LENGTH), min_size=1, max_size=40)


def example(number: int, size: int, trained: int = 1) -> Example:
    """Return an example whose tokens all are its number."""
    return Example(array("i", [number] * size), bytes(size - trained) + b"\1" * trained, "")


def examples_of(sizes: Any) -> list[Example]:
    return [example(number, int(size), int(size > 1)) for number, size in enumerate(sizes)]


def found_in(batch: Batch) -> list[int]:
    """Return the numbers of the examples of a batch, in the order of rows and segments."""
    tokens, segments = np.array(batch.tokens), np.array(batch.segments)
    begins = (np.array(batch.positions) == 0) & (segments > 0)
    return tokens[begins].tolist()


def run_of(plan: Plan) -> list[list[Batch]]:
    return [plan.batches(step) for step in range(1, plan.steps + 1)]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    sizes=sizes_of_examples,
    batch=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    processes=st.integers(1, 3),
    packing=st.booleans(),
    epochs=st.sampled_from([0.3, 1.0, 2.0, 2.5]),
    seed=st.integers(0, 3),
)
def test_every_example_comes_once_an_epoch(
    sizes: list[int],
    batch: int,
    accumulate: int,
    processes: int,
    packing: bool,
    epochs: float,
    seed: int,
) -> None:
    """In the order of batches, processes, rows and segments, an epoch is a permutation."""
    examples = examples_of(sizes)
    options = options_of(
        batch=batch, accumulate=accumulate, packing=packing, epochs=epochs, seed=seed
    )
    plans = [Plan(examples, options, LENGTH, Ranks(rank, processes)) for rank in range(processes)]
    assert len({plan.steps for plan in plans}) == 1
    found: list[int] = []
    for step, parts in enumerate(zip(*map(run_of, plans), strict=True), 1):
        assert len({len(batches) for batches in parts}) == 1
        tokens = 0
        for shared in zip(*parts, strict=True):
            for one in shared:
                found += found_in(one)
                tokens += int((np.array(one.segments) > 0).sum())
        assert [plan.tokens(step) for plan in plans] == [tokens] * processes
        assert plans[0].epoch(step) == pytest.approx(len(found) / len(sizes))
    assert len(found) == max(1, round(epochs * len(sizes)))
    for start in range(0, len(found), len(sizes)):
        part = found[start : start + len(sizes)]
        assert len(set(part)) == len(part)
    assert sum(Counter(found).values()) == len(found)
