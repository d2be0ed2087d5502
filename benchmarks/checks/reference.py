"""An independent answer to "which token follows?": a full pass in numpy, float64, without any cache
of the engine.

Only the filters and the noise are the engine's own (`sampling.filter_logits`, `sampling.gumbel`),
which have their own tests. What is to be shown here is that batching, chunks, reuse, drafts and
windows change nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from openelm_mlx.device import mx, nn
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Context,
    Controls,
    Filters,
    History,
    filter_logits,
    gumbel,
    seed_key,
)
from openelm_mlx.model.cache_kinds import CacheKind, Quantized, Window
from openelm_mlx.model.config import layer_shapes

Array = np.ndarray
PENALTIES = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "penalty_window",
    "logit_bias",
)  # what a greedy choice still depends on


class Reference:
    """The model of `engine` as matrices of numpy."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.weights = engine, full_weights(engine)

    def logits(self, tokens: list[int], kind: CacheKind) -> Array:
        """[T, vocab] float64, one row a token: the logits of what follows it, under the cache
        kind's form and window.
        """
        c, W = self.engine.config, self.weights
        length, half = len(tokens), c.head_dim // 2
        angles = np.arange(length)[:, None] * c.rope_freq_constant ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)

        def norm(x: Array, name: str) -> Array:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * W[name]

        def rotated(x: Array) -> Array:
            a, b = x[..., :half], x[..., half:]
            return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

        seen = visible(length, kind)
        x = W["transformer.token_embeddings.weight"][tokens]
        for number, shape in enumerate(layer_shapes(c)):
            name = f"transformer.layers.{number}."
            h = norm(x, name + "attn_norm.weight") @ W[name + "attn.qkv_proj.weight"].T
            h = h.reshape(length, -1, c.head_dim).swapaxes(0, 1)
            q, k, v = np.split(h, [shape.q_heads, shape.q_heads + shape.kv_heads])
            if c.normalize_qk_projections:
                q, k = norm(q, name + "attn.q_norm.weight"), norm(k, name + "attn.k_norm.weight")
            k, v = stored(rotated(k), kind), stored(v, kind)
            k, v = (np.repeat(a, shape.q_heads // shape.kv_heads, axis=0) for a in (k, v))
            scores = np.where(seen, rotated(q) @ k.swapaxes(1, 2) / math.sqrt(c.head_dim), -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            x = (
                x
                + (shares @ v).swapaxes(0, 1).reshape(length, -1)
                @ W[name + "attn.out_proj.weight"].T
            )
            h = norm(x, name + "ffn_norm.weight") @ W[name + "ffn.proj_1.weight"].T
            gate, up = np.split(h, 2, axis=-1) if c.ffn_with_glu else (h, np.ones(()))
            x = x + gate / (1 + np.exp(-gate)) * up @ W[name + "ffn.proj_2.weight"].T
        x = norm(x, "transformer.norm.weight")
        head = W[
            "transformer.token_embeddings.weight"
            if c.share_input_output_layers
            else "lm_head.weight"
        ]
        return (x @ head.T)[:, : self.engine.vocab]

    def scores(
        self, logits: Array, sampling: SamplingOptions, prompt: list[int], answer: list[int]
    ) -> Array:
        """[vocab]: of these the largest is drawn next, after prompt and answer, from `logits`
        [vocab] there.
        """
        greedy = sampling.greedy
        if greedy:
            penalties = {name: getattr(sampling, name) for name in PENALTIES}
            sampling = SamplingOptions(temperature=1.0, **penalties)
        vocab, filters = self.engine.vocab, Filters.of([sampling])
        controls = Controls.of([sampling], filters, vocab)
        history = History.of(prompt, answer, sampling.penalty_window, filters, vocab)
        keys = seed_key(sampling.seed or 0, sampling.stream)
        positions = mx.array([len(prompt) + len(answer)], dtype=mx.int32)
        newest = mx.array([[*prompt, *answer][-1]], dtype=mx.uint32)
        given = mx.array(logits[None].astype(np.float32))
        context = Context(controls, keys, positions, newest, history)
        found = filter_logits(given, filters, context)
        if not greedy:
            found = found + gumbel(keys, positions, vocab)
        return np.array(found[0]).astype(np.float64)

    def plausible(
        self,
        logits: Array,
        sampling: SamplingOptions,
        prompt: list[int],
        answer: list[int],
        tokens: tuple[int, int],
        tolerance: float,
    ) -> bool:
        """Whether an error of `tolerance` in a score or at the border of a filter lets either of
        two tokens be drawn.
        """
        likely: set[int] = set()
        for changed in near(sampling, tolerance):
            for token, shift in (
                (tokens[0], 0.0),
                *((token, s) for token in tokens for s in (-tolerance, tolerance)),
            ):
                moved = logits.copy()
                moved[token] += shift
                scores = self.scores(moved, changed, prompt, answer)
                likely.update(np.flatnonzero(scores >= scores.max() - tolerance).tolist())
        return likely.issuperset(tokens)


def near(sampling: SamplingOptions, tolerance: float) -> list[SamplingOptions]:
    """The options, and those whose filters are a little tighter or wider."""
    found = [sampling]
    for sign in (-1, 1):
        step = 1 + sign * tolerance
        changed = replace(
            sampling, top_p=min(sampling.top_p * step, 1.0), min_p=min(sampling.min_p * step, 1.0)
        )
        if sampling.xtc_probability:
            changed = replace(changed, xtc_threshold=sampling.xtc_threshold * step)
        found.append(changed)
    return found


def visible(length: int, kind: CacheKind) -> Array:
    """[length, length], True where the token of a row attends to that of a column."""
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    seen = column <= row
    if isinstance(kind.layout, Window):
        seen &= (column < kind.layout.keep) | (column > row - (kind.layout.size - kind.layout.keep))
    return seen


def stored(x: Array, kind: CacheKind) -> Array:
    """Keys or values as a cache of this kind gives them back."""
    if not isinstance(kind.store, Quantized):
        return x
    form: dict[str, Any] = {"group_size": kind.store.group_size, "bits": kind.store.bits}
    return np.array(
        mx.dequantize(*mx.quantize(mx.array(x.astype(np.float32)), **form), **form)
    ).astype(np.float64)


def full_weights(engine: Engine) -> dict[str, Array]:
    """Every weight in float64 under its path, quantized ones as what they stand for."""
    found = {}
    for path, module in engine.model.named_modules():
        for name, value in module.items():
            if not isinstance(value, mx.array) or name in ("scales", "biases"):
                continue
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                value = mx.dequantize(
                    value,
                    module.scales,
                    module.get("biases"),
                    group_size=module.group_size,
                    bits=module.bits,
                    mode=module.mode,
                )
            found[f"{path}.{name}" if path else name] = np.array(value.astype(mx.float32)).astype(
                np.float64
            )
    return found
