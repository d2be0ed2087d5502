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
from typing import Any, TypeVar

from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.request import Event
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.engine.threads import device

T = TypeVar("T")
Sink = Callable[[list[Event] | Exception], None]
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
    number: int | None = None  # the batch's, from when the device's thread has submitted it
    gone: bool = False  # cancelled, or ended


@dataclass
class Worker:
    """Runs requests of any number of batches on the device's thread.

    Its methods are called on the event loop that it was made on.
    """

    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _calls: deque[Callable[[], None]] = field(default_factory=deque)  # for between two steps
    _running: dict[BatchEngine, dict[int, Ticket]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _awake: bool = False  # a turn is in line
    tickets: set[Ticket] = field(default_factory=set)  # that have not ended

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
        self._later(lambda: self._submit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its sink is not called again, and its row is free at the next step."""
        if ticket in self.tickets:
            self.tickets.discard(ticket)
            ticket.gone = True
            self._later(lambda: self._cancel(ticket))

    def _later(self, call: Callable[[], None]) -> None:
        """Let the device's thread make a call before its next step."""
        self._calls.append(call)
        with self._lock:
            asleep, self._awake = not self._awake, True
        if asleep:
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
        if self._running[ticket.batch].pop(ticket.number, None) is not None:
            ticket.batch.cancel(ticket.number)

    def _turn(self) -> None:
        """Run the calls in line and one step of every busy batch; go on while anything is busy."""
        while self._calls:
            self._calls.popleft()()
        news: list[tuple[Ticket, list[Event] | Exception]] = []
        for batch in [batch for batch in self._running if batch.busy]:
            news += self._step(batch)
        if news:
            self._tell(self._deliver, news)
        with self._lock:
            busy = any(batch.busy for batch in self._running)
            self._awake = again = busy or bool(self._calls)
        if again:
            device.hand_over(self._turn)

    def _step(self, batch: BatchEngine) -> list[tuple[Ticket, list[Event] | Exception]]:
        """Step a batch; return the events of each request, or the error that ended them all."""
        tickets, news = self._running[batch], dict[Ticket, list[Event]]()
        try:
            events = batch.step()
        except Exception as error:
            log.exception("a step failed; its requests are ended")
            failed: list[tuple[Ticket, list[Event] | Exception]] = [
                (ticket, error) for ticket in tickets.values()
            ]
            tickets.clear()
            batch.close()
            return failed
        for number, event in events:
            ticket = tickets.get(number)
            if ticket is not None:
                news.setdefault(ticket, []).append(event)
                if event.finish_reason is not None:
                    del tickets[number]
        return list(news.items())

    def _deliver(self, news: list[tuple[Ticket, list[Event] | Exception]]) -> None:
        """Give each sink what is new for it, on the event loop."""
        for ticket, new in news:
            if not ticket.gone:
                if isinstance(new, Exception) or new[-1].finish_reason is not None:
                    ticket.gone = True
                    self.tickets.discard(ticket)
                ticket.sink(new)
