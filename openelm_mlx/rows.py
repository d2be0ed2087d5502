"""The device side of a batch: sequences are rows of one state, stepped together, placed and dropped while others run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from openelm_mlx.cache import KVCache, make_caches, step_caches
from openelm_mlx.decode import flat
from openelm_mlx.kv import Arrays, CacheKind, by_count, by_row
from openelm_mlx.model import OpenELM
from openelm_mlx.options import SamplingOptions
from openelm_mlx.sampling import History, Logprobs, draw, logprobs

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine

PASS_TOKENS = 4096  # prompt tokens of all rows in one pass, so that activations stay small
BLOCK = 64  # tokens by which rows grow: every row attends to all slots, so unused ones cost more than in one sequence


@dataclass(frozen=True)
class RowsSpec:
    """What a batched step is traced for. Rows name their options by index, so rows come and go without a new trace."""

    samplings: tuple[SamplingOptions, ...]  # the distinct ones, without seeds
    vocab: int
    logprobs: int | None
    compiled: bool
    kind: CacheKind

    @property
    def penalised(self) -> bool:
        return any(sampling.penalised for sampling in self.samplings)


class RowState(NamedTuple):
    """One entry a row, [B] unless said otherwise."""

    token: mx.array  # the newest token, not yet fed
    position: mx.array  # its position
    key: mx.array  # [B, 2]
    which: mx.array  # index into the spec's samplings
    alive: mx.array  # int32, 1 or 0: the position of a row nobody uses stands still
    history: History | None  # [B, vocab] each

    @classmethod
    def of(cls, parts: list[mx.array]) -> RowState:
        """From the five arrays, followed by the history's two where there is one."""
        token, position, key, which, alive, *history = parts
        return cls(token, position, key, which, alive, History(*history) if history else None)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.token, self.position, self.key, self.which, self.alive, *flat(self.history)]


def choose_rows(spec: RowsSpec, logits: mx.array, state: RowState) -> tuple[RowState, Logprobs | None]:
    """Draw the next token of every row from logits [B, vocab or more], under the row's options.

    Return the state after that.
    """
    logits = logits[:, : spec.vocab].astype(mx.float32)
    position = state.position + state.alive
    token = state.token
    for index, sampling in enumerate(spec.samplings):
        history = state.history if sampling.penalised else None
        drawn = draw(logits, sampling, state.key, position, history).astype(mx.uint32)
        token = drawn if len(spec.samplings) == 1 else mx.where(state.which == index, drawn, token)
    history = None if state.history is None else state.history.plus(token)
    detail = None if spec.logprobs is None else logprobs(logits, token, spec.logprobs)
    return state._replace(token=token, position=position, history=history), detail


def make_rows_step(model: OpenELM, spec: RowsSpec) -> Callable[[list[Any]], Any]:
    def step(arrays: list[Any]) -> list[Any]:
        token, position, key, which, alive, history, buffers = arrays
        caches = step_caches(buffers, position, spec.kind)
        logits = model.logits(model.hidden(token, caches, last=True))
        state = RowState(token, position, key, which, alive, History(*history) if history else None)
        after, detail = choose_rows(spec, logits, state)
        return [after.token, after.position, flat(after.history), flat(detail), [c.arrays for c in caches]]

    return mx.compile(step) if spec.compiled else step


class Rows:
    """The rows of a batch and their caches. Row numbers are stable; `resize` renumbers and says how."""

    def __init__(self, engine: Engine, spec: RowsSpec) -> None:
        self.engine, self.spec = engine, spec
        self.state: RowState | None = None
        self.buffers: list[Arrays] = []
        self.detail: Logprobs | None = None

    @property
    def count(self) -> int:
        return 0 if self.state is None else self.state.token.size

    @property
    def capacity(self) -> int:
        return self.buffers[0][0].shape[-2] if self.buffers else 0

    def advance(self) -> None:
        """Feed the newest tokens and start drawing the next."""
        if self.state is None:
            return
        run = self.engine.steps.cached(("rows", self.spec), lambda: make_rows_step(self.engine.model, self.spec))
        state, buffers = self.state, self.buffers
        self.buffers = []
        token, position, history, detail, self.buffers = run([*state[:5], flat(state.history), buffers])
        del buffers
        self.detail = Logprobs(*detail) if detail else None
        self.state = state._replace(token=token, position=position, history=History(*history) if history else None)
        mx.async_eval(token, *flat(self.detail))

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` in every row, in whole blocks."""
        extra = -(-tokens // BLOCK) * BLOCK - self.capacity
        if self.buffers and extra > 0:
            self.buffers = [[pad(a, a.ndim - 2, extra) for a in arrays] for arrays in self.buffers]

    def resize(self, rows: list[int], count: int) -> None:
        """Keep `rows` in this order as 0, 1, ..., and add unused ones up to `count`."""
        if self.state is None:
            return
        index = mx.array(rows, dtype=mx.int32)

        def chosen(array: mx.array, axis: int) -> mx.array:
            return pad(mx.take(array, index, axis=axis), axis, count - len(rows))

        self.state = RowState.of([chosen(part, 0) for part in self.state.arrays])
        self.detail = None if self.detail is None else Logprobs(*(chosen(part, 0) for part in self.detail))
        self.buffers = [[by_count(chosen(by_row(a), 1)) for a in arrays] for arrays in self.buffers]

    def place(
        self, rows: list[int], state: RowState, detail: Logprobs | None, caches: list[KVCache], count: int, lengths: list[int]
    ) -> None:
        """Put prefilled sequences into `rows`; at first, `count` rows are made."""
        tokens = max(lengths) + 1
        if self.state is None:
            self.state = RowState.of([mx.zeros((count, *part.shape[1:]), part.dtype) for part in state.arrays])
            room = -(-tokens // BLOCK) * BLOCK
            self.buffers = [[blank_rows(by_row(a), count, room) for a in cache.arrays] for cache in caches]
        self.reserve(tokens)
        index = mx.array(rows, dtype=mx.int32)
        mine = self.state.arrays
        for number, new in enumerate(state.arrays):
            mine[number][index] = new
        self.state = RowState.of(mine)
        for arrays, cache in zip(self.buffers, caches, strict=True):
            for part, (own, new) in enumerate(zip(map(by_row, arrays), map(by_row, cache.arrays), strict=True)):
                used = min(new.shape[3], own.shape[3])
                for number, row in enumerate(rows):
                    own[:, row, :, :used] = new[:, number, :, :used]
                arrays[part] = by_count(own)
        if detail is not None:
            self.detail = merged(self.detail, detail, index, self.count)

    def bury(self, row: int) -> None:
        """Nobody uses this row any more."""
        if self.state is not None:
            alive = self.state.alive
            alive[mx.array([row])] = 0
            self.state = self.state._replace(alive=alive)


def blank_rows(like: mx.array, count: int, room: int) -> mx.array:
    """Empty slots for `count` sequences, of the heads and the type of `like` [2, batch, kv_heads, slots, width]."""
    return by_count(mx.zeros((2, count, like.shape[2], room, like.shape[4]), like.dtype))


def merged(held: Logprobs | None, new: Logprobs, rows: mx.array, count: int) -> Logprobs:
    """The log probabilities of the placed rows beside those that were there, which may list fewer or more."""
    parts = [mx.zeros((count, *part.shape[1:]), part.dtype) for part in new]
    for own, old in zip(parts, held or (), strict=held is not None):
        there = tuple(slice(min(sizes)) for sizes in zip(old.shape, own.shape, strict=True))
        own[there] = old[there]
    for own, part in zip(parts, new, strict=True):
        own[rows] = part
    return Logprobs(*parts)


def pad(array: mx.array, axis: int, extra: int) -> mx.array:
    if extra <= 0:
        return array
    shape = list(array.shape)
    shape[axis] = extra
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=axis)


def prefill_rows(
    engine: Engine, prompts: list[list[int]], kind: CacheKind, chunk: int
) -> tuple[mx.array, list[KVCache]]:
    """Run prompts of like length together: logits [rows, vocab] after the last token of each, and their caches.

    Shorter ones are padded at the end: no token looks at what comes after it, and decoding overwrites it.
    """
    longest = max(map(len, prompts))
    padded = mx.array([tokens + [0] * (longest - len(tokens)) for tokens in prompts])
    caches = make_caches(engine.config, kind)
    last: dict[int, mx.array] = {}
    chunk = max(1, min(chunk, PASS_TOKENS // len(prompts)))
    for start in range(0, longest, chunk):
        hidden = engine.model.hidden(padded[:, start : start + chunk], caches)
        for row, tokens in enumerate(prompts):
            if start < len(tokens) <= start + chunk:
                last[row] = hidden[row, len(tokens) - 1 - start]
        mx.eval(list(last.values()), [cache.arrays for cache in caches])
    return engine.model.logits(mx.stack([last[row] for row in range(len(prompts))])), caches
