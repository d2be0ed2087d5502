"""Where drafts come from: the text itself, a smaller model or a caller's own source; and how long
they should be.

Lengths are functions of tokens alone, never of time, so that a run can be repeated pass by pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.device import mx
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.rows import Rows
from openelm_mlx.engine.sampling import Controls, Filters, History, draw
from openelm_mlx.errors import OptionError
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import Arrays, CacheKind
from openelm_mlx.model.decoder import OpenELM

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import State, StepSpec
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import Request

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # each length is a trace of its own, so not every number
# passes that one more token in the target's pass costs; memory-bound devices take it almost free
EXTRA = 0.05
LEAVING = 0.15  # passes that a draft costs besides: the device is no longer one token ahead


def gain(acceptance: float, k: int, cost: float) -> float:
    """Return the tokens that a draft of k gives for the price of one token by plain decoding.

    A draft gives (1 - a^(k+1)) / (1 - a) tokens, where a is the acceptance of each (arXiv:2211.17192, eq. 1), for
    1 + LEAVING + k (cost + EXTRA) passes of the target.
    """
    a = min(acceptance, 0.999)
    return (1 - a ** (k + 1)) / (1 - a) / (1 + LEAVING + k * (cost + EXTRA))


class Draft(Protocol):
    """A caller's own source of drafts. Wrong tokens cost time and never change what is
    generated.
    """

    def propose(self, known: list[int], length: int) -> list[int]:
        """Return at most `length` tokens that may follow `known`, the prompt and the answer so
        far.
        """
        ...


class PromptLookup:
    """Guess what followed the last time the latest tokens were seen: the latest `ngram` of them, or
    else fewer.

    known    the cat sat on a mat . the cat
             ^^^^^^^ earlier match  ^^^^^^^ the latest two
    draft    sat on a mat . the cat sat ...       (what runs over the end repeats: a loop goes on)

    Guessing costs nothing, so it is done at every token, drafted or not: how often the first guess
    was right is known, for each length of match, before the first draft is made; nothing is drafted
    before a guess came true.
    """

    MEMORY = 0.8  # weight of the past at each guess
    PRIOR = 0.1  # share of right guesses before there was one
    MARGIN = 1.2  # the least gain of an adaptive draft: a few lucky guesses are no pattern

    def __init__(self, ngram: int, limit: int, adaptive: bool = True) -> None:
        self.ngram, self.limit, self.adaptive = ngram, limit, adaptive
        self.hits = [self.PRIOR] * (ngram + 1)  # share of right guesses by length of match
        self._after: dict[tuple[int, ...], int] = {}  # the place behind an n-gram's latest one
        self._seen = 0

    def find(self, known: list[int]) -> tuple[int, int] | None:
        """Find the latest earlier occurrence of the longest end of `known` that occurred before.

        Return the place behind it, and its length.
        """
        for end in range(self._seen, len(known)):
            guess = self._match(known, end)
            if guess is not None:
                place, n = guess
                hit = (1 - self.MEMORY) * (known[place] == known[end])
                self.hits[n] = self.MEMORY * self.hits[n] + hit
            for n in range(1, min(self.ngram, end) + 1):
                self._after[tuple(known[end - n : end])] = end
        self._seen = len(known)
        return self._match(known, len(known))

    def _match(self, known: list[int], end: int) -> tuple[int, int] | None:
        for n in range(min(self.ngram, end), 0, -1):
            place = self._after.get(tuple(known[end - n : end]))
            if place is not None:
                return place, n
        return None

    def length(self, known: list[int]) -> int:
        """Return how many tokens to draft; 0 where no match, or none of late for matches this long,
        promises a gain.
        """
        match = self.find(known)
        if match is None:
            return 0
        if not self.adaptive:
            return self.limit
        best, most = longest_gain(self.hits[match[1]], self.limit, 0.0)
        return best if most > self.MARGIN else 0

    def propose(self, known: list[int], length: int) -> list[int]:
        match = self.find(known)
        if match is None:
            return []
        place, period = match[0], len(known) - match[0]
        return [known[place + index % period] for index in range(length)]


def longest_gain(acceptance: float, limit: int, cost: float) -> tuple[int, float]:
    """Return the length up to `limit` that gains most, and its gain."""
    lengths = [k for k in LENGTHS if k <= limit]
    gains = [gain(acceptance, k, cost) for k in lengths]
    most = max(gains)
    return lengths[gains.index(most)], most


class DraftLength:
    """How long a draft that costs something should be, from what was accepted of those before.

    When no length pays, it pauses for PAUSE tokens, twice as long each time, and then tries a short
    one.
    """

    MEMORY = 0.9  # weight of the past at each tested token
    PAUSE, LONGEST_PAUSE = 16, 256

    def __init__(self, limit: int, cost: float, adaptive: bool = True) -> None:
        self.limit, self.cost, self.adaptive = limit, cost, adaptive
        self.acceptance = 0.7
        self._resume, self._pause, self._probing = 0, self.PAUSE, False

    def length(self, known: int) -> int:
        """Return how many tokens to draft after `known`; 0 while drafting does not pay."""
        if not self.adaptive:
            return self.limit
        if known < self._resume:
            return 0
        if self._probing:
            return min(2, self.limit)
        return longest_gain(self.acceptance, self.limit, self.cost)[0]

    def record(self, known: int, drafted: int, accepted: int) -> None:
        """Learn that of a draft after `known` tokens the first `accepted` were kept."""
        tested = min(accepted + 1, drafted)  # tokens after the first rejection say nothing
        for index in range(tested):
            hit = 1.0 if index < accepted else 0.0
            self.acceptance = self.MEMORY * self.acceptance + (1 - self.MEMORY) * hit
        if self._probing and accepted:
            self._probing, self._pause = False, self.PAUSE
            self.acceptance = max(self.acceptance, 0.6)
        elif self._probing or longest_gain(self.acceptance, self.limit, self.cost)[1] < 1:
            self._resume, self._probing = known + self._pause, True
            self._pause = min(2 * self._pause, self.LONGEST_PAUSE)


class ModelDraft:
    """A smaller model with the same tokenizer, whose guesses are drawn with the target's own
    options and noise.

    It keeps what it has read between generations, so that in a conversation it prefills only what
    is new, too. Raises `OptionError` when the tokenizers differ.
    """

    def __init__(self, target: Engine, draft: Engine) -> None:
        check_loaded("target", target)
        check_loaded("draft", draft)
        self.engine, self.kind = draft, CacheKind()
        self.check(target)
        layers = len(draft.model.layers) / len(target.model.layers)
        self.cost = (
            draft.nbytes / target.nbytes + layers
        ) / 2  # a token costs bytes read and kernels launched
        self.store = PromptCache()

    def check(self, target: Engine) -> None:
        """Raise `OptionError` where this draft cannot serve `target`."""
        draft = self.engine
        if not draft.tokenizer.same_pieces(target.tokenizer) or draft.vocab != target.vocab:
            raise OptionError(
                f"the draft model {draft.name} has another tokenizer than {target.name}; "
                "a draft must share it token for token"
            )


@dataclass
class DraftRow:
    """What the draft model has read of one request's text."""

    request: Request
    weights: object  # that the keys and values were computed with
    held: int  # tokens of the text whose keys and values are there
    cache: KVCache | None  # holds them until the row has caught up; from then on the `Rows` do


class DraftRows:
    """The draft model's side of a scheduler's rows, under the same numbers: each reads its text and
    drafts what follows.

    A row whose text is far ahead of what the draft has read catches up outside, in chunks, as a
    prompt does. All other rows go through one pass together, which writes behind what each row
    holds, and so spoils nothing.
    """

    FEED = (8, 32)  # tokens by which rows catch up together; what lags by more does so alone
    ALONE, SHARED = 512, 256  # tokens read outside at a time, for one running row and for several

    def __init__(self, draft: ModelDraft) -> None:
        self.draft, self.steps, self.model = draft, draft.engine.steps, draft.engine.model
        self.buffers = Rows(draft.engine.config, draft.kind)
        self.rows: dict[int, DraftRow] = {}

    def admit(self, row: int, request: Request) -> None:
        weights, draft = self.steps.refresh(), self.draft
        found = draft.store.take(weights, draft.kind, request.known, request.owner)
        cache, held = found or (KVCache(draft.engine.config, draft.kind), 0)
        self.rows[row] = DraftRow(request, weights, held, cache)

    def release(self, row: int) -> None:
        one = self.rows.pop(row)
        held = min(one.held, len(one.request.known))  # a stop ends the text amid an accepted draft
        cache = one.cache or self.buffers.extract(row, held)
        tokens = one.request.known[: cache.offset]
        self.draft.store.put(one.weights, tokens, cache, one.request.owner)

    def move(self, rows: list[int], count: int) -> None:
        self.buffers.resize(rows, count)
        self.rows = {new: self.rows[old] for new, old in enumerate(rows) if old in self.rows}

    def catch_up(self, rows: list[int], budget: int) -> list[int]:
        """Read the texts of `rows` to all but the last two tokens; return the rows where that is
        done.

        At most `budget` tokens are read outside; rows that need more lag until a later call.
        """
        ready = []
        for row in rows:
            one = self.rows[row]
            end = max(len(one.request.known) - 2, 1)  # an empty cache has no place among the rows
            if one.cache is None and end - one.held > self.FEED[-1]:
                one.cache = self.buffers.extract(row, one.held)
            if one.cache is not None:
                tokens = one.request.known[one.cache.offset : end][:budget]
                budget -= len(tokens)
                if tokens:
                    self.model.hidden(self._ids([tokens], 0), one.cache, last=True)
                    mx.async_eval(one.cache.arrays)
                one.held = one.cache.offset
                if one.held < end:
                    continue
                self.buffers.place(row, one.cache)
                one.cache = None
            ready.append(row)
        return ready

    def propose(self, rows: list[int], state: State, spec: StepSpec, k: int) -> mx.array:
        """Draft k tokens, [B, k], for `rows`, which have caught up; what the others get means
        nothing.
        """
        texts = {row: self.rows[row].request.known for row in rows}
        starts = [0] * self.buffers.count
        for row, one in self.rows.items():
            starts[row] = one.held if one.cache is None else 0
        compiled = spec.compiled
        lag = max(len(known) - 2 - starts[row] for row, known in texts.items())
        if lag > 0:
            width = next(width for width in self.FEED if width >= lag)
            feed = self.steps.cached(
                ("feed", compiled), compiled, lambda: make_feed(self.model, self.draft.kind)
            )
            missing = [texts.get(row, [])[start:-2] for row, start in enumerate(starts)]
            self._run(feed, self._ids(missing, width), starts)
        for row, known in texts.items():
            starts[row] = len(known) - 2
        filters = replace(spec.filters, masked=False)
        run = self.steps.cached(
            ("draft", filters, spec.vocab, k, compiled),
            compiled,
            lambda: make_drafter(self.model, self.draft.kind, filters, spec.vocab, k),
        )
        pairs = [texts.get(row, [])[-2:] for row in range(len(starts))]
        more = (state.key, state.controls, state.history)
        tokens = self._run(run, self._ids(pairs, 2), starts, k - 1, *more)
        for row, known in texts.items():
            self.rows[row].held = len(known)
        return tokens

    def _ids(self, rows: list[list[int]], width: int) -> mx.array:
        """Pad to `width`; ids that a wider target alone has become another one, which spoils the
        draft only.
        """
        last = self.draft.engine.config.vocab_size - 1
        ids = [[min(token, last) for token in row] + [0] * (width - len(row)) for row in rows]
        return mx.array(ids, dtype=mx.uint32)

    def _run(
        self, run: Any, tokens: mx.array, starts: list[int], more: int = 0, *args: Any
    ) -> mx.array:
        ends = [0] * len(starts)
        for row in self.rows:
            ends[row] = starts[row] + tokens.shape[1] + more
        start, buffers = mx.array(starts, dtype=mx.int32), self.buffers.lend(ends)
        found: mx.array
        found, changed = run(tokens, start, buffers, *args)
        self.buffers.restore(changed)
        return found

    def record(self, row: int, known: int, drafted: int, accepted: int) -> None:
        """Note that of a draft after `known` tokens `accepted` were kept; all but its last token
        were read.
        """
        self.rows[row].held = known + min(accepted, drafted - 1)


def make_feed(model: OpenELM, kind: CacheKind) -> Callable[..., Any]:
    """Return a function that reads tokens [B, L] from positions [B] on."""

    def run(
        tokens: mx.array, start: mx.array, buffers: list[Arrays]
    ) -> tuple[mx.array, list[Arrays]]:
        caches = step_caches(buffers, start, kind)
        hidden = model.hidden(tokens, caches, last=True)
        return hidden, [cache.arrays for cache in caches]

    return run


def make_drafter(
    model: OpenELM, kind: CacheKind, filters: Filters, vocab: int, k: int
) -> Callable[..., Any]:
    """Return a function that drafts k tokens a row in one go, without a return to the host between
    them.

    It starts with the latest two tokens of each row: after a wholly accepted draft the cache lacks
    the last one, and reading it again in every other case does no harm, keeps the shapes, and saves
    a pass. Each token is drawn as the target will draw its own: under the same filters, with the
    noise of the same position.
    """

    def run(
        pairs: mx.array,
        start: mx.array,
        buffers: list[Arrays],
        key: mx.array,
        controls: Controls,
        history: History | None,
    ) -> tuple[mx.array, list[Arrays]]:
        caches = step_caches(buffers, start, kind)
        hidden = model.hidden(pairs, caches, last=True)
        newest, tokens = pairs[:, 1], []
        for position in range(2, k + 2):
            logits = model.logits(hidden)[:, :vocab]
            newest = draw(logits, filters, controls, key, start + position, history, newest)
            tokens.append(newest)
            if len(tokens) < k:
                history = None if history is None else history.plus(newest)
                caches = step_caches([cache.arrays for cache in caches], start + position, kind)
                hidden = model.hidden(newest, caches, last=True)
        return mx.stack(tokens, axis=1), [cache.arrays for cache in caches]

    return run
