"""Divergence, agreement and perplexity against float64 numpy, and a comparison against figures
made by hand.
"""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from small import random_engine

from openelm_mlx.device import mx
from openelm_mlx.evaluate.compare import (
    compare,
    intervals,
    kl_divergence,
    own_text,
    top_1_agreement,
    with_interval,
)
from openelm_mlx.evaluate.score import POSITIONS, log_probs, perplexity_of


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def definition(one, other):
    """Log probabilities of both, and the divergence, in float64."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (one, other))
    return p, q, (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("vocab", [7, 4096])
@pytest.mark.parametrize("distance", [3.0, 0.1, 4.5e-4, 1e-5])
def test_small_and_large_divergences_in_float32(vocab, distance):
    one = np.float32(4 * normal(2, 5, vocab))
    other = np.float32(one + distance * normal(2, 5, vocab, seed=1))
    p, _, kl = definition(one.astype(np.float64), other.astype(np.float64))
    found = np.array(kl_divergence(mx.array(one), mx.array(other)))
    if distance == 4.5e-4 and vocab == 4096:
        assert 2e-8 < kl.mean() < 2e-7  # what is asked of the small ones
    assert found == pytest.approx(kl, rel=1e-3, abs=1e-12) and (found >= 0).all()
    assert np.array(log_probs(mx.array(one))) == pytest.approx(p, abs=1e-5)
    same = np.array(top_1_agreement(mx.array(one), mx.array(other)))
    assert (same == (one.argmax(-1) == other.argmax(-1))).all()


def test_equal_distributions_have_no_divergence():
    logits = mx.array(np.float32(normal(3, 500)))
    assert kl_divergence(logits, logits).max().item() == 0
    assert abs(kl_divergence(logits, logits + 3).max().item()) < 1e-12


def test_distributions_that_exclude_each_other_have_a_finite_divergence():
    one, other = mx.array([[200.0, 0.0, 0.0]]), mx.array([[0.0, 200.0, 0.0]])
    assert kl_divergence(one, other).item() == pytest.approx(200)
    gradient = mx.grad(lambda x: kl_divergence(one, x).sum())(other)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]


def test_half_precision_is_computed_in_float32():
    one, other = (mx.array(normal(4, 50, seed=seed)).astype(mx.float16) for seed in (0, 1))
    found = kl_divergence(one, other)
    exact = definition(*(np.array(x).astype(np.float64) for x in (one, other)))[2]
    assert found.dtype == log_probs(one).dtype == mx.float32
    assert np.array(found) == pytest.approx(exact, rel=1e-4)


def test_gradients_are_the_difference_of_the_probabilities():
    one, other = normal(3, 40), normal(3, 40, seed=1)
    loss = lambda x: kl_divergence(mx.array(np.float32(one)), x).mean()  # noqa: E731
    value, gradient = mx.value_and_grad(loss)(mx.array(np.float32(other)))
    p, q, kl = definition(one, other)
    assert value.item() == pytest.approx(kl.mean(), rel=1e-5)
    assert np.array(gradient) == pytest.approx((np.exp(q) - np.exp(p)) / 3, abs=1e-6)


def test_more_positions_than_logits_are_kept_for():
    one, other = (np.float32(normal(3, POSITIONS + 20, 9, seed=seed)) for seed in (0, 1))
    found = kl_divergence(mx.array(one), mx.array(other))
    assert np.array(found) == pytest.approx(definition(one, other)[2], rel=1e-4)


def test_perplexity():
    assert perplexity_of(math.log(4)) == pytest.approx(4)
    assert perplexity_of(1e4) == perplexity_of(math.inf) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def always(*probs):
    """A model that gives these probabilities whatever it reads."""
    return lambda tokens: mx.broadcast_to(mx.log(mx.array(probs)), (*tokens.shape, len(probs)))


def test_figures_by_hand():
    tokens = mx.array([[1, 0, 2, 2]])
    found = compare(always(0.5, 0.25, 0.25), always(0.25, 0.25, 0.5), [tokens, tokens[:, :2]])
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    figures = asdict(found)
    assert figures.pop("intervals_95") == {}  # too few positions for one
    assert figures == pytest.approx(
        {
            "tokens": 4,
            "mean_kl_divergence": kl,
            "p99_kl_divergence": kl,
            "top_1_agreement": 0,
            "perplexity": math.exp(-(2 * math.log(0.25) + 2 * math.log(0.5)) / 4),
            "reference_perplexity": math.exp(-(2 * math.log(0.5) + 2 * math.log(0.25)) / 4),
            "perplexity_ratio": 1,
            "max_logit_difference": math.log(2),
        },
        rel=1e-5,
    )
    same = compare(always(0.5, 0.5), always(0.5, 0.5), [mx.array([[1, 0]])])
    assert same.mean_kl_divergence == 0 and same.top_1_agreement == 1


def rows_of(values):
    """Rows as `intervals` takes them: 64 rows of 256 positions, each value in all four figures."""
    return [np.tile(row, (4, 1)) for row in values.reshape(64, 256)]


def test_intervals_are_those_of_the_means_of_blocks():
    blocks = normal(128)
    found = intervals(rows_of(np.repeat(blocks, 128)))  # neighbours are all alike
    low, high = found["mean_kl_divergence"]
    error = blocks.std() / math.sqrt(128)
    assert (low, high) == pytest.approx(
        (blocks.mean() - 1.96 * error, blocks.mean() + 1.96 * error), abs=0.2 * error
    )
    near = pytest.approx((math.exp(low), math.exp(high)), rel=1e-3)  # rows lack a token each
    assert found["perplexity"] == found["reference_perplexity"] == near
    assert found == intervals(rows_of(np.repeat(blocks, 128)))
    alone = intervals(rows_of(normal(128 * 128)))["top_1_agreement"]  # neighbours have no relation
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 / 128, rel=0.2)


def test_the_ratio_of_perplexities_is_of_the_same_blocks():
    ours = normal(64, 256)
    theirs = ours + 0.1 + 0.01 * normal(64, 256, seed=1)
    found = intervals([np.stack([a, a, a, b]) for a, b in zip(ours, theirs, strict=True)])
    low, high = found["perplexity_ratio"]
    alone = found["perplexity"]
    assert low < math.exp(0.1) < high and 50 * (high - low) < alone[1] - alone[0]


def test_a_short_text_has_no_intervals():
    row = np.ones((4, 512))
    assert intervals([row, row[:, :383]]) == {} != intervals([row, row])
    assert set(intervals([row, row]).values()) == {(1.0, 1.0), (math.e, math.e)}


@pytest.mark.parametrize(
    ("value", "ends", "text"),
    [
        (1.00035, (1.00012, 1.00058), "1.00035 (95 %: 1.00012 to 1.00058)"),
        (1.00564, (0.99977, 1.01009), "1.00564 (95 %: 0.9998 to 1.01)"),
        (39.6415, (37.664, 41.7245), "39.6415 (95 %: 37.7 to 41.7)"),
        (0, (0, 0), "0 (95 %: 0 to 0)"),
        (1077.784, (883.4, 1334.5), "1,077.78 (95 %: 883 to 1,330)"),
        (math.inf, (1e300, math.inf), "inf (95 %: 1e+300 to inf)"),
        (2806, None, "2,806"),
    ],
)
def test_an_interval_is_shown_in_digits_that_tell_its_ends_apart(value, ends, text):
    intervals = {} if ends is None else {"it": ends}
    assert with_interval({"it": value, "intervals_95": intervals}, "it") == text


def test_left_out_are_ids_beyond_the_vocabulary_and_positions_before_the_first():
    tokens = mx.array([[1, 0, 1, 1]])
    found = compare(always(0.25, 0.25, 0.5), always(0.4, 0.4, 0.2), [tokens], vocab=2)
    assert found.mean_kl_divergence < 1e-7 and found.perplexity == pytest.approx(2, rel=1e-6)
    drifting = lambda tokens: mx.cumsum(always(0.4, 0.6)(tokens), axis=1)  # noqa: E731
    late = compare(always(0.4, 0.6), drifting, [tokens], first=2)
    p = [np.array([0.4**power, 0.6**power]) for power in (1, 3, 4)]
    p = [x / x.sum() for x in p]
    kl = [float((p[0] * np.log(p[0] / q)).sum()) for q in p[1:]]
    assert late.tokens == 1 and late.mean_kl_divergence == pytest.approx(sum(kl) / 2, rel=1e-5)


def test_the_model_and_a_function_that_gives_its_logits_compare_alike(tiny):
    model, other = (random_engine(tiny, seed).model for seed in (3, 4))
    tokens = mx.random.randint(3, 60, (2, POSITIONS), key=mx.random.key(0))
    by_pieces = compare(model, other, [tokens, tokens[:1, :9]])
    at_once = compare(lambda x: model(x), lambda x: other(x), [tokens, tokens[:1, :9]])
    one, other = asdict(by_pieces), asdict(at_once)
    for name, (low, high) in one.pop("intervals_95").items():
        assert low < high and other["intervals_95"][name] == pytest.approx((low, high), rel=1e-4)
    del other["intervals_95"]
    assert one == pytest.approx(other, rel=1e-4)
    assert by_pieces.tokens == 2 * (POSITIONS - 1) + 8 and by_pieces.mean_kl_divergence > 0


def test_own_text_is_the_same_on_every_run_and_keeps_to_prompts_and_bans(tiny):
    model = random_engine(tiny, 3).model
    banned = mx.where(mx.arange(model.args.vocab_size) < 20, 0.0, -mx.inf)
    text = own_text(model, [[1, 30, 31], [1]], 24, seed=0, banned=banned)
    assert text.shape == (2, 24) and text[0, :3].tolist() == [1, 30, 31]
    assert text[0, 3:].max().item() < 20 and text[1, 1:].max().item() < 20
    assert mx.array_equal(text[:, :12], own_text(model, [[1, 30, 31], [1]], 12, 0, banned))
    assert not mx.array_equal(text, own_text(model, [[1, 30, 31], [1]], 24, 1, banned))
