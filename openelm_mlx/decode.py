"""The device side of generation: the prompt in chunks, then one compiled step a token, pipelined.

`make_step` is the seam: ids in, id out, everything else state. Its eager twin runs the same function uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from openelm_mlx.cache import KVCache, level, step_caches
from openelm_mlx.kv import Arrays, CacheKind
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
    buffers: list[Arrays]  # keys and values, one entry a layer


class Drawn(NamedTuple):
    """A token as the host sees it, with its log probability and the likeliest alternatives where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepSpec:
    """What a step is traced for; steps of equal specification are shared by all generations of an engine."""

    sampling: SamplingOptions
    vocab: int  # ids from here on exist in the weights only, and are never sampled
    logprobs: int | None
    compiled: bool
    kind: CacheKind = CacheKind()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampling", replace(self.sampling, seed=None, stream=0))  # state, not code


def choose(spec: StepSpec, logits: mx.array, state: State) -> State:
    """The state after drawing the token that follows, from the logits [B, vocab or more] at the last position."""
    logits = logits[:, : spec.vocab]
    if not spec.sampling.greedy or state.history is not None or spec.logprobs is not None:
        logits = logits.astype(mx.float32)  # which is the largest does not change by it
    position = state.position + 1
    token = draw(logits, spec.sampling, state.key, position, state.history).astype(mx.uint32)
    history = None if state.history is None else state.history.plus(token)
    detail = None if spec.logprobs is None else logprobs(logits, token, spec.logprobs)
    return State(token, position, state.key, history, detail, state.buffers)


def make_step(model: OpenELM, spec: StepSpec) -> Callable[[State], State]:
    """State -> State, one token further. Compiled, it retraces only when a cache buffer has grown a block."""

    def step(arrays: list[Any]) -> list[Any]:
        token, position, key, history, buffers = arrays
        caches = step_caches(buffers, position, spec.kind)
        hidden = model.hidden(token, caches, last=True)
        state = State(token, position, key, History(*history) if history else None, None, [])
        after = choose(spec, model.logits(hidden), state)
        return [after.token, after.position, flat(after.history), flat(after.logprobs), [c.arrays for c in caches]]

    run = mx.compile(step) if spec.compiled else step

    def advance(state: State) -> State:
        token, position, history, detail, buffers = run(
            [state.token, state.position, state.key, flat(state.history), state.buffers]
        )
        return State(
            token, position, state.key, History(*history) if history else None, Logprobs(*detail) if detail else None, buffers
        )

    return advance


def flat(group: tuple[mx.array, ...] | None) -> list[mx.array]:
    """mx.compile flattens lists, not named tuples; an absent group is an empty list."""
    return [] if group is None else list(group)


class Steps:
    """The compiled functions of one model, the latest few specifications kept.

    Weights are constants of a compiled function, so whatever starts a generation calls `refresh` or `get` first.
    """

    LIMIT = 48

    def __init__(self, model: OpenELM) -> None:
        self.model = model
        self._made: dict[Hashable, Any] = {}
        self._weights: list[mx.array] = []

    def refresh(self) -> None:
        """Forget what was compiled, where the model has got other weights since: it was trained, merged or loaded anew."""
        weights = arrays_of(self.model)
        if len(weights) != len(self._weights) or any(a is not b for a, b in zip(weights, self._weights, strict=True)):
            self._made.clear()
            self._weights = weights

    def get(self, spec: StepSpec) -> Callable[[State], State]:
        """The step of this specification, for the weights that the model has now."""
        self.refresh()
        return self.cached(spec, lambda: make_step(self.model, spec))

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` made for this key, now or earlier.

        The least recently used beyond the limit is dropped.
        """
        made = self._made.pop(key) if key in self._made else make()
        self._made[key] = made  # newest last
        while len(self._made) > self.LIMIT:
            del self._made[next(iter(self._made))]
        return made


def arrays_of(tree: Any) -> list[mx.array]:
    """The parameters of a module in order, without their names: four times as fast as `tree_flatten`."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        parts = [part for name, part in tree.items() if not name.startswith("_")]
    else:
        parts = tree if isinstance(tree, list) else []
    return [array for part in parts for array in arrays_of(part)]


def prefill(
    model: OpenELM, tokens: list[int], caches: list[KVCache], chunk: int, progress: Progress | None = None
) -> mx.array:
    """Run the prompt through the model in chunks; logits [1, vocab] after its last token.

    Only the last position goes through the last layer's FFN and the head, and the last chunk gives the first token:
    no extra pass.
    """
    for start in range(0, len(tokens), chunk):
        hidden = model.hidden(mx.array([tokens[start : start + chunk]]), caches, last=True)
        final = start + chunk >= len(tokens)
        mx.eval([hidden] if final else [], [cache.arrays for cache in caches])  # of other chunks only keys and values
        if progress is not None:
            progress(min(start + chunk, len(tokens)), len(tokens))
    return model.logits(hidden)


def decode(step: Callable[[State], State], state: State, caches: list[KVCache], max_tokens: int) -> Generator[Drawn, None, None]:
    """Yield each token from the first on, the device always one token ahead.

    On every way out (end, break, exception, close) the caches hold exactly the tokens fed and no work is in flight.
    """
    flight = Flight(step, state, caches)
    try:
        submit(state)
        for count in range(max_tokens):
            current = flight.state._replace(buffers=[])  # a held buffer could not be updated in place
            if count + 1 < max_tokens:
                flight.advance()
            yield read(current)  # the one synchronisation a token; the next step is already running
    finally:
        flight.land()


class Flight:
    """The state of a decode in progress. While it lasts the state owns the buffers, and the caches are empty."""

    def __init__(self, step: Callable[[State], State], state: State, caches: list[KVCache]) -> None:
        level(caches)
        self.step, self.caches = step, caches
        self.state = state._replace(buffers=[cache.arrays for cache in caches])
        self.fed = caches[0].offset
        for cache in caches:
            cache.arrays = []  # a second reference would forbid updating in place

    def advance(self) -> None:
        """Feed the newest token and start drawing the next."""
        self.reserve(1)
        self.state = self.step(self.state)
        self.fed += 1
        submit(self.state)

    def reserve(self, tokens: int) -> None:
        """Grow the buffers where their blocks do not hold `tokens` more."""
        if self.fed + tokens <= self.state.buffers[0][0].shape[-2]:
            return
        grown = []
        for cache, arrays in zip(self.caches, self.state.buffers, strict=True):
            cache.arrays = arrays
            cache.reserve(self.fed + tokens)
            grown.append(cache.arrays)
            cache.arrays = []
        self.state = self.state._replace(buffers=grown)

    def land(self, written: int = 0) -> None:
        """Wait for what is under way and give the buffers back."""
        mx.synchronize()
        for cache, arrays in zip(self.caches, self.state.buffers, strict=True):
            cache.arrays = arrays
            cache.settle(self.fed, written)
        mx.eval([cache.arrays for cache in self.caches])


def submit(state: State) -> None:
    """Start computing a token. Never names the cache buffers here: that would copy them at every step."""
    mx.async_eval(state.token, *flat(state.logprobs))


def read(state: State) -> Drawn:
    """Wait for the token of a batch of one."""
    values: Any = state.token.tolist()
    return Drawn(int(values[0]), *logprob_fields(state.logprobs, 0))


def logprob_fields(detail: Logprobs | None, row: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if detail is None:
        return None, ()
    chosen: Any = detail.chosen[row].item()
    ids: Any = detail.top_tokens[row].tolist()
    values: Any = detail.top[row].tolist()
    return chosen, tuple(zip(ids, values, strict=True))
