"""Prompts on their way into rows: grouped, taken up from the prefix cache, prefilled in chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import choose
from openelm_mlx.engine.prompt_cache import PromptCache, common_prefix
from openelm_mlx.engine.request import Request, TokenLogprobs, mask_of, on_host, spec_for, state_of
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind, Window

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

PASS_TOKENS = 4096  # prompt tokens of all rows in one pass, so that activations stay small
SHARED = 64  # tokens from which on a common beginning is worth waiting for


class Pace:
    """How many prompt tokens a step may prefill beside running rows: as many as take thrice its
    time.

    How much a prompt token costs beside a step depends on device, weights and rows. So the number
    follows the time that steps take with and without prompt tokens, which changes no token.
    """

    LEAST, FIRST = 4, 32
    SLOW, FAST = 4.4, 3.4  # times the median step; between them the number stays

    def __init__(self) -> None:
        self.tokens = self.FIRST
        self._plain: deque[float] = deque(maxlen=9)  # seconds of the latest steps without prompts

    def learn(self, seconds: float, prefilled: int) -> None:
        """Learn how long a step took that prefilled so many tokens."""
        if not prefilled:
            self._plain.append(seconds)
        elif self._plain:
            ratio = seconds / median(self._plain)
            if ratio > self.SLOW:
                self.tokens = max(self.LEAST, self.tokens * 3 // 4)
            elif ratio < self.FAST and prefilled >= self.tokens:
                self.tokens += 1 + self.tokens // 4


class Admission:
    """Prompts that are prefilled together: one that goes on from a cached prefix, or several alike.

    Shorter ones are padded at the end: no token looks at what comes after it, and decoding
    overwrites it. Requests with the same prompt share its prefill.
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
        weights = engine.steps.refresh()
        self.cache, self._reused = KVCache(engine.config, kind), 0
        first = requests[0]
        places: dict[tuple[str, tuple[int, ...]], int] = {}  # nothing passes from owner to owner
        self._places = [
            places.setdefault((one.owner, tuple(one.known)), len(places)) for one in requests
        ]
        self._prompts = [list(prompt) for _, prompt in places]
        if store is not None and self.cache_is_one:
            taken = store.take(weights, kind, first.known, first.owner)
            self.cache, self._reused = taken or (self.cache, 0)
        self._done, self.longest = self._reused, max(map(len, self._prompts))
        self._padded = mx.array(
            [prompt + [0] * (self.longest - len(prompt)) for prompt in self._prompts]
        )
        self._last: dict[int, mx.array] = {}  # the hidden state of each prompt's last token
        for row, one in enumerate(requests):
            again = self._places[row] in self._places[:row]
            one.reused = min(self.longest if again else self._reused, len(one.prompt))
            one.weights = weights
            one.clock.start()

    @property
    def cache_is_one(self) -> bool:
        """Whether the cache holds one sequence."""
        return len(self._prompts) == 1

    @property
    def complete(self) -> bool:
        return len(self._last) == len(self._prompts)

    def drop(self, request: Request) -> None:
        """Leave a request out, though not its prompt, which may be one of several in a pass."""
        place = self.requests.index(request)
        del self.requests[place], self._places[place]

    def run(self, budget: float) -> int:
        """Prefill the next chunk, of about `budget` tokens; return how many there were."""
        self.cache.offset = self._done  # not what a pass held that was interrupted
        if not self.cache.can_trim(0):  # of which a window lost what it needs
            self.cache.clear()
            self.requests[0].reused = self._reused = self._done = 0
        count, start = len(self._prompts), self._done
        columns = int(max(1, min(self.chunk, PASS_TOKENS // count, budget // count)))
        end = min(start + columns, self.longest)
        tokens, model = self._padded[:, start:end], self.engine.model
        if count == 1:  # of one prompt only the last position goes through the last layer's FFN
            hidden = model.hidden(tokens, self.cache, last=True)
            if end == self.longest:
                self._last[0] = hidden[0]
        else:
            hidden = model.hidden(tokens, self.cache)
            for row, prompt in enumerate(self._prompts):
                if start < len(prompt) <= end:
                    self._last[row] = hidden[row, len(prompt) - 1 - start]
        self._done = end
        mx.eval(list(self._last.values()), self.cache.arrays)  # hidden states of the ends alone
        for one in self.requests:
            if one.progress is not None:
                one.progress(end - self._reused, self.longest - self._reused)
        return count * (end - start)

    def first_tokens(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Draw the first token of each request from the logits of its prompt, and wait for it.

        The filters are those of these requests alone, and nothing is compiled for it.
        """
        requests = self.requests
        spec = spec_for(requests, self.engine.vocab, self.cache.kind, False, Filters())
        hidden = mx.stack([self._last[place] for place in self._places])
        logits = self.engine.model.logits(hidden)
        state = state_of(requests, spec)
        drawn, _ = choose(spec, logits, state, None, mask_of(requests, spec))
        tokens: Any = drawn.tokens.tolist()
        return list(zip(tokens, on_host(drawn.logprobs, len(tokens)), strict=True))

    def caches(self) -> list[KVCache]:
        """What was prefilled, one cache for each request."""
        if len(self.requests) == 1 and self.cache_is_one:
            return [self.cache]
        pairs = zip(self._places, self.requests, strict=True)
        return [self.cache.row(place, len(one.known)) for place, one in pairs]


def next_group(
    waiting: Sequence[Request], budget: float, kind: CacheKind, store: PromptCache | None
) -> list[Request]:
    """Choose which of the waiting requests are prefilled next: the first, and others like it.

    Padding wastes at most a quarter. A prompt that shares its beginning with one of the group waits
    for the next turn, when the prefix cache holds that beginning.
    """
    first, *others = waiting
    group, room = [first], budget - len(first.known)
    for one in others:
        if one.known == first.known and one.owner == first.owner:
            group.append(one)
            continue
        shorter, longer = sorted((len(one.known), len(first.known)))
        alike = longer <= (shorter if isinstance(kind.layout, Window) else 1.25 * shorter + 4)
        if alike and len(one.known) <= room and not (store is not None and shares(one, group)):
            group.append(one)
            room -= len(one.known)
    return group


def shares(one: Request, others: Sequence[Request]) -> bool:
    """Tell whether most of a prompt is the beginning of another one, for the same owner."""
    least = max(SHARED, len(one.known) // 2)
    return any(
        one.owner == other.owner and common_prefix(one.known, other.known) >= least
        for other in others
    )
