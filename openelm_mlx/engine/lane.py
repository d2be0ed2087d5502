"""The rows of one engine: running requests that are stepped together.

Requests of different adapters have different weights, and so different lanes. Every lane gives each
of its rows a token per step of the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.admission import Queue, keep
from openelm_mlx.engine.decode import Drafted, Drawn, State, StepSpec, start
from openelm_mlx.engine.request import Event, Request, mask_of, on_host, spec_for, state_of
from openelm_mlx.engine.rows import Rows, quarters
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.engine.speculation import Speculation
from openelm_mlx.model.cache import KVCache

if TYPE_CHECKING:
    from openelm_mlx.engine.draft_model import ModelDraft
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.speculation import Draft


class Pending(NamedTuple):
    """A pass that was submitted and not yet read: the tokens that it draws, and their requests."""

    drawn: Drawn
    rows: list[tuple[int, Request]]
    drafted: list[int] | None  # tokens drafted, by row


class Lane:
    """The running requests of `engine`, which come prefilled from `queue`.

    Raises `OptionError` if `draft` is a model with another tokenizer.
    """

    _spec: StepSpec  # of the rows as they are arranged now
    _state: State

    def __init__(
        self,
        engine: Engine,
        queue: Queue,
        compiled: bool,
        draft: Engine | ModelDraft | Draft | None,
        events: list[tuple[int, Event]],
    ) -> None:
        self.engine, self._queue, self._compiled = engine, queue, compiled
        self.speculation = Speculation(engine, draft)
        self._events = events  # what is drawn is appended to them
        self._empty()

    def _empty(self) -> None:
        """Start again without rows and pending passes."""
        self._rows: list[Request | None] = []
        self._buffers = Rows(self.engine.config, self._queue.kind)
        self._passes: deque[Pending] = deque()  # submitted and not yet read, two at most
        self._filters = Filters()  # in use since the rows were all unused
        self._logits: mx.array | None = None  # of a pass whose draw waits for a mask
        self._stale = False  # rows are to be arranged anew

    @property
    def _masked(self) -> bool:
        """True if a grammar restricts what a row may draw."""
        return self._spec.filters.masked

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the rows, the draft model's included."""
        draft = self.speculation.model
        return self._buffers.nbytes + (0 if draft is None else draft.buffers.nbytes)

    @property
    def steady(self) -> bool:
        """True if no row comes or goes."""
        return not self._stale and not self._joining()

    def _joining(self) -> list[tuple[Request, KVCache]]:
        """Return the prefilled requests that wait for a row here."""
        return [(one, cache) for one, cache in self._queue.joining if one.engine is self.engine]

    def arrange(self) -> None:
        """Give each prefilled request a row, and find the step that serves all rows.

        It waits until what is under way has been read.
        """
        if self.steady or self._passes or self._logits is not None:
            return
        self.settle()  # passes that were forgotten may still write
        queue = self._queue
        queue.joining = [(one, cache) for one, cache in queue.joining if not one.done]
        everybody = [one for _, one in self.live()] + [one for one, _ in self._joining()]
        try:
            self._give_rows()
        except BaseException:  # what the rows contain is unknown: all are prefilled again
            queue.joining = [pair for pair in queue.joining if pair[0] not in everybody]
            self.speculation = Speculation(self.engine, self.speculation.draft)
            self._empty()
            queue.waiting.extendleft(reversed(everybody))
            raise
        self._stale = False
        kind, compiled = queue.kind, self._compiled
        self._spec = spec_for(everybody, self.engine.vocab, kind, compiled, self._filters)
        self._filters = self._spec.filters
        self._state = state_of(self._rows, self._spec)
        self._step = self.engine.steps.step(self._spec)
        if self._masked:
            self._forward, self._choose = self.engine.steps.parts(self._spec)

    def settle(self) -> None:
        """Wait as `Rows.settle` does, for the draft model too."""
        self._buffers.settle()
        if self.speculation.model is not None:
            self.speculation.model.buffers.settle()

    def _give_rows(self) -> None:
        """Use as few rows as are enough, in few sizes, so few shapes are traced."""
        live, joining = self.live(), self._joining()
        kept, count = [row for row, _ in live], quarters(max(1, len(live) + len(joining)))
        if kept != list(range(count)):
            self._buffers.resize(kept, count)
            self.speculation.move(kept, count)
            self._rows = [one for _, one in live] + [None] * (count - len(live))
        while joining:
            (request, cache), row = joining[0], self._rows.index(None)
            self._buffers.place(row, cache)
            self.speculation.admit(row, request)
            self._rows[row] = request
            self._queue.joining.remove(joining.pop(0))
            keep(self._queue.store, request, cache)  # a copied one is free, else it is empty

    def advance(self) -> None:
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
        live = self.live()
        return (
            self.steady
            and len(self._passes) == 1
            and self._passes[0].drafted is None
            and any(request.left > 1 for _, request in live)
            and not self.speculation.pays(live)
        )

    def _launch(self, unread: int = 0) -> None:
        """Submit a pass and its draw: one token for every row, or a draft if one pays.

        `unread` counts the tokens of each row that were drawn and that the host does not know yet.
        """
        live, proposal, mask = self.live(), None, None
        if not unread and self._logits is None:
            proposal = self.speculation.propose(live, self._state, self._spec)
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
                self.speculation.record(row, pending.drafted[row], kept)
                request.clock.drafted += pending.drafted[row]
                request.clock.accepted += kept
            for place in range(kept + 1):
                detail = details[row * length + place]
                self._events.append((request.number, request.take(values[place], detail)))
                if request.done:  # a drafted token that was kept has been fed
                    fed = len(request.known) if place < kept else self._fed(request)
                    self._retire(row, request, fed)
                    break

    def restart(self) -> None:
        """Forget the passes under way; they will be run again, from the known tokens."""
        self._passes.clear()
        self._logits, self._stale = None, True

    def cancel(self, number: int) -> bool:
        """Drop a request; return False if it does not run here."""
        for row, request in self.live():
            if request.number == number:
                self._retire(row, request, self._fed(request))
                return True
        return False

    def close(self) -> None:
        """Drop every request; the prefix cache gets what was run."""
        for row, request in self.live():
            self._retire(row, request, self._fed(request))
        self._empty()

    def _fed(self, request: Request) -> int:
        """Return how many known tokens are in a row: the newest only if a pass is under way."""
        return len(request.known) - (not self._passes and self._logits is None)

    def _retire(self, row: int, request: Request, fed: int) -> None:
        """Free a row; the prefix cache gets the tokens that were fed."""
        self._rows[row], request.done = None, True
        self.speculation.release(row)
        if self._queue.store is not None:
            keep(self._queue.store, request, self._buffers.extract(row, fed))
        live = self.live()
        if not live:
            self._empty()
            return
        self._stale = self._stale or 2 * quarters(len(live)) <= len(self._rows)
        if not self._stale:
            alive = mx.array([one is not None for one in self._rows], dtype=mx.int32)
            self._state = self._state._replace(alive=alive, position=self._state.position * alive)

    def live(self) -> list[tuple[int, Request]]:
        """Return the running requests with their rows."""
        return [(row, one) for row, one in enumerate(self._rows) if one and not one.done]
