"""The device side of decoding: one compiled step for all rows.

Everything here has B rows, and a single sequence is one row. A step feeds the newest token of every
row, and the tokens drafted after it, and draws what follows each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from openelm_mlx.device import kind, mx
from openelm_mlx.engine import threads
from openelm_mlx.engine.sampling import Context, Controls, Filters, History, draw
from openelm_mlx.model.cache import step_caches
from openelm_mlx.model.cache_kinds import Arrays, CacheKind
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.model.draws import numbers

Progress = Callable[[int, int], None]


class State(NamedTuple):
    """The arrays that a step reads and writes. A trace serves all values in them."""

    token: mx.array  # [B] uint32, the newest token, not yet fed
    position: mx.array  # [B] int32, its position
    alive: mx.array  # [B] int32, 1 or 0: an unused row stays at position 0
    key: mx.array  # [B, 2] uint32, of the random numbers
    controls: Controls  # the values of the sampling options
    history: History | None
    buffers: list[Arrays]  # keys and values, one entry a layer

    def after(self, moved: Moved) -> State:
        """Return the state after a draw."""
        return self._replace(**moved._asdict())


class Moved(NamedTuple):
    """The parts of a state that change when a token is drawn."""

    token: mx.array
    position: mx.array
    history: History | None


class Drafted(NamedTuple):
    """The tokens drafted for each row, [B, k], and how many are not padding, [B]."""

    tokens: mx.array
    lengths: mx.array


class Logprobs(NamedTuple):
    """Natural-log probabilities under the model itself, before any sampling option."""

    chosen: mx.array  # [B]
    top_tokens: mx.array  # [B, n]
    top: mx.array  # [B, n]


class Drawn(NamedTuple):
    """The tokens that one pass drew. Without a draft `tokens` is [B] and `kept` None."""

    tokens: mx.array  # uint32, [B, k + 1]: one after each token that was fed
    kept: mx.array | None  # [B], how many drafted tokens agree; the one drawn after them is valid
    logprobs: Logprobs | None  # of all tokens, row by row


@dataclass(frozen=True)
class StepSpec:
    """The settings that a step is traced for; schedulers with equal ones share their steps."""

    filters: Filters
    vocab: int  # ids from here on have weights but no text, and are never sampled
    logprobs: int | None
    compiled: bool
    kind: CacheKind = CacheKind()


def forward(
    model: OpenELM, kind: CacheKind, state: State, drafted: mx.array | None
) -> tuple[mx.array, list[Arrays]]:
    """Feed each row its newest token and its draft; return logits and the changed buffers.

    The logits are [B, vocab], or [B, k + 1, vocab] with a draft [B, k].
    """
    caches = step_caches(state.buffers, state.position, kind)
    if drafted is None:
        hidden = model.hidden(state.token, caches, last=True)
    else:
        hidden = model.hidden(mx.concatenate([state.token[:, None], drafted], axis=1), caches)
    return model.logits(hidden), [cache.arrays for cache in caches]


def choose(
    spec: StepSpec,
    logits: mx.array,
    state: State,
    drafted: Drafted | None = None,
    mask: mx.array | None = None,
) -> tuple[Drawn, Moved]:
    """Draw from the logits of `forward`; return the tokens, and the parts of the state that change.

    `mask` [B * (k + 1), ceil(vocab / 32)] uint32 has a bit for each token that a grammar allows.
    """
    logits = logits[..., : spec.vocab]
    if spec.logprobs is not None:
        logits = logits.astype(mx.float32)
    if drafted is not None:
        return choose_drafted(spec, logits, state, drafted, mask)
    position = state.position + state.alive
    context = Context(state.controls, state.key, position, state.token, state.history, mask)
    token = draw(logits, spec.filters, context)
    history = None if state.history is None else state.history.plus(token)
    detail = None if spec.logprobs is None else logprobs(logits, token, spec.logprobs)
    return Drawn(token, None, detail), Moved(token, position, history)


def choose_drafted(
    spec: StepSpec, logits: mx.array, state: State, drafted: Drafted, mask: mx.array | None
) -> tuple[Drawn, Moved]:
    """Draw after each of the k + 1 tokens fed, each with its own noise and the history up to it.

    The tokens are those that k + 1 single steps would draw, whatever was drafted
    (arXiv:2408.07978); drafted tokens are kept while they agree.
    """
    rows, length, vocab = logits.shape
    logits = logits.reshape(-1, vocab)
    fed = mx.concatenate([state.token[:, None], drafted.tokens], axis=1)
    positions = (state.position + 1)[:, None] + numbers(length)
    history = None if state.history is None else along(state.history, drafted.tokens)
    context = Context(
        state.controls.repeated(length),
        mx.repeat(state.key, length, axis=0),
        positions.reshape(-1),
        fed.reshape(-1),
        None if history is None else each(lambda part: part.flatten(0, 1), history),
        mask,
    )
    tokens = draw(logits, spec.filters, context)
    detail = None if spec.logprobs is None else logprobs(logits, tokens, spec.logprobs)
    tokens = tokens.reshape(rows, length)
    count = agreeing(tokens, drafted)
    newest = mx.take_along_axis(tokens, count[:, None], axis=1)[:, 0]
    if history is not None:
        kept = numbers(rows) * length + count
        history = each(lambda part: mx.take(part.flatten(0, 1), kept, axis=0), history).plus(newest)
    position = state.position + state.alive * (count + 1)
    return Drawn(tokens, count, detail), Moved(newest, position, history)


def along(history: History, drafted: mx.array) -> History:
    """Return the history before and after each token of a draft [B, k]: arrays [B, k + 1, ...]."""
    steps = [history]
    for index in range(drafted.shape[1]):
        steps.append(steps[-1].plus(drafted[:, index]))
    return each(lambda *parts: mx.stack(list(parts), axis=1), *steps)


def each(change: Callable[..., mx.array], *histories: History) -> History:
    """Apply a function to the arrays of a history, or of several together; None stays None."""
    columns = zip(*histories, strict=True)
    return History(*(None if arrays[0] is None else change(*arrays) for arrays in columns))


def agreeing(tokens: mx.array, drafted: Drafted) -> mx.array:
    """Return how many drafted tokens of each row agree with those drawn [B, k + 1], [B].

    They are counted from the first on, up to the first that differs.
    """
    k = drafted.tokens.shape[1]
    agree = (tokens[:, :k] == drafted.tokens) & (numbers(k) < drafted.lengths[:, None])
    return mx.cumprod(agree.astype(mx.int32), axis=1).sum(axis=1)


def logprobs(logits: mx.array, tokens: mx.array, n: int) -> Logprobs:
    """Return the log probabilities of `tokens` [B] and of the n likeliest tokens.

    At least one likeliest token is taken, as MLX 0.32 divides by zero on arrays without elements.
    """
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    order = highest(logp, max(n, 1))
    chosen = mx.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, order, mx.take_along_axis(logp, order, axis=-1))


def highest(values: mx.array, n: int) -> mx.array:
    """Return the places of the n highest values of each row, [B, n], the highest first; among
    equal ones the first. `values` [B, vocab] are float32, at most 0 but for rounding.

    On a processor a partition finds them. On a GPU MLX sorts for a partition too, and would have
    to sort 64 bits instead of 32.
    """
    if kind() != "cpu":
        return mx.argsort(-values, axis=-1)[:, :n]
    bits = values.view(mx.uint32)
    falling = mx.where(bits >> 31 == 1, bits, bits ^ 0x7FFFFFFF).astype(mx.uint64)
    ranks = falling << 32 | numbers(values.shape[-1]).astype(mx.uint64)  # no two are equal
    first = mx.sort(mx.partition(ranks, min(n, ranks.shape[-1]) - 1, axis=-1)[:, :n], axis=-1)
    return (first & 0xFFFFFFFF).astype(mx.uint32)


def start(drawn: Drawn, moved: Moved) -> None:
    """Start computing all but the cache buffers: evaluating those by name would copy them where the
    twin of the kernel that stores runs.
    """
    parts = (drawn.tokens, drawn.kept, *(drawn.logprobs or ()), *moved[:2], *(moved.history or ()))
    mx.async_eval([part for part in parts if part is not None])


class Steps:
    """The compiled functions of one model, for the latest `LIMIT` specifications.

    Weights are constants of a compiled function, so each start of a generation calls `refresh`.
    """

    LIMIT = 48

    def __init__(self, model: OpenELM) -> None:
        self.model = model
        self._made: dict[Hashable, Any] = {}
        self._weights: list[mx.array] = []
        self._identity = object()

    def refresh(self) -> object:
        """Drop what was compiled for other weights: the model was trained, merged or reloaded.

        Return an object that identifies the current weights: a new one whenever they change.
        """
        weights, old = arrays_of(self.model), self._weights
        if len(weights) != len(old) or any(a is not b for a, b in zip(weights, old, strict=True)):
            self._made.clear()
            self._weights, self._identity = weights, object()
        return self._identity

    def step(self, spec: StepSpec) -> Callable[..., tuple[tuple[Drawn, Moved], list[Arrays]]]:
        """Return the function (state, drafted) -> ((drawn, moved), buffers) of one pass.

        If compiled, it is traced again only for other shapes: more rows or slots, longer drafts.
        """

        def step(state: State, drafted: Drafted | None = None) -> Any:
            tokens = None if drafted is None else drafted.tokens
            logits, buffers = forward(self.model, spec.kind, state, tokens)
            return choose(spec, logits, state, drafted), buffers

        return self.cached(spec, spec.compiled, lambda: step)

    def parts(self, spec: StepSpec) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return `forward` and `choose` apart: a mask is known only after the pass has begun."""
        ahead = self.cached(
            ("forward", spec.kind, spec.compiled),
            spec.compiled,
            lambda: partial(forward, self.model, spec.kind),
        )
        return ahead, self.cached(("choose", spec), spec.compiled, lambda: partial(choose, spec))

    def cached(self, key: Hashable, compiled: bool, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this key, compiled if asked for.

        Beyond the limit the least recently used function is dropped.
        """
        made = self._made.pop(key, None)
        if made is None:
            made = threads.compiled(make()) if compiled else make()
        self._made[key] = made  # newest last
        while len(self._made) > self.LIMIT:
            del self._made[next(iter(self._made))]
        return made


def arrays_of(tree: Any) -> list[mx.array]:
    """Return the parameters of a module in order, four times as fast as `tree_flatten`."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        parts = [part for name, part in tree.items() if not name.startswith("_")]
    else:
        parts = tree if isinstance(tree, list) else []
    return [array for part in parts for array in arrays_of(part)]
