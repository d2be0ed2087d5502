"""Compare two answers to one request: where they differ, can rounding have made the difference?

An independent pass of the model tells which token follows: float64 in numpy, no caches of the
engine. Only the filters and the noise are the engine's own (`sampling.filter_logits`,
`draws.gumbel`), which have their own tests. What is to be shown here is that batching, chunks,
reuse, drafts and windows change nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from openelm_mlx.benchmarks.checks import Answer, Request
from openelm_mlx.device import mx, nn
from openelm_mlx.engine import sampling
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.model import draws
from openelm_mlx.model.cache_kinds import CacheKind, Quantized, Window
from openelm_mlx.model.config import layer_shapes
from openelm_mlx.model.decoder import parameters

Array = np.ndarray
# what a greedy choice depends on besides the logits
PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window"]
PENALTIES += ["logit_bias"]
TIE = 1e-5  # two scores of float32 that are so near may change places
TIE_8_BITS = (
    1e-2  # the same with keys and values in 8 bits; of other kinds only the rate is reported
)
# these ways compute in the same order as what they repeat
STRICT = {"not streamed", "alone again", "a batch of one", "the same batch again"}


@dataclass(frozen=True)
class Difference:
    """Two answers to one request, and whether rounding explains them."""

    way: str
    place: int  # of the first token that differs
    tokens: tuple[int | None, int | None]
    gap: float  # between the scores of the two
    allowed: bool
    request: str
    kind: str

    def __str__(self) -> str:
        return (
            f"{'rounding' if self.allowed else 'WRONG'}: {self.way}, token {self.place} is "
            f"{self.tokens[1]}, alone {self.tokens[0]}; scores {self.gap:.2e} apart; {self.kind}; "
            f"{self.request}"
        )


@dataclass
class Report:
    """The number of comparisons, and their differences."""

    compared: Counter[str] = field(default_factory=Counter)  # answers, by way
    tokens: Counter[str] = field(default_factory=Counter)  # compared, up to the first that differs
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [*self.errors, *(str(found) for found in self.differences if not found.allowed)]


class Judge:
    """Compare answers of one engine, and keep a report."""

    def __init__(self, engine: Engine, report: Report) -> None:
        self.engine, self.report = engine, report
        dtypes = {array.dtype for array in parameters(engine.model).values()}
        self.float32 = not dtypes & {mx.float16, mx.bfloat16}

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.engine)

    def exact(self, kind: CacheKind) -> bool:
        """Return whether all is computed in float32, so that only ties may change places."""
        return self.float32 and not isinstance(kind.store, Quantized)

    def compare(
        self, way: str, request: Request, kind: CacheKind, one: Answer, other: Answer
    ) -> None:
        """Report where `other` differs from `one`."""
        self.report.compared[way] += 1
        place = first_difference(one, other)
        compared = min(len(one.tokens), len(other.tokens))
        self.report.tokens[way] += compared if place is None else place + 1
        if place is None:
            if one.reason and other.reason and (one.text, one.reason) != (other.text, other.reason):
                self.report.errors.append(
                    f"{way}: the same tokens, but {one.reason} {one.text!r} alone and "
                    f"{other.reason} {other.text!r}; {request}"
                )
            return
        ours, theirs = ((*answer.tokens, None)[place] for answer in (one, other))
        gap, allowed = math.inf, False
        if ours is not None and theirs is not None:
            gap, allowed = self.weigh(request, kind, one.tokens[:place], (ours, theirs))
        allowed = allowed and (self.exact(kind) or way not in STRICT)
        self.report.differences.append(
            Difference(way, place, (ours, theirs), gap, allowed, str(request), str(kind))
        )

    def weigh(
        self, request: Request, kind: CacheKind, answer: list[int], tokens: tuple[int, int]
    ) -> tuple[float, bool]:
        """Return how far the scores of two tokens are apart, and whether rounding may swap them."""
        logits = self.reference.logits(request.prompt + answer, kind)[-1]
        scores = self.reference.scores(logits, request, answer)
        gap = float(abs(scores[tokens[0]] - scores[tokens[1]]))
        in_8_bits = isinstance(kind.store, Quantized) and kind.store.bits == 8
        if self.exact(kind) or (self.float32 and in_8_bits):
            tolerance = TIE if self.exact(kind) else TIE_8_BITS
            return gap, self.reference.plausible(logits, request, answer, tokens, tolerance)
        return gap, True


def first_difference(one: Answer, other: Answer) -> int | None:
    """Return the place of the first token that differs, as far as a cancelled answer came."""
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return place
    if one.reason is None or other.reason is None or len(one.tokens) == len(other.tokens):
        return None
    return min(len(one.tokens), len(other.tokens))


# --- the independent pass


class Reference:
    """The model of an engine as matrices of numpy."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.weights = engine, full_weights(engine)

    def logits(self, tokens: list[int], kind: CacheKind) -> Array:
        """Return [T, vocab] float64: for each token the logits of what follows it.

        Keys and values are as a cache of this kind stores them, and within its window.
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
            heads = (shares @ v).swapaxes(0, 1).reshape(length, -1)
            x = x + heads @ W[name + "attn.out_proj.weight"].T
            h = norm(x, name + "ffn_norm.weight") @ W[name + "ffn.proj_1.weight"].T
            gate, up = np.split(h, 2, axis=-1) if c.ffn_with_glu else (h, np.ones(()))
            x = x + gate / (1 + np.exp(-gate)) * up @ W[name + "ffn.proj_2.weight"].T
        tied = c.share_input_output_layers
        head = W["transformer.token_embeddings.weight" if tied else "lm_head.weight"]
        return (norm(x, "transformer.norm.weight") @ head.T)[:, : self.engine.vocab]

    def scores(
        self,
        logits: Array,
        request: Request,
        answer: list[int],
        options: SamplingOptions | None = None,
    ) -> Array:
        """Return [vocab] scores from `logits` [vocab]; the token with the largest is drawn next.

        `answer` is what the request has been given so far; `options` are tried instead of its own.
        """
        options = options or request.sampling
        greedy = options.greedy
        if greedy:
            penalties = {name: getattr(options, name) for name in PENALTIES}
            options = SamplingOptions(temperature=1.0, **penalties)
        vocab, filters = self.engine.vocab, sampling.Filters.of([options])
        window, known = options.penalty_window, [*request.prompt, *answer]
        keys = sampling.seed_key(options.seed or 0, options.stream)
        positions = mx.array([len(known)], dtype=mx.int32)
        context = sampling.Context(
            sampling.Controls.of([options], filters, vocab),
            keys,
            positions,
            mx.array(known[-1:], dtype=mx.uint32),
            sampling.History.of(request.prompt, answer, window, filters, vocab),
        )
        given = mx.array(logits[None].astype(np.float32))
        found = sampling.filter_logits(given, filters, context)
        if not greedy:
            found = found + draws.gumbel(keys, positions, vocab)
        return np.array(found[0]).astype(np.float64)

    def plausible(
        self,
        logits: Array,
        request: Request,
        answer: list[int],
        tokens: tuple[int, int],
        tolerance: float,
    ) -> bool:
        """Return whether a small error lets either of two tokens be drawn.

        That is an error of `tolerance` in a score, or at the border of a filter.
        """
        shifts = [(tokens[0], 0.0)]
        shifts += [(token, shift) for token in tokens for shift in (-tolerance, tolerance)]
        likely: set[int] = set()
        for options in near(request.sampling, tolerance):
            for token, shift in shifts:
                moved = logits.copy()
                moved[token] += shift
                scores = self.scores(moved, request, answer, options)
                likely.update(np.flatnonzero(scores >= scores.max() - tolerance).tolist())
        return likely.issuperset(tokens)


def near(options: SamplingOptions, tolerance: float) -> list[SamplingOptions]:
    """Return the options, and those whose filters are a little tighter or wider."""
    found = [options]
    for step in (1 - tolerance, 1 + tolerance):
        top_p, min_p = min(options.top_p * step, 1.0), min(options.min_p * step, 1.0)
        changed = replace(options, top_p=top_p, min_p=min_p)
        if options.xtc_probability:
            changed = replace(changed, xtc_threshold=options.xtc_threshold * step)
        found.append(changed)
    return found


def visible(length: int, kind: CacheKind) -> Array:
    """Return [length, length], True if the token of a row attends to that of a column."""
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    seen = column <= row
    if isinstance(kind.layout, Window):
        seen &= (column < kind.layout.keep) | (column > row - (kind.layout.size - kind.layout.keep))
    return seen


def stored(x: Array, kind: CacheKind) -> Array:
    """Return keys or values as a cache of this kind gives them back."""
    if not isinstance(kind.store, Quantized):
        return x
    spec: dict[str, Any] = {"group_size": kind.store.group_size, "bits": kind.store.bits}
    packed = mx.quantize(mx.array(x.astype(np.float32)), **spec)
    return np.array(mx.dequantize(*packed, **spec)).astype(np.float64)


def full_weights(engine: Engine) -> dict[str, Array]:
    """Return every weight in float64 by its path; quantized ones as what they stand for."""
    found = {}
    for path, module in engine.model.named_modules():
        for name, value in module.items():
            if not isinstance(value, mx.array) or name in ("scales", "biases"):
                continue
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                spec = {key: getattr(module, key) for key in ("group_size", "bits", "mode")}
                value = mx.dequantize(value, module.scales, module.get("biases"), **spec)
            weight = np.array(value.astype(mx.float32)).astype(np.float64)
            found[f"{path}.{name}" if path else name] = weight
    return found
