from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from small import random_engine

from openelm_mlx import batch_generate, stream_generate
from openelm_mlx.options import SamplingOptions
from openelm_mlx.sampling import History, draw, filter_logits, seed_key

LOGITS = np.array([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]], dtype=np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kept(**options):
    return np.isfinite(np.array(filter_logits(mx.array(LOGITS), SamplingOptions(**options)))[0]).tolist()


def test_each_filter_against_plain_arithmetic():
    p = softmax(LOGITS[0])
    assert kept(temperature=1.0) == [True] * 6
    assert kept(temperature=1.0, top_k=2) == [True, True] + [False] * 4
    assert kept(temperature=1.0, top_p=0.8) == ((np.cumsum(p) - p) < 0.8).tolist()
    assert kept(temperature=1.0, top_p=0.0) == [True] + [False] * 5
    assert kept(temperature=1.0, min_p=0.2) == (p >= 0.2 * p.max()).tolist()
    assert kept() == [True] + [False] * 5
    warm = np.array(filter_logits(mx.array(LOGITS), SamplingOptions(temperature=2.0)))
    assert np.allclose(warm, LOGITS / 2)


def test_filters_see_the_tempered_distribution_one_after_the_other():
    p = softmax(LOGITS[0] / 2)
    likeliest = ((np.cumsum(p) - p) < 0.6).tolist()
    assert kept(temperature=2.0, top_p=0.6) == likeliest != kept(temperature=1.0, top_p=0.6)
    likely = (p >= 0.4 * p.max()).tolist()
    assert kept(temperature=2.0, min_p=0.4) == likely != kept(temperature=1.0, min_p=0.4)
    three = softmax(LOGITS[0, :3] / 2)  # top-p counts in what top-k has left
    of_three = ((np.cumsum(three) - three) < 0.8).tolist() + [False] * 3
    assert kept(temperature=2.0, top_k=3, top_p=0.8) == of_three != kept(temperature=2.0, top_p=0.8)


def test_penalties():
    history = History.of_prompt([[0, 4]], 6).plus(mx.array([1])).plus(mx.array([1]))
    options = SamplingOptions(temperature=1.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    got = np.array(filter_logits(mx.array(LOGITS), options, history))[0]
    assert np.allclose(got, [1.0, 0.5 - 0.5 - 0.5, 0.5, 0.0, -2.0, -3.0])


def test_draws_follow_the_distribution():
    options = SamplingOptions(temperature=1.0, top_k=4)
    n = 4000
    rows = mx.broadcast_to(mx.array(LOGITS), (50, 6))
    keys = mx.broadcast_to(seed_key(11), (50, 2))
    drawn = np.concatenate(
        [np.array(draw(rows, options, keys, mx.arange(i * 50, i * 50 + 50), None)) for i in range(n // 50)]
    )
    counts = np.bincount(drawn, minlength=6)
    expected = softmax(LOGITS[0, :4]) * n
    assert counts[4:].sum() == 0
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_a_seed_fixes_the_draw_whatever_the_batch(seed):
    options = SamplingOptions(temperature=1.0)
    alone = [draw(mx.array(LOGITS), options, seed_key(seed), mx.array([p]), None).item() for p in range(20)]
    rows, keys = mx.broadcast_to(mx.array(LOGITS), (20, 6)), mx.broadcast_to(seed_key(seed), (20, 2))
    assert draw(rows, options, keys, mx.arange(20), None).tolist() == alone


VOCAB, SIDE = 64, 101  # 100 x 100 pairs of neighbours, and the tokens between which they are


def agreement_bound(pairs: int) -> float:
    """How many of so many pairs of independent, even draws from the vocabulary may agree: one set in a billion has more."""
    mean = pairs / VOCAB
    return mean + 6 * math.sqrt(mean * (1 - 1 / VOCAB))


def agreements(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Equal tokens of two rows [sequences, positions], the other one shifted by up to three positions."""
    cut = [(slice(max(0, lag), SIDE - 1 + min(0, lag)), slice(max(0, -lag), SIDE - 1 + min(0, -lag))) for lag in range(-3, 4)]
    return [int((one[:, mine] == other[:, theirs]).sum()) for mine, theirs in cut]


@pytest.fixture(scope="module")
def flat(tiny):
    """All logits are equal, so that its tokens show the noise and nothing else."""
    return random_engine(tiny, seed=1, vocab=VOCAB, layers=1, spread=0.0)


def test_neighbouring_seeds_streams_and_positions_are_as_good_as_unrelated_ones(flat):
    settings = {"max_tokens": SIDE - 1, "ignore_eos": True, "slots": 512}
    groups = {
        "seeds": [(seed, 0) for seed in range(SIDE)],
        "streams": [(0, stream) for stream in range(SIDE)],
        "unrelated": [(seed * 7919**3 % 2**61, seed * 104729 % 2**31) for seed in range(1, SIDE + 1)],
        "both": [(seed, SIDE - seed) for seed in range(SIDE)],
    }
    rows = [SamplingOptions(temperature=1.0, seed=seed, stream=stream) for pairs in groups.values() for seed, stream in pairs]
    tokens = np.array([result.tokens for result in batch_generate(flat, [[1]] * len(rows), rows, **settings)])
    drawn = dict(zip(groups, tokens.reshape(len(groups), SIDE, SIDE - 1), strict=True))
    assert (drawn["seeds"][0] == drawn["streams"][0]).all()  # the very same seed and stream
    for name, one in drawn.items():
        assert max(agreements(one[1:], one[:-1])) < agreement_bound((SIDE - 1) ** 2), name
        assert (one[:, 1:] == one[:, :-1]).sum() < agreement_bound(SIDE * (SIDE - 2)), name  # positions beside each other
    across = agreements(drawn["seeds"][1:], drawn["streams"][1:])
    assert max(across) < agreement_bound((SIDE - 1) ** 2)
    counts = np.bincount(tokens.ravel(), minlength=VOCAB)
    expected = (tokens.size - 2 * (SIDE - 1)) / VOCAB  # two sequences come three times, which widens the sum a little
    assert ((counts - expected) ** 2 / expected).sum() < VOCAB + 6 * math.sqrt(2 * VOCAB)


def test_drafts_have_noise_of_their_own_which_neighbouring_seeds_do_not_share(flat):
    """A draft that is always right: after the first token sixteen are drawn by the draft and one by the target, and so on."""
    seeds, settings = range(12), {"max_tokens": SIDE - 1, "ignore_eos": True}
    drafting = {"draft": flat, "draft_tokens": 16, "adaptive_draft": False}
    drafted = np.array([
        [event.token for event in stream_generate(flat, [1], temperature=1.0, seed=seed, **settings, **drafting)]
        for seed in seeds
    ])  # fmt: skip
    rows = [SamplingOptions(temperature=1.0, seed=seed) for seed in seeds]
    plain = np.array([result.tokens for result in batch_generate(flat, [[1]] * len(rows), rows, **settings)])
    assert max(agreements(drafted[1:], drafted[:-1])) < agreement_bound((len(rows) - 1) * (SIDE - 1))
    by_target = np.arange(SIDE - 1) % 17 == 0
    equal = drafted == plain
    assert equal[:, by_target].all() and equal[:, ~by_target].sum() < agreement_bound(equal[:, ~by_target].size)
