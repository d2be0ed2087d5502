"""The scheduler: requests come in, and every step gives each running one its next token.

Requests wait in a queue, and their prompts are prefilled in chunks beside the rows that run
(admission.py); the rows are stepped together, those of each adapter in a lane of their own
(lane.py). A single sequence is one row: everything that generates runs here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.admission import Queue
from openelm_mlx.engine.lane import Lane
from openelm_mlx.engine.memory import chunk_for, give_back, wired
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
from openelm_mlx.engine.request import Event, Reader
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
    prompt does not stall the others; by default as many as take about three times as long as a
    step without any, or a whole chunk every few steps if more sequences could join than run. Raises
    `OptionError`, and `CacheError` for a cache that the model cannot have.
    """

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
        self._reader = Reader()
        self._events: list[tuple[int, Event]] = []  # not yet handed out
        chunk = self.options.prefill_chunk or chunk_for(engine, self.kind)
        self._queue = Queue(self.kind, prompt_cache, chunk, admission, max_waiting)
        compiled = self.options.compiled
        self._lanes = [Lane(engine, self._queue, compiled, draft, self._events)]
        self._wired = False  # while anything runs or waits

    @property
    def busy(self) -> bool:
        """True if anything runs or waits."""
        return bool(self._queue.busy or self._events or self._running)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the requests that run or are prefilled."""
        return self._queue.nbytes + sum(lane.nbytes for lane in self._lanes)

    @property
    def _running(self) -> int:
        """The number of rows that run."""
        return sum(len(lane.live()) for lane in self._lanes)

    def _open_lanes(self) -> None:
        """Keep a lane for the engine itself, and for each adapter of a request that has a row."""
        first, *others = self._lanes
        lanes = [first, *(lane for lane in others if lane.live())]
        for request, _ in self._queue.joining:
            if all(lane.engine is not request.engine for lane in lanes):
                compiled, draft = self.options.compiled, first.speculation.draft
                lanes.append(Lane(request.engine, self._queue, compiled, draft, self._events))
        self._lanes = lanes

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
        engine = self.engine.adapted(ended_by.adapter)
        ended_by.check_draft(self._lanes[0].speculation.has_model)
        check_token_ids(drawn_by, ended_by, engine.vocab)
        if progress is not None and not callable(progress):
            allowed = "allowed is a function of two numbers, or None"
            raise OptionError(f"progress is {shown(progress)}; {allowed}")
        check_count("position_offset", position_offset)
        about: Any = {"owner": owner, "position_offset": position_offset, "progress": progress}
        about["reader"] = self._reader
        return self._queue.add(engine, prompt, drawn_by, ended_by, continued, **about)

    @device_work
    def cancel(self, number: int) -> bool:
        """Drop a sequence; return False if it has ended already or never was."""
        found = any(lane.cancel(number) for lane in self._lanes) or self._queue.cancel(number)
        self._rest()
        return found

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
        begun = time.perf_counter()
        self._hold()
        self._open_lanes()
        lanes, rows = self._lanes, self._running
        steady = bool(rows) and all(lane.steady for lane in lanes)
        try:
            for lane in lanes:
                lane.arrange()
            rows = self._running
            prefilled = self._queue.admit(self.slots - rows, rows, self._events)
            if prefilled and self._queue.joining:  # a prompt has been read to its end
                give_back()
            for lane in lanes:
                if lane.live():
                    lane.advance()
        except BaseException:
            for lane in lanes:
                lane.restart()
            raise
        if steady and all(lane.steady for lane in lanes):
            self._queue.pace.learn(time.perf_counter() - begun, prefilled)
        self._reader.leave()
        self._rest()

    def _hold(self) -> None:
        """Keep wired what the rows need, from the first step on that finds anything to do."""
        if not self._wired:
            self._wired = True
            drafting = getattr(self._lanes[0].speculation.draft, "engine", None)
            engines = [self.engine] if drafting is None else [self.engine, drafting]
            wired.hold(self, engines, self.kind, self.slots)

    def _rest(self) -> None:
        """Give back what only rows need, when none runs or waits."""
        if self._wired and not (self._running or self._queue.busy):
            self._wired = False
            wired.release(self)
            give_back()

    @device_work
    def close(self) -> None:
        """Drop all requests and wait for the device; the prefix cache gets what was run."""
        self._events.clear()
        self._queue.close()
        for lane in self._lanes:
            lane.close()
        mx.synchronize()
        self._rest()
