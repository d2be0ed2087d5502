"""Draws: those of chance, fixed by a seed, whatever else is drawn beside them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from sampling_rows import (
    LOGITS,
    NEWEST,
    VOCAB,
    Row,
    distributions,
    drawn,
    inputs,
    random_rows,
    reference,
    softmax,
)

from openelm_mlx.device import mx
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Context,
    Controls,
    Filters,
    coin,
    draw,
    seed_key,
)
from openelm_mlx.model.draws import gumbel


def test_a_row_in_a_batch_draws_what_it_draws_alone():
    """200 sets of options in batches of 8: each row keeps the token of its own filters, whatever is
    on for others.
    """
    rows = random_rows(200, seed=2)
    rows[::5] = random_rows(40, seed=3, masked=True)
    alone = [drawn([row])[0] for row in rows]
    assert [
        token for start in range(0, 200, 8) for token in drawn(rows[start : start + 8])
    ] == alone
    assert drawn(rows[:3] + rows[7:9], compiled=True) == alone[:3] + alone[7:9]
    assert drawn(rows[:1], compiled=True) == alone[:1]


@pytest.mark.needs("a C++ compiler")
def test_new_values_of_the_same_filters_cost_no_trace():
    """100 settings of the sampler: the function is traced once for each combination of filters."""
    rng, traced, steps = np.random.default_rng(5), [], {}
    for _ in range(100):
        options = SamplingOptions(
            temperature=float(rng.uniform(0.1, 2)),
            seed=int(rng.integers(2**40)),
            top_p=float(rng.uniform(0.1, 0.9)),
            top_k=int(rng.choice([0, 2, 10, 60])),
            repetition_penalty=float(rng.uniform(1.1, 2)),
            penalty_window=int(rng.integers(5, 9)),
            presence_penalty=float(rng.normal()),
            logit_bias={int(rng.integers(VOCAB)): 1.0},
        )
        row = Row(rng.normal(size=VOCAB), options, [1, 2], [3])
        logits, filters, context = inputs([row])

        def step(logits: mx.array, context: Context, filters: Filters = filters) -> mx.array:
            traced.append(filters)
            return draw(logits, filters, context)

        token = steps.setdefault(filters, mx.compile(step))(logits, context).item()
        assert token == drawn([row])[0]
    assert len(traced) == len(steps) == len({*traced}) == 2


def test_draws_follow_the_distribution():
    n, options = 4000, SamplingOptions(temperature=1.0, top_k=4, seed=11)
    tokens = drawn([Row(LOGITS, options, position=position) for position in range(n)])
    counts = np.bincount(tokens, minlength=6)
    expected = softmax(np.array(LOGITS[:4])) * n
    assert counts[4:].sum() == 0
    assert (
        (counts[:4] - expected) ** 2 / expected
    ).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_a_seed_fixes_the_draw_whatever_the_batch(seed):
    options = SamplingOptions(temperature=1.0, seed=seed, xtc_probability=0.5)
    rows = [Row(LOGITS, options, position=position) for position in range(20)]
    assert [drawn([row])[0] for row in rows] == drawn(rows)
    keys, positions = mx.concatenate([seed_key(seed)] * 20), mx.arange(20)
    noise, coins = gumbel(keys, positions, 6), coin(keys, positions)
    for place in range(20):
        assert (gumbel(seed_key(seed), mx.array([place]), 6)[0] == noise[place]).all().item()
        assert coin(seed_key(seed), mx.array([place])).item() == coins[place].item()


def test_a_greedy_choice_is_the_argmax_of_what_the_model_computed():
    logits = mx.array([[1.0, 3.0, 3.0, 2.0]], mx.bfloat16)
    assert (
        Filters.of([SamplingOptions(), SamplingOptions(top_k=1, temperature=2.0, top_p=0.5)])
        == Filters()
    )
    token = draw(logits, Filters(), Context(Controls(), seed_key(0), NEWEST, NEWEST))
    graph = io.StringIO()
    mx.export_to_dot(graph, token)
    assert graph.getvalue().count("shape=rectangle") == 2, graph.getvalue()  # ArgReduce and Squeeze
    assert token.item() == 1


def test_equal_scores_of_a_greedy_row_give_the_lower_id_beside_rows_that_sample():
    every = {"top_k": 5, "top_p": 0.5, "min_p": 0.9, "xtc_probability": 1.0}
    for logits in (
        [1, 2, 2, 0, 2],
        [-1e30, 1e-30, 1e-30, 0, -3e38],
        [-np.inf, 7e4, 7e4, -7e4, -np.inf],
    ):
        for others in ({}, every):
            options = [SamplingOptions(temperature=t, **others) for t in (0.0, 1e-7, 1.0)]
            rows = [Row(logits, o, position=place) for place in range(30) for o in options]
            tokens = drawn(rows)
            assert tokens[::3] == tokens[1::3] == [1] * 30
            assert [drawn([row])[0] for row in rows[:9]] == tokens[:9]


def test_extreme_temperatures_draw_like_any_other():
    for logits in (LOGITS, [3e38, 3e38, 1e38, -3e38, 0, 1], [0, -1e-5, -2e-5, -1, -np.inf, -3e38]):
        rows = [Row(logits, SamplingOptions(temperature=t)) for t in (1e-6, 1e-5, 0.01, 1, 100)]
        assert np.allclose(
            distributions(rows), [reference(row) for row in rows], rtol=2e-2, atol=1e-6
        )


SIDE = 101  # 100 x 100 pairs of neighbours, and the tokens between which they are


EVEN = 64  # tokens, all of them equally likely


def agreement_bound(pairs: int) -> float:
    """How many of so many pairs of independent, even draws may agree: one set in a billion has
    more.
    """
    mean = pairs / EVEN
    return mean + 6 * math.sqrt(mean * (1 - 1 / EVEN))


def agreements(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Equal tokens of two rows [sequences, positions], the other one shifted by up to three
    positions.
    """
    cut = [
        (slice(max(0, lag), SIDE - 1 + min(0, lag)), slice(max(0, -lag), SIDE - 1 + min(0, -lag)))
        for lag in range(-3, 4)
    ]
    return [int((one[:, mine] == other[:, theirs]).sum()) for mine, theirs in cut]


def test_neighbouring_seeds_streams_and_positions_are_as_good_as_unrelated_ones():
    groups = {
        "seeds": [(seed, 0) for seed in range(SIDE)],
        "streams": [(0, stream) for stream in range(SIDE)],
        "unrelated": [
            (seed * 7919**3 % 2**61, seed * 104729 % 2**31) for seed in range(1, SIDE + 1)
        ],
        "both": [(seed, SIDE - seed) for seed in range(SIDE)],
    }
    keys = mx.concatenate(
        [seed_key(seed, stream) for pairs in groups.values() for seed, stream in pairs]
    )
    places = [mx.full((len(keys),), place) for place in range(1, SIDE)]
    tokens = np.stack(
        [np.array(mx.argmax(gumbel(keys, place, EVEN), axis=-1)) for place in places], axis=1
    )
    by_group = dict(zip(groups, tokens.reshape(len(groups), SIDE, SIDE - 1), strict=True))
    assert (by_group["seeds"][0] == by_group["streams"][0]).all()  # the very same seed and stream
    for name, one in by_group.items():
        assert max(agreements(one[1:], one[:-1])) < agreement_bound((SIDE - 1) ** 2), name
        assert (one[:, 1:] == one[:, :-1]).sum() < agreement_bound(SIDE * (SIDE - 2)), (
            name
        )  # positions beside each other
    across = agreements(by_group["seeds"][1:], by_group["streams"][1:])
    assert max(across) < agreement_bound((SIDE - 1) ** 2)
    counts = np.bincount(tokens.ravel(), minlength=EVEN)
    expected = (
        tokens.size - 2 * (SIDE - 1)
    ) / EVEN  # two sequences come three times, which widens the sum a little
    assert ((counts - expected) ** 2 / expected).sum() < EVEN + 6 * math.sqrt(2 * EVEN)
