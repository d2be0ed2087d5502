"""From logits to the next token, on the device. The order of the filters is stated once, in `filter_logits`.

Randomness is a pure function of seed, stream and position in the text, counted from BOS: the noise for a token does
not depend on chunking, batching, caching or how many tokens were drawn before, so a seed always gives the same text.
Seed and stream are hashed: those of adjacent ones have nothing in common.
"""

from __future__ import annotations

import secrets
import struct
from hashlib import blake2b
from typing import NamedTuple

import mlx.core as mx

from openelm_mlx.options import SamplingOptions

NEVER = -float("inf")
DRAWING, DRAFTING, ACCEPTING = range(3)  # what noise is for: the same position has another for each


class History(NamedTuple):
    """What the penalties look at, per sequence: tokens seen anywhere, and how often each was generated."""

    seen: mx.array  # [B, vocab] bool, prompt and answer
    generated: mx.array  # [B, vocab] float32, answer only

    @classmethod
    def of_prompt(cls, prompts: list[list[int]], vocab: int) -> History:
        rows = [mx.zeros((vocab,), mx.bool_) for _ in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            row[mx.array([token for token in prompt if token < vocab] or [0])] = True
        return cls(mx.stack(rows), mx.zeros((len(prompts), vocab)))

    def plus(self, tokens: mx.array) -> History:
        """After one more token a sequence, tokens [B]."""
        one = mx.arange(self.seen.shape[1]) == tokens[:, None]
        return History(self.seen | one, self.generated + one)


def penalise(logits: mx.array, history: History, o: SamplingOptions) -> mx.array:
    """Repetition penalty (arXiv:1909.05858) on prompt and answer; presence and frequency penalties on the answer."""
    if o.repetition_penalty != 1.0:
        scaled = mx.where(logits > 0, logits / o.repetition_penalty, logits * o.repetition_penalty)
        logits = mx.where(history.seen, scaled, logits)
    if o.presence_penalty or o.frequency_penalty:
        logits = logits - o.presence_penalty * (history.generated > 0) - o.frequency_penalty * history.generated
    return logits


def filter_logits(logits: mx.array, options: SamplingOptions, history: History | None = None) -> mx.array:
    """Logits [B, vocab] after every option but the draw itself: penalties, temperature, top-k, top-p, min-p.

    softmax of the result is exactly the distribution that tokens are drawn from.
    """
    o = options
    if history is not None:
        logits = penalise(logits, history, o)
    if o.greedy:
        return mx.where(logits == logits.max(axis=-1, keepdims=True), logits, NEVER)
    logits = logits / o.temperature
    if 0 < o.top_k < logits.shape[-1]:
        kth = mx.topk(logits, o.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < kth, NEVER, logits)
    if o.top_p < 1.0:
        order = mx.argsort(-logits, axis=-1)
        p = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
        mass_before = mx.cumsum(p, axis=-1) - p
        keep = (mass_before < o.top_p) | (mx.arange(p.shape[-1]) == 0)  # the likeliest token always stays
        keep = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, keep, axis=-1)
        logits = mx.where(keep, logits, NEVER)
    if o.min_p > 0.0:
        p = mx.softmax(logits, axis=-1)
        logits = mx.where(p < o.min_p * p.max(axis=-1, keepdims=True), NEVER, logits)
    return logits


def new_seed() -> int:
    return secrets.randbits(62)


def seed_key(seed: int, stream: int = 0, offset: int = 0) -> mx.array:
    """The key of one sequence, [1, 2] uint32: a hash of seed and stream.

    `offset` tokens of the text are no longer in the prompt: noise at position p is that at p + offset without it.
    """
    high, low = struct.unpack("<2I", blake2b(struct.pack("<2Q", seed, stream), digest_size=8).digest())
    return mx.array([[high, low + offset & 0xFFFFFFFF]], dtype=mx.uint32)


def keyed(keys: mx.array, positions: mx.array, purpose: int) -> mx.array:
    """Random keys [B, 2], one a draw, from the sequences' keys [B, 2], positions [B] and what the noise is for."""
    purposes = mx.full(positions.shape, purpose * 0x9E3779B9 & 0xFFFFFFFF, dtype=mx.uint32)
    return keys + mx.stack([purposes, positions.astype(mx.uint32)], axis=1)


def gumbel(keys: mx.array, positions: mx.array, vocab: int, purpose: int = DRAWING) -> mx.array:
    """Gumbel noise [B, vocab] for the tokens at `positions` [B], a function of key [B, 2], position and purpose alone."""
    mixed = keyed(keys, positions, purpose)
    if keys.shape[0] == 1:
        return mx.random.gumbel((vocab,), key=mixed[0])[None]
    return mx.vmap(lambda key: mx.random.gumbel((vocab,), key=key))(mixed)  # one kernel for all rows


def draw(
    logits: mx.array, options: SamplingOptions, keys: mx.array, positions: mx.array, history: History | None
) -> mx.array:
    """One token a sequence, [B] uint32, from float32 logits [B, vocab].

    Sampling is argmax(logits + Gumbel noise), which draws exactly from softmax(logits). A greedy choice is the
    argmax of the penalised logits, without noise.
    """
    if options.greedy:
        return mx.argmax(logits if history is None else penalise(logits, history, options), axis=-1)
    filtered = filter_logits(logits, options, history)
    return mx.argmax(filtered + gumbel(keys, positions, logits.shape[-1]), axis=-1)


class Logprobs(NamedTuple):
    """Natural-log probabilities under the model itself, before any sampling option."""

    chosen: mx.array  # [B]
    top_tokens: mx.array  # [B, n]
    top: mx.array  # [B, n]


def logprobs(logits: mx.array, tokens: mx.array, n: int) -> Logprobs:
    """Return the log probabilities of `tokens` [B] and of the n likeliest tokens.

    At least one is taken, as MLX 0.32 divides by zero on arrays without elements.
    """
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    order = mx.argsort(-logp, axis=-1)[:, : max(n, 1)]
    chosen = mx.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, order, mx.take_along_axis(logp, order, axis=-1))
