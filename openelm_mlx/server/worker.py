"""The worker: the device's thread steps all batches; the event loop gets the events of a step.

The event loop never computes and the device's thread never writes to a client. Each turn of that
thread runs what was asked for between two steps, steps every batch that is busy, and hands all new
events to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any, TypeVar

from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.request import Event
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.engine.threads import device
from openelm_mlx.server.errors import ApiError

T = TypeVar("T")
Sink = Callable[[list[Event] | Exception], None]
TOGETHER, TOGETHER_AT_MOST = 0.0001, 0.05  # seconds
ROUNDS = 8  # of the event loop, in which a request that has arrived comes to the worker
PAUSE = 0.0003  # seconds without the interpreter's lock, for a first token to be sent
log = logging.getLogger("openelm.serve")


@dataclass(eq=False)
class Ticket:
    """One request on its way: `sink` gets its events, or the error that ended it."""

    batch: BatchEngine
    tokens: list[int]
    sampling: SamplingOptions
    options: GenerationOptions
    owner: str
    sink: Sink
    # on the clock of the event loop: its time counts from here
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    number: int | None = None  # the batch's, from when the device's thread has submitted it
    started: bool = False  # its first token has come
    gone: bool = False  # cancelled, or ended
    timer: asyncio.TimerHandle | None = None  # ends it when its time is over


News = tuple[Ticket, list[Event] | Exception]


@dataclass
class Worker:
    """Runs requests of any number of batches on the device's thread.

    Its methods are called on the event loop that it was made on. A request may take `seconds` from
    its beginning to its last token.
    """

    seconds: float = 600.0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _calls: deque[Callable[[], None]] = field(default_factory=deque)  # for between two steps
    _running: dict[BatchEngine, dict[int, Ticket]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _awake: bool = False  # a turn is in line
    _beginning: asyncio.Task[None] | None = None  # the event loop keeps no reference to it
    _left: asyncio.Event = field(default_factory=asyncio.Event)  # rung when the last ticket ends
    tickets: set[Ticket] = field(default_factory=set)  # that have not ended

    @property
    def active(self) -> int:
        """The number of requests that have got their first token."""
        return sum(ticket.started for ticket in self.tickets)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for their first token, in the queue or in prefill."""
        return len(self.tickets) - self.active

    def load(self, batch: BatchEngine) -> int:
        """Return how many requests of a batch have not ended."""
        return sum(ticket.batch is batch for ticket in self.tickets)

    async def drain(self) -> None:
        """Wait until no request is left."""
        while self.tickets:
            self._left.clear()
            await self._left.wait()

    async def call(self, function: Callable[[], T]) -> T:
        """Return `function()`, run on the device's thread between two steps."""
        done: asyncio.Future[T] = self._loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def run() -> None:
            try:
                result, error = function(), None
            except Exception as caught:
                result, error = None, caught
            self._tell(settle, result, error)

        self._later(run)
        return await done

    def submit(self, ticket: Ticket) -> None:
        """Let a request be run; its sink gets an error that the engine has with it."""
        self.tickets.add(ticket)
        ticket.timer = self._loop.call_at(ticket.began + self.seconds, self._expire, ticket)
        self._later(lambda: self._submit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its sink is not called again, and its row is free at the next step."""
        if self._end(ticket):
            self._later(lambda: self._cancel(ticket))

    def end_all(self, error: Exception) -> None:
        """End every request with an error."""
        for ticket in list(self.tickets):
            self.cancel(ticket)
            ticket.sink(error)

    def _end(self, ticket: Ticket) -> bool:
        """Note that a request has ended; return False if it had before."""
        if ticket.gone:
            return False
        ticket.gone = True
        self.tickets.discard(ticket)
        if ticket.timer is not None:
            ticket.timer.cancel()
        if not self.tickets:
            self._left.set()
        return True

    def _expire(self, ticket: Ticket) -> None:
        """End a request whose time is over."""
        self.cancel(ticket)
        ticket.sink(self.late())

    def late(self) -> ApiError:
        """Return what a client is told whose request's time is over."""
        what = f"the answer was not complete after {self.seconds:g} seconds, the server's limit"
        return ApiError(504, f"{what}; ask for fewer tokens, or again later", code="timeout")

    def _later(self, call: Callable[[], None]) -> None:
        """Let the device's thread make a call before its next step."""
        self._calls.append(call)
        with self._lock:
            asleep, self._awake = not self._awake, True
        if asleep:
            self._beginning = self._loop.create_task(self._begin())

    async def _begin(self) -> None:
        """Take the first turn after a rest, once nothing has come for `TOGETHER` seconds.

        Requests that come together are prefilled together, and equal ones get equal times. The
        pause is one of the whole thread, so that a client beside it can go on sending.
        """
        known, last = 0, perf_counter() + TOGETHER_AT_MOST
        while known < len(self._calls) and perf_counter() < last:
            known = len(self._calls)
            sleep(TOGETHER)  # a timer of the event loop would take a millisecond or two
            for _ in range(ROUNDS):
                await asyncio.sleep(0)
        device.hand_over(self._turn)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the event loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _submit(self, ticket: Ticket) -> None:
        if ticket.gone:
            return
        batch, sampling, options = ticket.batch, ticket.sampling, ticket.options
        try:
            number = batch.submit(ticket.tokens, sampling, options, owner=ticket.owner)
        except Exception as error:
            self._tell(self._deliver, [(ticket, error)])
            return
        ticket.number = number
        self._running.setdefault(batch, {})[number] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.number is None:  # it never came so far
            return
        batch, number = ticket.batch, ticket.number
        if self._running.get(batch, {}).pop(number, None) is None:
            return
        try:
            batch.cancel(number)
        except Exception:
            self._tell(self._deliver, self._fail(batch))

    def forget(self, batch: BatchEngine) -> None:
        """Keep nothing of a batch without requests; the device's thread calls this."""
        self._running.pop(batch, None)

    def _turn(self) -> None:
        """Run the calls in line and one step of every busy batch; go on while anything is busy."""
        while self._calls:
            self._calls.popleft()()
        news: list[News] = []
        for batch in [batch for batch, tickets in self._running.items() if tickets]:
            news += self._step(batch)
        if news:
            self._tell(self._deliver, news)
            if any(not ticket.started for ticket, _ in news):
                sleep(PAUSE)
        with self._lock:
            self._awake = again = any(self._running.values()) or bool(self._calls)
        if again:
            device.hand_over(self._turn)

    def _step(self, batch: BatchEngine) -> list[News]:
        """Step a batch; return the events of each request, or the error that ended them all."""
        tickets, news = self._running[batch], dict[Ticket, list[Event]]()
        try:
            events = batch.step()
        except Exception:
            return self._fail(batch)
        for number, event in events:
            ticket = tickets.get(number)
            if ticket is not None:
                news.setdefault(ticket, []).append(event)
                if event.finish_reason is not None:
                    del tickets[number]
        return list(news.items())

    def _fail(self, batch: BatchEngine) -> list[News]:
        """End all requests of a batch that failed, and keep nothing that it has computed."""
        log.exception("a step of %s failed; its requests are ended", batch.engine.name)
        error = ApiError(500, "a step of the model failed; the log of the server says why")
        failed: list[News] = [(ticket, error) for ticket in self._running[batch].values()]
        self._running[batch].clear()
        try:
            batch.close()
        except Exception:
            log.exception("what was left of the step failed, too")
        if batch.prompt_cache is not None:
            batch.prompt_cache.clear()
        return failed

    def _deliver(self, news: list[News]) -> None:
        """Give each sink what is new for it, on the event loop."""
        for ticket, new in news:
            if not ticket.gone:
                ticket.started = True
                if isinstance(new, Exception) or new[-1].finish_reason is not None:
                    self._end(ticket)
                ticket.sink(new)
