"""The plan of a run: each example once an epoch, little padding, the same for several processes."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.engine.ranks import Ranks
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.examples import Example, Pair
from openelm_mlx.finetune.options import STEPS, FinetuneOptions
from openelm_mlx.finetune.packing import pack
from openelm_mlx.finetune.plan import Plan, once, sized

LENGTH = 64


def example(number: int, size: int, trained: int = 1) -> Example:
    """Return an example whose tokens all are its number, of which the last are trained."""
    return Example(array("i", [number] * size), bytes(size - trained) + b"\1" * trained, "")


def examples_of(sizes: Any) -> list[Example]:
    return [example(number, int(size), int(size > 1)) for number, size in enumerate(sizes)]


def found_in(batch: Batch) -> list[int]:
    """Return the numbers of the examples of a batch, in the order of rows and segments."""
    begins = (np.array(batch.positions) == 0) & (np.array(batch.segments) > 0)
    return np.array(batch.tokens)[begins].tolist()


def by_batch(plan: Plan) -> list[list[int]]:
    """Return the examples of each batch of a run."""
    return [found_in(one) for step in range(1, plan.steps + 1) for one in plan.batches(step)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, LENGTH), min_size=1, max_size=40),
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
    """In the order of batches, processes, rows and segments an epoch is a permutation, and it is
    that of one process with as many times the rows.
    """
    examples = examples_of(sizes)

    def options(rows: int) -> FinetuneOptions:
        more = {"batch": rows, "accumulate": accumulate, "packing": packing}
        return FinetuneOptions(**more, epochs=epochs, seed=seed)  # type: ignore[arg-type]

    plans = [Plan(examples, options(batch), LENGTH, Ranks(n, processes)) for n in range(processes)]
    alone = Plan(examples, options(batch * processes), LENGTH)
    assert {plan.steps for plan in plans} == {alone.steps}
    found: list[int] = []
    for step in range(1, alone.steps + 1):
        shared = [[found_in(one) for one in plan.batches(step)] for plan in plans]
        together = [sum(parts, []) for parts in zip(*shared, strict=True)]
        assert together == [found_in(one) for one in alone.batches(step)]
        found += sum(together, [])
        assert plans[0].epoch(step) == len(found) / len(sizes)
        assert plans[0].tokens(step) == sum(sizes[number] for number in sum(together, []))
    assert len(found) == max(1, round(epochs * len(sizes)))
    for start in range(0, len(found), len(sizes)):
        part = found[start : start + len(sizes)]
        assert len(set(part)) == len(part)


RANDOM = np.random.default_rng(0)
MIXES = {
    "uniform": RANDOM.integers(2, 513, 500),
    "half uniform": RANDOM.integers(2, 257, 500),
    "log-normal": np.clip(RANDOM.lognormal(np.log(150), 0.8, 500), 2, 512).astype(int),
    "long": RANDOM.integers(256, 513, 500),
    "longest": RANDOM.integers(461, 513, 500),
    "short": RANDOM.integers(2, 33, 4000),
    "normal": np.clip(RANDOM.normal(220, 25, 500), 2, 512).astype(int),
    "bimodal": np.where(
        RANDOM.random(500) < 0.5, RANDOM.integers(2, 50, 500), RANDOM.integers(300, 450, 500)
    ),
    "equal": np.full(500, 301),
}


@pytest.mark.parametrize("mix", MIXES)
def test_packed_rows_have_at_most_3_percent_padding(mix: str) -> None:
    """That holds for runs of at least a hundred batches, with few lengths of rows."""
    sizes = MIXES[mix]
    plan = Plan(examples_of(sizes), FinetuneOptions(batch=2, epochs=3), 512)
    batches = [one for step in range(1, plan.steps + 1) for one in plan.batches(step)]
    slots = sum(one.tokens.size for one in batches)
    assert plan.waste == pytest.approx(1 - 3 * sizes.sum() / slots)
    assert plan.waste <= 0.03
    assert {one.tokens.shape for one in batches} == {shape[:2] for shape in plan.shapes}
    assert len(plan.shapes) <= 13
    assert max(one.tokens.size for one in batches) <= 2 * 512


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_epochs_of_few_rows_waste_no_more(batch: int) -> None:
    """The last row of an epoch, and its last batch, are filled by the next one."""
    sizes = np.random.default_rng(0).integers(4, 40, 12)
    plan = Plan(examples_of(sizes), FinetuneOptions(batch=batch, epochs=60), LENGTH)
    assert plan.waste <= 0.03


@pytest.mark.parametrize("packing", [True, False])
def test_examples_meet_others_in_every_epoch_and_with_every_seed(packing: bool) -> None:
    """In mlx-lm the batches of all epochs have the same examples, in another order."""
    examples = examples_of(np.random.default_rng(0).integers(2, LENGTH, 200))
    runs = []
    for seed in (0, 1):
        options = FinetuneOptions(batch=3, epochs=2, packing=packing, seed=seed)
        runs.append([frozenset(batch) for batch in by_batch(Plan(examples, options, LENGTH))])
    for found in runs:
        assert len({*found}) >= 0.98 * len(found)
    assert len({*runs[0]} & {*runs[1]}) <= 0.02 * len(runs[0])


def test_a_plan_that_is_made_again_has_the_same_batches() -> None:
    """So a run goes on at any step without the batches before it."""
    examples = examples_of(np.random.default_rng(0).integers(2, LENGTH, 50))
    options = FinetuneOptions(batch=2, accumulate=2)
    plan, again = (Plan(examples, options, LENGTH) for _ in range(2))
    for step in (plan.steps, 3):
        for one, other in zip(plan.batches(step), again.batches(step), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_end_a_run_in_place_of_epochs() -> None:
    examples = examples_of([30] * 8)
    for steps in (1, 2, 9):
        options = FinetuneOptions(batch=1, accumulate=2, steps=steps)
        plan = Plan(examples, options, LENGTH)
        assert plan.steps == steps
        assert plan.epoch(steps) == pytest.approx(steps / 2)


def test_a_step_is_at_most_an_epoch() -> None:
    """Else few examples would be learnt in one step, however many epochs there are."""
    plan = Plan(examples_of([20] * 9), FinetuneOptions(batch=8, accumulate=8, epochs=5), LENGTH)
    assert plan.steps >= 5
    assert plan.epoch(1) <= 1


def test_an_evaluation_takes_each_example_once_and_always_alike() -> None:
    examples = examples_of(np.random.default_rng(0).integers(2, LENGTH, 21))
    options = FinetuneOptions(batch=2, accumulate=3, steps=50)
    plan = once(examples, options, LENGTH)
    assert sorted(sum(by_batch(plan), [])) == list(range(21))
    assert by_batch(plan) == by_batch(once(examples, options, LENGTH))


def test_the_arrays_of_a_batch() -> None:
    examples = [
        Example(array("i", [1, 5, 6, 2]), b"\0\0\1\1", ""),
        Example(array("i", [1, 7, 2]), b"\0\1\0", ""),
    ]
    (batch,) = Plan(examples, FinetuneOptions(epochs=1), 8).batches(1)
    assert batch.tokens.tolist() == [[1, 5, 6, 2, 1, 7, 2]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.targets.tolist() == [[5, 6, 2, 0, 7, 2, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 1, 0, 0]]
    assert batch.sequences.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch.counts.tolist() == [2, 1]
    assert batch.trained.tolist() == [1, 2, 4, 6]  # the last is a place without a target


def test_both_answers_of_a_pair_are_in_one_row() -> None:
    random = np.random.default_rng(0)
    pairs = []
    for number in range(30):
        sizes = random.integers(3, LENGTH + 1, 2).tolist()
        pairs.append(Pair(*(example(2 * number + n, size, 2) for n, size in enumerate(sizes))))
    plan = Plan(pairs, FinetuneOptions(batch=2, epochs=1), LENGTH)
    found = []
    for step in range(1, plan.steps + 1):
        (batch,) = plan.batches(step)
        tokens, numbers = np.array(batch.tokens), np.array(batch.sequences)
        inside = np.array(batch.segments) > 0
        counts = np.array(batch.counts)
        assert len(counts) == plan.shapes[0].sequences
        assert counts.tolist() == [2.0] * int(counts.sum() / 2) + [0.0] * int((counts == 0).sum())
        for pair in range(int(counts.sum()) // 4):
            chosen, rejected = (inside & (numbers == 2 * pair + n) for n in (0, 1))
            first = tokens[chosen][0]
            assert set(tokens[chosen]) == {first} and first % 2 == 0
            assert set(tokens[rejected]) == {first + 1}
            assert set(np.nonzero(chosen)[0]) == set(np.nonzero(rejected)[0])
            found.append(int(first) // 2)
    assert sorted(found) == list(range(30))
    assert max(batch.tokens.size for batch in plan.batches(1)) <= 2 * 2 * LENGTH


def test_an_example_goes_where_it_leaves_the_least_room() -> None:
    sizes = np.array([5, 3, 4, 1])
    rows = pack(np.arange(4), sizes, 9)
    parts = np.split(rows.numbers, rows.starts[1:-1])
    assert [part.tolist() for part in parts] == [[0, 1, 3], [2]]
    assert rows.tokens(sizes).tolist() == [9, 4]


def test_few_data_have_steps_enough_unless_the_batch_is_given():
    """In rows of the usual length, an epoch of few short examples would be a single step."""
    few = examples_of([50] * 100)
    options, length = sized(few, examples_of([60]), FinetuneOptions(epochs=1), 1024)
    assert (options.batch, length) == (2, 64)  # the longest one of all, held out, still fits
    assert Plan(few, options, length).steps >= STEPS
    assert sized(few, [], FinetuneOptions(length=512), 512)[1] == 512
    assert sized(few, [], FinetuneOptions(packing=False), 1024) == (
        FinetuneOptions(packing=False, batch=2),
        1024,
    )
    assert sized(few, [], FinetuneOptions(batch=4), 1024) == (FinetuneOptions(batch=4), 1024)
    many = examples_of([50] * 4000)
    assert sized(many, [], FinetuneOptions(), 1024) == (FinetuneOptions(batch=4), 1024)


def test_a_single_long_example_is_not_divided_for_more_steps():
    assert sized(examples_of([900]), [], FinetuneOptions(), 1024)[1] == 1024


def test_a_run_of_more_rows_than_can_be_planned_is_refused():
    for asked, said in (
        ({"epochs": 1e12}, "epochs is 1000000000000.0"),
        ({"steps": 10**20}, f"steps is {10**20}"),
    ):
        with pytest.raises(OptionError) as raised:
            Plan(examples_of([5, 6]), FinetuneOptions(batch=1, **asked), 8)
        what = "which takes more than 20,000,000 rows; give fewer"
        assert str(raised.value) == f"{said}, {what}"
