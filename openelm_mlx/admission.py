"""Prompts on their way into rows: grouped, taken up from the prefix cache, prefilled in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.cache import KVCache
from openelm_mlx.decode import choose
from openelm_mlx.kv import CacheKind, Window
from openelm_mlx.prompt_cache import PromptCache, common_prefix
from openelm_mlx.request import Request, TokenLogprobs, mask_of, on_host, spec_for, state_of

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine

PASS_TOKENS = 4096  # prompt tokens of all rows in one pass, so that activations stay small
SHARED = 64  # tokens from which on a common beginning is worth waiting for


class Admission:
    """Prompts that are prefilled together: one that goes on from a cached prefix, or several of like length.

    Shorter ones are padded at the end: no token looks at what comes after it, and decoding
    overwrites it.
    """

    def __init__(
        self,
        engine: Engine,
        requests: list[Request],
        kind: CacheKind,
        chunk: int,
        store: PromptCache | None,
    ) -> None:
        self.engine, self.requests, self.chunk = engine, requests, chunk
        self.weights = engine.steps.refresh()
        self.cache, reused = KVCache(engine.config, kind), 0
        first = requests[0]
        if store is not None and len(requests) == 1:
            taken = store.take(self.weights, kind, first.prompt, first.owner)
            self.cache, reused = taken or (self.cache, 0)
        first.reused = reused
        self.longest = max(len(one.prompt) for one in requests)
        self._padded = mx.array(
            [one.prompt + [0] * (self.longest - len(one.prompt)) for one in requests]
        )
        self._last: dict[int, mx.array] = {}  # the hidden state of each prompt's last token
        for one in requests:
            one.clock.start()

    @property
    def complete(self) -> bool:
        return self.cache.offset >= self.longest

    def run(self, budget: float) -> int:
        """Prefill the next chunk, of about `budget` tokens; return how many there were."""
        if not self.cache.can_trim(0):  # a pass was interrupted, and the window lost what it needs
            self.cache.clear()
            self.requests[0].reused = 0
        count, start = len(self.requests), self.cache.offset
        columns = int(max(1, min(self.chunk, PASS_TOKENS // count, budget // count)))
        end = min(start + columns, self.longest)
        tokens, model = self._padded[:, start:end], self.engine.model
        if count == 1:  # of one prompt only the last position goes through the last layer's FFN
            hidden = model.hidden(tokens, self.cache, last=True)
            if end == self.longest:
                self._last[0] = hidden[0]
        else:
            hidden = model.hidden(tokens, self.cache)
            for row, one in enumerate(self.requests):
                if start < len(one.prompt) <= end:
                    self._last[row] = hidden[row, len(one.prompt) - 1 - start]
        mx.eval(
            list(self._last.values()), self.cache.arrays
        )  # of other chunks only keys and values
        for one in self.requests:
            if one.progress is not None:
                one.progress(end - one.reused, self.longest - one.reused)
        return count * (end - start)

    def first_tokens(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Draw the first token of each request from the logits of its prompt, and wait for it.

        The filters are those of these requests alone, and nothing is compiled for it.
        """
        requests = self.requests
        spec = spec_for(requests, self.engine.vocab, self.cache.kind, compiled=False)
        hidden = mx.stack([self._last[row] for row in range(len(requests))])
        logits = self.engine.model.logits(hidden)
        state = state_of(requests, spec)
        drawn, _ = choose(spec, logits, state, None, mask_of(requests, spec))
        tokens: Any = drawn.tokens.tolist()
        return list(zip(tokens, on_host(drawn.logprobs, len(tokens)), strict=True))

    def caches(self) -> list[KVCache]:
        """What was prefilled, one cache for each request."""
        if len(self.requests) == 1:
            return [self.cache]
        return [self.cache.row(row, len(one.prompt)) for row, one in enumerate(self.requests)]


def next_group(
    waiting: Sequence[Request], budget: float, kind: CacheKind, store: PromptCache | None
) -> list[Request]:
    """Choose which of the waiting requests are prefilled next: the first, and others like it.

    Padding wastes at most a quarter. A prompt that shares its beginning with one of the group waits
    for the next turn, when the prefix cache holds that beginning.
    """
    first, *others = waiting
    group, room = [first], budget - len(first.prompt)
    for one in others:
        shorter, longer = sorted((len(one.prompt), len(first.prompt)))
        alike = longer <= (shorter if isinstance(kind.layout, Window) else 1.25 * shorter + 4)
        if alike and len(one.prompt) <= room and not (store is not None and shares(one, group)):
            group.append(one)
            room -= len(one.prompt)
    return group


def shares(one: Request, others: Sequence[Request]) -> bool:
    """Tell whether most of a prompt is the beginning of another one, for the same owner."""
    least = max(SHARED, len(one.prompt) // 2)
    return any(
        one.owner == other.owner and common_prefix(one.prompt, other.prompt) >= least
        for other in others
    )
