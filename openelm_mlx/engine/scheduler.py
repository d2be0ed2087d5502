"""The scheduler: requests come in, and every step gives each running one its next token.

Requests wait in a queue, and their prompts are prefilled in chunks beside the rows that run
(admission.py); the rows are stepped together. A single sequence is one row: everything that
generates runs here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.admission import Queue, keep
from openelm_mlx.engine.decode import Drafted, Drawn, State, StepSpec, start
from openelm_mlx.engine.options import (
    EngineOptions,
    GenerationOptions,
    SamplingOptions,
    check_loaded,
    check_token_ids,
    with_overrides,
)
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.prompts import Prompt
from openelm_mlx.engine.request import Event, Reader, Request, mask_of, on_host, spec_for, state_of
from openelm_mlx.engine.rows import Rows, quarters
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.engine.speculation import Speculation
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import check_count, explained, shown
from openelm_mlx.model.cache_kinds import CacheKind

if TYPE_CHECKING:
    from typing import Unpack

    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.draft_model import ModelDraft
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import EngineSettings, RequestSettings
    from openelm_mlx.engine.speculation import Draft


class Pending(NamedTuple):
    """A pass that was submitted and not yet read: the tokens that it draws, and their requests."""

    drawn: Drawn
    rows: list[tuple[int, Request]]
    drafted: list[int] | None  # tokens drafted, by row


@explained(EngineOptions)
class BatchEngine:
    """Runs up to `slots` sequences together; up to `max_waiting` more wait their turn.

    >>> batch = BatchEngine(engine)
    >>> number = batch.submit("Once upon a time", temperature=0.7, max_tokens=64)
    >>> while batch.busy:
    ...     for number, event in batch.step():
    ...         print(number, event.text)

    `submit` takes a prompt at any time, `cancel` drops one. The tokens of a sequence do not depend
    on its neighbours: its random numbers are a function of its seed and position, and no token
    attends to another row. All sequences use `prompt_cache`, and leave their tokens in it; `draft`
    is that of `stream_generate`. `options` and `settings` are engine options. Any thread may call
    it.

    While sequences run, a step prefills at most `admission` tokens of waiting prompts, so a long
    prompt does not stall the others; by default as many as triple the time of a step, about. Raises
    `OptionError`, and `CacheError` for a cache that the model cannot have.
    """

    _spec: StepSpec  # of the rows as they are arranged now
    _state: State

    def __init__(
        self,
        engine: Engine,
        slots: int = 16,
        options: EngineOptions | None = None,
        *,
        draft: Engine | ModelDraft | Draft | None = None,
        prompt_cache: PromptCache | None = None,
        admission: int | None = None,
        max_waiting: int = 1024,
        **settings: Unpack[EngineSettings],
    ) -> None:
        check_loaded("engine", engine)
        check_count("slots", slots, 1)
        check_count("admission", 1 if admission is None else admission, 1)
        check_count("max_waiting", max_waiting, 1)
        if not isinstance(prompt_cache, PromptCache | None):
            raise OptionError(f"prompt_cache is {shown(prompt_cache)}; allowed is a PromptCache")
        self.engine, self.slots, self.prompt_cache = engine, slots, prompt_cache
        (self.options,) = with_overrides((EngineOptions,), (options,), settings)
        self.kind = CacheKind.of(engine.config, self.options)
        self._draft, self._speculation = draft, Speculation(engine, draft)
        self._reader = Reader()
        self._events: list[tuple[int, Event]] = []  # not yet handed out
        chunk = self.options.prefill_chunk
        self._queue = Queue(engine, self.kind, prompt_cache, chunk, admission, max_waiting)
        self._empty()

    def _empty(self) -> None:
        """Start again without rows and pending passes."""
        self._rows: list[Request | None] = []
        self._buffers = Rows(self.engine.config, self.kind)
        self._passes: deque[Pending] = deque()  # submitted and not yet read, two at most
        self._filters = Filters()  # in use since the rows were all unused
        self._logits: mx.array | None = None  # of a pass whose draw waits for a mask
        self._stale = bool(self._queue.joining)  # rows are to be arranged anew

    @property
    def _masked(self) -> bool:
        """True if a grammar restricts what a row may draw."""
        return self._spec.filters.masked

    @property
    def busy(self) -> bool:
        """True if anything runs or waits."""
        return bool(self._queue.busy or self._events or self._live())

    @explained(SamplingOptions, GenerationOptions)
    @device_work
    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingOptions | None = None,
        options: GenerationOptions | None = None,
        *,
        owner: str = "",
        position_offset: int = 0,
        progress: Progress | None = None,
        continued: bool = False,
        **settings: Unpack[RequestSettings],
    ) -> int:
        """Queue a prompt, and return the number that its events carry.

        A prompt never reuses what the prefix cache has of another `owner`. Where text is
        `continued`, its ids go on from those in the prefix cache whose text it begins with; else
        they depend on the text alone. `position_offset` and `progress` are those of
        `stream_generate`. Raises `PromptError`, `OptionError`, and `BusyError` if `max_waiting`
        requests wait.
        """
        kinds = (SamplingOptions, GenerationOptions)
        drawn_by, ended_by = with_overrides(kinds, (sampling, options), settings)
        ended_by.check_draft(self._speculation.has_model)
        check_token_ids(drawn_by, ended_by, self.engine.vocab)
        if progress is not None and not callable(progress):
            allowed = "allowed is a function of two numbers, or None"
            raise OptionError(f"progress is {shown(progress)}; {allowed}")
        check_count("position_offset", position_offset)
        about: Any = {"owner": owner, "position_offset": position_offset, "progress": progress}
        return self._queue.add(prompt, drawn_by, ended_by, continued, reader=self._reader, **about)

    @device_work
    def cancel(self, number: int) -> bool:
        """Drop a sequence; return False if it has ended already or never was."""
        for row, request in self._live():
            if request.number == number:
                self._retire(row, request, self._fed(request))
                return True
        return self._queue.cancel(number)

    def step(self) -> list[tuple[int, Event]]:
        """Admit what waits, and draw for every running sequence; return (number, event) pairs.

        Nothing is lost if a processor, a draft or a progress function raises, or at an
        interrupt: the next step hands out the events so far, and goes on from the known tokens.
        """
        self._work()
        # no interrupt comes from here on: Python looks for one at calls and in loops only
        events, self._events[:] = self._events[:], []
        return events

    @device_work
    def _work(self) -> None:
        """Do the work of one step, which adds to the events."""
        self._reader.back()
        begun, steady = time.perf_counter(), bool(self._rows) and not self._stale
        try:
            if self._stale and not self._passes and self._logits is None:
                self._arrange()
            live = len(self._live())
            prefilled, joined = self._queue.admit(self.slots - live, not live, self._events)
            self._stale = self._stale or joined
            if self._live():
                self._advance()
        except BaseException:
            self._passes.clear()  # whatever is under way is run again
            self._logits, self._stale = None, True
            raise
        if steady and not self._stale:
            self._queue.pace.learn(time.perf_counter() - begun, prefilled)
        self._reader.leave()

    @device_work
    def close(self) -> None:
        """Drop all requests and wait for the device; the prefix cache gets what was run."""
        self._events.clear()
        self._queue.close()
        for row, request in self._live():
            self._retire(row, request, self._fed(request))
        self._empty()
        mx.synchronize()

    def _arrange(self) -> None:
        """Give each prefilled request a row, and find the step that serves all rows."""
        queue = self._queue
        queue.joining = [(one, cache) for one, cache in queue.joining if not one.done]
        everybody = [one for _, one in self._live()] + [one for one, _ in queue.joining]
        try:
            self._give_rows()
        except BaseException:  # what the rows contain is unknown: all are prefilled again
            queue.joining = []
            self._speculation = Speculation(self.engine, self._draft)
            self._empty()
            queue.waiting.extendleft(reversed(everybody))
            raise
        self._stale = False
        compiled, vocab = self.options.compiled, self.engine.vocab
        self._spec = spec_for(everybody, vocab, self.kind, compiled, self._filters)
        self._filters = self._spec.filters
        self._state = state_of(self._rows, self._spec)
        self._step = self.engine.steps.step(self._spec)
        if self._masked:
            self._forward, self._choose = self.engine.steps.parts(self._spec)

    def _give_rows(self) -> None:
        """Use as few rows as are enough, in few sizes, so few shapes are traced."""
        live, joining = self._live(), self._queue.joining
        kept, count = [row for row, _ in live], quarters(max(1, len(live) + len(joining)))
        if kept != list(range(count)):
            self._buffers.resize(kept, count)
            self._speculation.move(kept, count)
            self._rows = [one for _, one in live] + [None] * (count - len(live))
        while joining:
            (request, cache), row = joining[0], self._rows.index(None)
            self._buffers.place(row, cache)
            self._speculation.admit(row, request)
            self._rows[row] = request
            joining.pop(0)
            keep(self.prompt_cache, request, cache)  # a copied one is free, else it is empty

    def _advance(self) -> None:
        """Read one pass while the device computes the next one, if that can begin already."""
        if not self._passes:
            self._launch()
        if self._may_look_ahead():
            if self._masked:
                self._logits = self._pass(self._forward, None, 1)
                mx.async_eval(self._logits)
            else:
                self._launch(1)
        self._read()

    def _may_look_ahead(self) -> bool:
        """Return whether the next pass can begin before the one under way is read."""
        live = self._live()
        return (
            not self._stale
            and len(self._passes) == 1
            and self._passes[0].drafted is None
            and any(request.left > 1 for _, request in live)
            and not self._speculation.pays(live)
        )

    def _launch(self, unread: int = 0) -> None:
        """Submit a pass and its draw: one token for every row, or a draft if one pays.

        `unread` counts the tokens of each row that were drawn and that the host does not know yet.
        """
        live, proposal, mask = self._live(), None, None
        if not unread and self._logits is None:
            proposal = self._speculation.propose(live, self._state, self._spec)
        drafts = None if proposal is None else proposal.tokens
        length = 0 if drafts is None else drafts.shape[1]
        if self._masked:  # the device is at the pass while the host computes the masks
            if self._logits is None:
                self._logits = self._pass(self._forward, drafts, length)
                mx.async_eval(self._logits)
            mask = mask_of(self._rows, self._spec, proposal)
        drafted = None if proposal is None else Drafted(proposal.tokens, mx.array(proposal.lengths))
        if self._masked:
            drawn, moved = self._choose(self._logits, self._state, drafted, mask)
            self._logits = None
        else:
            drawn, moved = self._pass(self._step, drafted, unread + length)
        self._state = self._state.after(moved)
        self._passes.append(Pending(drawn, live, None if proposal is None else proposal.lengths))
        start(drawn, moved)

    def _pass(self, run: Callable[..., Any], given: Any, written: int) -> Any:
        """Run a pass over the buffers that writes `written` slots after a row's known tokens."""
        ends = [len(one.known) + written if one and not one.done else 0 for one in self._rows]
        made, changed = run(self._state._replace(buffers=self._buffers.lend(ends)), given)
        self._buffers.restore(changed)
        return made

    def _read(self) -> None:
        """Wait for the oldest pass, and turn what it drew into events."""
        pending = self._passes.popleft()
        drawn = pending.drawn
        tokens: Any = drawn.tokens.tolist()
        counts: Any = None if drawn.kept is None else drawn.kept.tolist()
        length = 1 if counts is None else len(tokens[0])
        details = on_host(drawn.logprobs, length * len(tokens))
        for row, request in pending.rows:
            if request.done:
                continue
            request.clock.passes += 1
            kept = 0 if counts is None else counts[row]
            values = [tokens[row]] if counts is None else tokens[row]
            if pending.drafted is not None and pending.drafted[row]:
                self._speculation.record(row, pending.drafted[row], kept)
                request.clock.drafted += pending.drafted[row]
                request.clock.accepted += kept
            for place in range(kept + 1):
                detail = details[row * length + place]
                self._events.append((request.number, request.take(values[place], detail)))
                if request.done:  # a drafted token that was kept has been fed
                    fed = len(request.known) if place < kept else self._fed(request)
                    self._retire(row, request, fed)
                    break

    def _fed(self, request: Request) -> int:
        """Return how many known tokens are in a row: the newest only if a pass is under way."""
        return len(request.known) - (not self._passes and self._logits is None)

    def _retire(self, row: int, request: Request, fed: int) -> None:
        """Free a row; the prefix cache gets the tokens that were fed."""
        self._rows[row], request.done = None, True
        self._speculation.release(row)
        if self.prompt_cache is not None:
            keep(self.prompt_cache, request, self._buffers.extract(row, fed))
        live = self._live()
        if not live:
            self._empty()
            return
        self._stale = self._stale or 2 * quarters(len(live)) <= len(self._rows)
        if not self._stale:
            alive = mx.array([one is not None for one in self._rows], dtype=mx.int32)
            self._state = self._state._replace(alive=alive, position=self._state.position * alive)

    def _live(self) -> list[tuple[int, Request]]:
        """Return the running requests with their rows."""
        return [(row, one) for row, one in enumerate(self._rows) if one and not one.done]
