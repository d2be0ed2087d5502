"""From a request to a row: requests wait, are grouped, prefilled in chunks, and join the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import choose
from openelm_mlx.engine.prompt_cache import PromptCache, common_prefix
from openelm_mlx.engine.prompts import Prompt, prompt_tokens
from openelm_mlx.engine.request import (
    Event,
    Request,
    TokenLogprobs,
    mask_of,
    on_host,
    spec_for,
    state_of,
)
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.errors import BusyError
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind, Window

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import GenerationOptions, SamplingOptions

PASS_TOKENS = 4096  # of all rows in one pass, or 8 chunks if less, so that activations stay small
SHARED = 64  # tokens from which on a common beginning is worth waiting for
BETWEEN = 8  # steps at least from one that prefills a whole chunk beside running rows to the next


class Pace:
    """How many prompt tokens a step may prefill beside running rows.

    They may take about three times as long as a step without any. How many that is depends on
    device, weights and rows, so the number follows the times of steps. It changes no token.
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
        elif self._plain and prefilled < 2 * self.tokens:  # not a whole chunk
            ratio = seconds / median(self._plain)
            if ratio > self.SLOW:
                self.tokens = max(self.LEAST, self.tokens * 3 // 4)
            elif ratio < self.FAST and prefilled >= self.tokens:
                self.tokens += 1 + self.tokens // 4


class Admission:
    """Prompts that are prefilled together: one that goes on from a cached prefix, or several alike.

    Shorter ones are padded at the end: no token attends to later ones, and decoding overwrites
    them. Requests with the same prompt share its prefill.
    """

    def __init__(
        self, requests: list[Request], kind: CacheKind, chunk: int, store: PromptCache | None
    ) -> None:
        first = requests[0]
        self.engine, self.requests, self.chunk = first.engine, requests, chunk
        weights = first.engine.steps.refresh()
        self.cache, self._reused = KVCache(first.engine.config, kind), 0
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
        """True if the cache stores one sequence."""
        return len(self._prompts) == 1

    @property
    def complete(self) -> bool:
        """True if every prompt is prefilled to its end."""
        return len(self._last) == len(self._prompts)

    def drop(self, request: Request) -> None:
        """Leave a request out, though not its prompt, which may be one of several in a pass."""
        place = self.requests.index(request)
        del self.requests[place], self._places[place]

    def run(self, budget: int) -> int:
        """Prefill the next chunk, of about `budget` tokens; return how many there were."""
        self.cache.offset = self._done  # without what an interrupted pass has stored
        if not self.cache.can_trim(0):  # which has overwritten what a window needs
            self.cache.clear()
            self.requests[0].reused = self._reused = self._done = 0
        count, start = len(self._prompts), self._done
        columns = max(1, min(self.chunk, min(8 * self.chunk, PASS_TOKENS, budget) // count))
        end = min(start + columns, self.longest)
        tokens, model = self._padded[:, start:end], self.engine.model
        # of each prompt only the last position goes through the last layer's FFN
        ends = [len(prompt) - 1 - start for prompt in self._prompts]
        last = True if count == 1 else mx.array([min(max(0, at), end - start - 1) for at in ends])
        hidden = model.hidden(tokens, self.cache, last)
        for row, at in enumerate(ends):
            if 0 <= at < end - start:
                self._last[row] = hidden[row]
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
        """Return what was prefilled, one cache for each request."""
        if len(self.requests) == 1 and self.cache_is_one:
            return [self.cache]
        pairs = zip(self._places, self.requests, strict=True)
        return [self.cache.row(place, len(one.known)) for place, one in pairs]


class Queue:
    """The requests of a scheduler without a row: they wait, are prefilled, or can join the rows.

    `limit` is the number of prompt tokens that a step prefills beside running rows, by default the
    one that `Pace` learns; `chunk` is the most of one pass, and `max_waiting` the most requests
    that wait.
    """

    def __init__(
        self,
        kind: CacheKind,
        store: PromptCache | None,
        chunk: int,
        limit: int | None,
        max_waiting: int,
    ) -> None:
        self.kind, self.store = kind, store
        self.chunk, self.limit, self.max_waiting = chunk, limit, max_waiting
        self.pace, self._numbers, self._paced = Pace(), 0, BETWEEN
        self.waiting: deque[Request] = deque()
        self.joining: list[tuple[Request, KVCache]] = []  # prefilled, with the first token drawn
        self._admission: Admission | None = None

    @property
    def busy(self) -> bool:
        """True if any request is here."""
        return bool(self.waiting or self._admission or self.joining)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that were prefilled and have no row yet."""
        begun = self._admission.cache.nbytes if self._admission else 0
        return begun + sum(cache.nbytes for _, cache in self.joining)

    def add(
        self,
        engine: Engine,
        prompt: Prompt,
        sampling: SamplingOptions,
        options: GenerationOptions,
        continued: bool,
        **about: Any,
    ) -> int:
        """Let a prompt wait, and return the number of its request; `about` are fields of that.

        Errors and `continued` are those of `BatchEngine.submit`.
        """
        if len(self.waiting) >= self.max_waiting:
            remedy = "read events until some have ended, or give a larger max_waiting"
            raise BusyError(f"{self.max_waiting} requests wait already; {remedy}")
        goes_on = None
        if continued and self.store is not None:
            weights, pieces = engine.steps.refresh(), engine.tokenizer
            found: Any = {"weights": weights, "kind": self.kind, "owner": about["owner"]}
            goes_on = partial(self.store.ids_for, pieces, **found)
        tokens = prompt_tokens(engine, prompt, goes_on)
        self._numbers += 1
        request = Request(self._numbers, engine, tokens, sampling, options, **about)
        self.waiting.append(request)
        return self._numbers

    def admit(self, free: int, running: int, events: list[tuple[int, Event]]) -> int:
        """Prefill a bounded number of prompt tokens, draw the first token of complete prompts.

        Events are appended. Return the number of tokens. `free` and `running` count rows.
        """
        allowed = budget = self._allowed(free, running)
        while budget > 0:
            admission = self._admission or self.begin(free - len(self.joining), budget)
            if admission is None:
                break
            if not admission.complete:  # it is where the draw of its first tokens was interrupted
                budget -= admission.run(budget)
            if admission.complete:
                drawn = admission.first_tokens()
                joining = list(zip(admission.requests, admission.caches(), strict=True))
                self._admission, self.joining = None, self.joining + joining
                self._hand_out(joining, drawn, events)
        return allowed - budget

    def _allowed(self, free: int, running: int) -> int:
        """Return how many prompt tokens a step may prefill; now and then it is a whole chunk."""
        usual, self._paced = self.limit or self.pace.tokens, self._paced + 1
        if not running:
            self._paced = BETWEEN
            return max(usual, 2 * self.chunk)
        begun = self._admission.requests if self._admission else ()
        coming = min(free, len(self.waiting) + len(begun))
        # where more can join than run, few wait for many
        if self.limit is None and coming > running and self._paced > BETWEEN:
            self._paced = 0
            return max(usual, self.chunk)
        return usual

    def begin(self, free: int, budget: int) -> Admission | None:
        """Begin the admission of what is at the head of the queue, if a row is free for it."""
        if not self.waiting or free < 1:
            return None
        group = next_group(list(self.waiting)[:free], budget, self.kind, self.store)
        admission = Admission(group, self.kind, self.chunk, self.store)
        others = deque(one for one in self.waiting if one not in group)
        self._admission, self.waiting = admission, others
        return admission

    def _hand_out(
        self,
        joining: list[tuple[Request, KVCache]],
        drawn: list[tuple[int, TokenLogprobs | None]],
        events: list[tuple[int, Event]],
    ) -> None:
        """Append the events of the first tokens; requests that have ended do not join."""
        for (request, cache), token in zip(joining, drawn, strict=True):
            events.append((request.number, request.take(*token)))
            if request.done:
                self.joining.remove((request, cache))
                keep(self.store, request, cache)
            elif self.store is not None and any(shares(o, [request]) for o in self.waiting):
                keep(self.store, request, cache.prefix(cache.offset))  # they wait for it

    def cancel(self, number: int) -> bool:
        """Drop a request; return False if it is not here."""
        for pair in self.joining:
            if pair[0].number == number:
                self.joining.remove(pair)
                keep(self.store, *pair)
                return True
        for request in self._admission.requests if self._admission else []:
            if request.number == number:
                self._withdraw(request)
                return True
        count = len(self.waiting)
        self.waiting = deque(one for one in self.waiting if one.number != number)
        return len(self.waiting) < count

    def close(self) -> None:
        """Drop every request; the prefix cache gets what was prefilled."""
        self.waiting.clear()
        while self._admission is not None:
            self._withdraw(self._admission.requests[0])
        for request, cache in self.joining:
            keep(self.store, request, cache)
        self.joining = []

    def _withdraw(self, request: Request) -> None:
        """Take a request out of the admission; what is prefilled goes to the prefix cache."""
        admission: Any = self._admission
        if len(admission.requests) > 1:
            admission.drop(request)
            return
        self._admission = None
        if admission.cache_is_one:
            keep(self.store, request, admission.cache)


def keep(store: PromptCache | None, request: Request, cache: KVCache | None) -> None:
    """Give the prefix cache what a request leaves, under the weights that it began with.

    A short sequence leaves the block that it did not fill to the next one.
    """
    if store is not None and cache is not None and cache.can_trim(0):
        if 2 * cache.kind.layout.slots_for(cache.offset, 1) <= cache.capacity:
            cache = cache.prefix(cache.offset) or cache
        store.put(request.weights, request.known[: cache.offset], cache, request.owner)


def next_group(
    waiting: Sequence[Request], budget: int, kind: CacheKind, store: PromptCache | None
) -> list[Request]:
    """Choose which of the waiting requests are prefilled next: the first, and others like it.

    All have the same weights, and at most a quarter of the tokens is padding. A prompt that shares
    its beginning with one of the group waits for the next turn, when the prefix cache has that.
    """
    first = waiting[0]
    others = [one for one in list(waiting)[1:] if one.engine is first.engine]
    group, left = [first], budget - len(first.known)
    for one in others:
        if one.known == first.known and one.owner == first.owner:
            group.append(one)
            continue
        shorter, longer = sorted((len(one.known), len(first.known)))
        alike = longer <= (shorter if isinstance(kind.layout, Window) else 1.25 * shorter + 4)
        if alike and len(one.known) <= left and not (store is not None and shares(one, group)):
            group.append(one)
            left -= len(one.known)
    return group


def shares(one: Request, others: Sequence[Request]) -> bool:
    """Return whether most of a prompt is the beginning of another one, for the same owner."""
    least = max(SHARED, len(one.known) // 2)
    alike = (o for o in others if o.engine is one.engine and o.owner == one.owner)
    return any(common_prefix(one.known, other.known) >= least for other in alike)
