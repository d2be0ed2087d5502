"""A smaller model that drafts: it reads each row's text, then draws several tokens in one call.

It draws with the target's options and noise, so the two agree often (speculation.py says why the
text is the same with any draft).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.rows import Rows
from openelm_mlx.engine.sampling import Context, Controls, Filters, History, draw
from openelm_mlx.errors import OptionError
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import Arrays, CacheKind
from openelm_mlx.model.decoder import OpenELM

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import State, StepSpec
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import Request


class ModelDraft:
    """A smaller model with the target's tokenizer, whose guesses the target verifies.

    Like the target it keeps what it has read, so it prefills only the new part of a conversation.
    Raises `OptionError` if the tokenizers differ.
    """

    def __init__(self, target: Engine, draft: Engine) -> None:
        check_loaded("target", target)
        check_loaded("draft", draft)
        self.engine, self.kind = draft, CacheKind()
        self.check(target)
        # in passes of the target: the mean of the bytes read and of the kernels launched
        layers = len(draft.model.layers) / len(target.model.layers)
        self.cost = (draft.nbytes / target.nbytes + layers) / 2
        self.store = PromptCache()

    def check(self, target: Engine) -> None:
        """Raise `OptionError` if this draft cannot serve `target`."""
        draft = self.engine
        if not draft.tokenizer.same_pieces(target.tokenizer) or draft.vocab != target.vocab:
            what = f"the draft model {draft.name} has another tokenizer than {target.name}"
            raise OptionError(f"{what}; a draft must share it token for token")


@dataclass
class DraftRow:
    """How far the draft model has read one request's text."""

    request: Request
    weights: object  # the keys and values were computed with these
    read: int  # tokens of the text whose keys and values are stored
    cache: KVCache | None  # stores them until the row has caught up; from then on the `Rows` do


class DraftRows:
    """The draft model's side of a scheduler's rows, under the same numbers.

    A row whose text is far ahead of what the draft has read catches up by itself, in chunks, as a
    prompt does. All other rows share one pass, which writes after the tokens that each row has, and
    so overwrites none.
    """

    FEED = (8, 32)  # tokens by which rows catch up together; those that lag by more do so alone
    ALONE, SHARED = 512, 256  # tokens of one call that catches up, with one running row and several

    def __init__(self, draft: ModelDraft) -> None:
        self.draft, self.steps, self.model = draft, draft.engine.steps, draft.engine.model
        self.buffers = Rows(draft.engine.config, draft.kind)
        self.rows: dict[int, DraftRow] = {}

    def admit(self, row: int, request: Request) -> None:
        """Begin to read the text of `request` for `row`, after what the store has of it."""
        weights, draft = self.steps.refresh(), self.draft
        found = draft.store.take(weights, draft.kind, request.known, request.owner)
        cache, read = found or (KVCache(draft.engine.config, draft.kind), 0)
        self.rows[row] = DraftRow(request, weights, read, cache)

    def release(self, row: int) -> None:
        """End the drafts of `row`; what was read of its text goes to the store."""
        one = self.rows.pop(row)
        read = min(one.read, len(one.request.known))  # a stop may end the text within a draft
        cache = one.cache or self.buffers.extract(row, read)
        tokens = one.request.known[: cache.offset]
        self.draft.store.put(one.weights, tokens, cache, one.request.owner)
        if not self.rows:  # several keep their arrays
            self.buffers = Rows(self.draft.engine.config, self.draft.kind)

    def move(self, rows: list[int], count: int) -> None:
        """Renumber `rows` as 0, 1, ... of `count`."""
        self.buffers.resize(rows, count)
        self.rows = {new: self.rows[old] for new, old in enumerate(rows) if old in self.rows}

    def catch_up(self, rows: list[int], budget: int) -> list[int]:
        """Read all but the last two tokens of `rows`; return the rows that have caught up.

        At most `budget` tokens are read for rows that lag far; they may need another call.
        """
        ready = []
        for row in rows:
            one = self.rows[row]
            end = max(len(one.request.known) - 2, 1)  # an empty cache cannot become a row
            if one.cache is None and end - one.read > self.FEED[-1]:
                one.cache = self.buffers.extract(row, one.read)
            if one.cache is not None:
                tokens = one.request.known[one.cache.offset : end][:budget]
                budget -= len(tokens)
                if tokens:
                    self.model.hidden(self._ids([tokens], 0), one.cache, last=True)
                    mx.async_eval(one.cache.arrays)
                one.read = one.cache.offset
                if one.read < end:
                    continue
                self.buffers.place(row, one.cache)
                one.cache = None
            ready.append(row)
        return ready

    def propose(self, rows: list[int], state: State, spec: StepSpec, k: int) -> mx.array:
        """Draft k tokens for `rows`, which have caught up, [B, k]; the other rows get padding."""
        texts = {row: self.rows[row].request.known for row in rows}
        starts = [0] * self.buffers.count
        for row, one in self.rows.items():
            starts[row] = one.read if one.cache is None else 0
        compiled = spec.compiled
        lag = max(len(known) - 2 - starts[row] for row, known in texts.items())
        if lag > 0:
            length = next(length for length in self.FEED if length >= lag)
            feed = self.steps.cached(
                ("feed", compiled), compiled, lambda: make_feed(self.model, self.draft.kind)
            )
            missing = [texts.get(row, [])[start:-2] for row, start in enumerate(starts)]
            self._run(feed, self._ids(missing, length), starts)
            self.buffers.settle()  # nothing that it computed is needed below, only what it stored
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
            self.rows[row].read = len(known)
        return tokens

    def _ids(self, rows: list[list[int]], length: int) -> mx.array:
        """Pad to `length`. Ids beyond the draft's embedding become its last one.

        A target with a larger embedding may know such ids; a wrong one only makes a worse draft.
        """
        last = self.draft.engine.config.vocab_size - 1
        ids = [[min(token, last) for token in row] + [0] * (length - len(row)) for row in rows]
        return mx.array(ids, dtype=mx.uint32)

    def _run(
        self, run: Any, tokens: mx.array, starts: list[int], more: int = 0, *args: Any
    ) -> mx.array:
        """Run a pass over the buffers that writes the tokens, and `more` slots after them."""
        ends = [0] * len(starts)
        for row in self.rows:
            ends[row] = starts[row] + tokens.shape[1] + more
        start, buffers = mx.array(starts, dtype=mx.int32), self.buffers.lend(ends)
        found: mx.array
        found, changed = run(tokens, start, buffers, *args)
        self.buffers.restore(changed)
        return found

    def record(self, row: int, known: int, drafted: int, accepted: int) -> None:
        """Note that the first `accepted` tokens of a draft after `known` tokens were kept.

        All drafted tokens but the last one were read.
        """
        self.rows[row].read = known + min(accepted, drafted - 1)


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
    """Return a function that drafts k tokens a row without returning to the host between them.

    It starts with the latest two tokens of each row, because after a draft that was accepted
    completely the cache lacks the first of them. Reading it again in all other cases is harmless,
    keeps the shapes, and saves a pass. Each token is drawn as the target will draw its own: with
    the same filters and the noise of the same position.
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
            context = Context(controls, key, start + position, newest, history)
            newest = draw(logits, filters, context)
            tokens.append(newest)
            if len(tokens) < k:
                history = None if history is None else history.plus(newest)
                caches = step_caches([cache.arrays for cache in caches], start + position, kind)
                hidden = model.hidden(newest, caches, last=True)
        return mx.stack(tokens, axis=1), [cache.arrays for cache in caches]

    return run
