"""The device side of generation: the prompt in chunks, then one compiled step a token, pipelined.

`Step` is the seam: ids in, id out, everything else state. Its eager twin runs the same function uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from openelm_mlx.cache import KVCache, StepCache
from openelm_mlx.model import OpenELM
from openelm_mlx.options import SamplingOptions
from openelm_mlx.sampling import History, Logprobs, draw, logprobs

Progress = Callable[[int, int], None]


class State(NamedTuple):
    """All that a step reads and writes, as arrays: nothing here makes the compiler trace again."""

    token: mx.array  # [B] the newest token, not yet fed
    position: mx.array  # [B] its position
    key: mx.array  # [B, 2] of the random numbers
    history: History | None
    logprobs: Logprobs | None
    buffers: list[mx.array]  # keys and values, one a layer


@dataclass(frozen=True)
class StepSpec:
    """What a step is traced for; steps of equal specification are shared by all generations of an engine."""

    sampling: SamplingOptions
    vocab: int  # ids from here on exist in the weights only, and are never sampled
    logprobs: int | None
    compiled: bool


def choose(spec: StepSpec, logits: mx.array, state: State) -> State:
    """The state after drawing the token that follows, from the logits [B, vocab or more] at the last position."""
    logits = logits[:, : spec.vocab].astype(mx.float32)
    position = state.position + 1
    token = draw(logits, spec.sampling, state.key, position, state.history).astype(mx.uint32)
    history = None if state.history is None else state.history.plus(token)
    detail = None if spec.logprobs is None else logprobs(logits, token, spec.logprobs)
    return State(token, position, state.key, history, detail, state.buffers)


def make_step(model: OpenELM, spec: StepSpec) -> Callable[[State], State]:
    """State -> State, one token further. Compiled, it retraces only when a cache buffer has grown a block."""

    def step(arrays: list[Any]) -> list[Any]:
        token, position, key, history, buffers = arrays
        caches = [StepCache(buffer, position) for buffer in buffers]
        hidden = model.hidden(token[:, None], caches)
        state = State(token, position, key, History(*history) if history else None, None, [])
        after = choose(spec, model.logits(hidden)[:, -1], state)
        return [after.token, after.position, _flat(after.history), _flat(after.logprobs), [c.buffer for c in caches]]

    run = mx.compile(step) if spec.compiled else step

    def advance(state: State) -> State:
        token, position, history, detail, buffers = run(
            [state.token, state.position, state.key, _flat(state.history), state.buffers]
        )
        return State(
            token, position, state.key, History(*history) if history else None, Logprobs(*detail) if detail else None, buffers
        )

    return advance


def _flat(group: tuple[mx.array, ...] | None) -> list[mx.array]:
    """mx.compile flattens lists, not named tuples; an absent group is an empty list."""
    return [] if group is None else list(group)


class Steps:
    """The compiled steps of one model, the latest few specifications kept."""

    LIMIT = 8

    def __init__(self, model: OpenELM) -> None:
        self.model = model
        self._steps: dict[StepSpec, Callable[[State], State]] = {}

    def get(self, spec: StepSpec) -> Callable[[State], State]:
        spec = replace(spec, sampling=replace(spec.sampling, seed=None))  # the seed is state, not code
        step = self._steps.pop(spec, None) or make_step(self.model, spec)
        self._steps[spec] = step  # newest last
        while len(self._steps) > self.LIMIT:
            del self._steps[next(iter(self._steps))]
        return step


def prefill(
    model: OpenELM, tokens: list[int], caches: list[KVCache], chunk: int, progress: Progress | None = None
) -> mx.array:
    """Run the prompt through the model in chunks; logits [1, vocab] after its last token.

    Only the last position goes through the head, and the last chunk gives the first token: no extra pass.
    """
    for start in range(0, len(tokens), chunk):
        hidden = model.hidden(mx.array([tokens[start : start + chunk]]), caches)
        last = hidden[:, -1]
        mx.eval(last, [cache.buffer for cache in caches])
        if progress is not None:
            progress(min(start + chunk, len(tokens)), len(tokens))
    return model.logits(last)


def decode(step: Callable[[State], State], state: State, caches: list[KVCache], max_tokens: int) -> Generator[State, None, None]:
    """Yield the state of each token from the first on, the device always one token ahead.

    On every way out (end, break, exception, close) the caches hold exactly the tokens fed and no work is in flight.
    """
    fed = caches[0].offset
    try:
        submit(state)
        for count in range(max_tokens):
            current = state._replace(buffers=[])  # a held buffer could not be updated in place
            if count + 1 < max_tokens:
                state = advance_one(step, state, caches, fed)
                fed += 1
                submit(state)
            mx.eval(current.token)  # the one synchronisation a token; the next step is already running
            yield current
    finally:
        mx.synchronize()
        for cache, buffer in zip(caches, state.buffers, strict=False):
            cache.buffer, cache.offset = buffer, fed
        mx.eval(*[cache.buffer for cache in caches])


def submit(state: State) -> None:
    """Start computing a token. Never names the cache buffers here: that would copy them at every step."""
    mx.async_eval(state.token, *_flat(state.logprobs))


def advance_one(step: Callable[[State], State], state: State, caches: list[KVCache], fed: int) -> State:
    """One step, after growing the buffers where the block is full."""
    if fed + 1 > state.buffers[0].shape[3]:
        for cache, buffer in zip(caches, state.buffers, strict=True):
            cache.buffer = buffer
            cache.reserve(fed + 1)
        state = state._replace(buffers=[cache.buffer for cache in caches if cache.buffer is not None])
    for cache in caches:
        cache.buffer = None  # the state owns the buffers while decoding: a second reference forbids updating in place
    return step(state)
