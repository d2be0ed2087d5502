"""Filter the tokens that a row can draw, and add the noise that draws one, by operations of MLX.

`kernels.sample` does the same by one kernel; `draw` (engine/sampling.py) chooses between the two.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from typing import Any, NamedTuple

from openelm_mlx.device import mx

COLD = 1e-30  # the temperature of a greedy choice: whatever is below the highest is out of reach


class Limits(NamedTuple):
    """The temperature and the filters of each row [B]. None: no row has this filter."""

    temperature: mx.array  # at most COLD if greedy
    top_k: mx.array | None = None  # int32, from 1 to the vocabulary's size
    top_p: mx.array | None = None  # inf for a row without
    min_p: mx.array | None = None  # as the gap that it allows, -log(min_p)
    shortlist: int = 0  # top-k leaves each row that is not greedy at most so many; 0: unknown


def noisy(scores: mx.array, temperature: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
    """Return scores [B, vocab] with Gumbel noise; those of a greedy row stay."""
    noise = gumbel(keys, positions, scores.shape[-1])
    return scores + mx.where(temperature[:, None] > COLD, noise, 0)


def remaining(logits: mx.array, limits: Limits) -> mx.array:
    """Return the gaps [B, vocab] below the highest logit, in units of the temperature; inf for a
    token that a filter drops.
    """
    best = logits.max(axis=-1, keepdims=True)
    gaps = (best - logits) / limits.temperature[:, None]  # never negative, so nothing overflows
    if limits.top_k is not None or limits.top_p is not None:
        gaps = keep_likeliest(gaps, limits)
    if limits.min_p is not None:
        gaps = mx.where(gaps > limits.min_p[:, None], math.inf, gaps)
    return gaps


def keep_likeliest(gaps: mx.array, limits: Limits) -> mx.array:
    """Apply top-k, then top-p, by one sort: each keeps the first tokens by gap, then by id."""
    vocab, ranked = gaps.shape[1], gaps
    if 0 < limits.shortlist < vocab:
        ranked = mx.partition(gaps, limits.shortlist - 1, axis=-1)[:, : limits.shortlist]
    ranked = mx.sort(ranked, axis=-1)
    kept = mx.array([[vocab]]) if limits.top_k is None else limits.top_k[:, None]
    if limits.top_p is not None:
        weights = mx.exp(-ranked)
        if limits.top_k is not None:
            weights = mx.where(numbers(ranked.shape[1]) < kept, weights, 0)
        mass = mx.cumsum(weights, axis=-1)
        short = mass < limits.top_p[:, None] * mass[:, -1:]  # up to here it is not enough
        kept = mx.minimum(kept, 1 + short.sum(axis=-1, keepdims=True))
    widest = mx.take_along_axis(ranked, kept - 1, axis=-1)
    tied = kept - (ranked < widest).sum(axis=-1, keepdims=True)  # how many of the widest gap stay
    equal = gaps == widest
    among = mx.cumsum(equal.astype(mx.int32), axis=-1)
    return mx.where((gaps < widest) | (equal & (among <= tied)), gaps, math.inf)


@lru_cache
def numbers(count: int) -> mx.array:
    """Return 0, 1, ... as int32, a constant of compiled code; mx.arange would run at every step."""
    values: Any = array("i", range(count))
    return mx.array(values)


def keyed(keys: mx.array, positions: mx.array, purpose: int = 0) -> mx.array:
    """Return random keys [B, 2] of draws from keys [B, 2] of rows, positions [B] and a purpose."""
    second = mx.array([0, 1], mx.uint32)  # in one expression, so that it is one kernel
    return keys + positions[:, None].astype(mx.uint32) * second + mx.array([purpose, 0], mx.uint32)


def gumbel(keys: mx.array, positions: mx.array, vocab: int) -> mx.array:
    """Return Gumbel noise [B, vocab], a function of keys [B, 2] and positions [B] alone."""
    mixed = keyed(keys, positions)
    if keys.shape[0] == 1:
        return mx.random.gumbel((vocab,), key=mixed.reshape(2))[None]
    noise = mx.vmap(lambda key: mx.random.gumbel((vocab,), key=key))  # one kernel for all rows
    return noise(mixed)
