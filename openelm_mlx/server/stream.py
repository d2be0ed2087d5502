"""An answer on its way to the client: server-sent events, and a client that leaves."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from typing import Any

from openelm_mlx.engine.request import Event
from openelm_mlx.server.answers import Answer
from openelm_mlx.server.errors import api_error
from openelm_mlx.server.worker import Ticket, Worker

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]
HEADERS_AFTER = 0.1  # seconds that headers wait for a first token


class Inbox:
    """The events that come for the choices of one answer, or an error.

    `patience` is how many seconds a reader waits for it.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._items: list[tuple[int, list[Event]]] = []
        self._error: Exception | None = None
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._latest = self._loop.time()
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, index: int, new: list[Event] | Exception) -> None:
        """Add what the worker has for a choice."""
        if isinstance(new, Exception):
            self._error = new
        else:
            self._items.append((index, new))
        self._wake()

    def leave(self) -> None:
        """Note that the client has left."""
        self._left = True
        self._wake()

    def check(self) -> None:
        """Raise the error that ended the request, once what came before it has been taken."""
        if self._error is not None and not self._items:
            raise self._error

    def close(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        self._latest = self._loop.time()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _look(self) -> None:
        """Wake the reader if it has waited for too long: one timer serves all events."""
        if self._loop.time() >= self._latest + self.patience:
            self._wake()
        self._timer = self._loop.call_at(self._latest + self.patience, self._look)

    @property
    def _news(self) -> bool:
        return bool(self._items) or self._error is not None or self._left

    async def _wait(self) -> None:
        if not self._news:
            self._reader = self._loop.create_future()
            await self._reader

    async def filled(self, seconds: float) -> bool:
        """Wait for anything that ends `get`; return False if nothing came within the seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wait()
        return self._news

    async def get(self) -> list[tuple[int, list[Event]]]:
        """Wait for events and return all there are; nothing if none came for too long.

        Raises the error that ended the request, and `ClientLeft`.
        """
        if self._timer is None:
            self._look()
        await self._wait()
        if self._left:
            raise ClientLeft
        self.check()
        items, self._items = self._items, []
        return items


class ClientLeft(Exception):
    """The client has closed its connection."""


class Exchange:
    """Tickets of one answer, and the inbox that they fill."""

    def __init__(self, worker: Worker, answer: Answer, keep_alive: float) -> None:
        self.worker, self.answer = worker, answer
        self.inbox, self.tickets = Inbox(keep_alive), list[Ticket]()

    def start(self, tickets: list[Ticket], ending: ExitStack, receive: Any) -> None:
        """Submit the requests, one for each choice; `ending` is closed when the answer ends."""
        self.tickets, self.ending = tickets, ending
        self.watcher = asyncio.ensure_future(self.watch(receive))
        for ticket in tickets:
            self.worker.submit(ticket)

    async def accepted(self) -> None:
        """Wait for the first events, but not long: then until the engine has taken the requests.

        Raises the error that it has with them, which then is one of the response, not of a stream.
        To send the headers at once would take time from a short prefill.
        """
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.inbox.patience):
                    if self.tickets and not await self.inbox.filled(HEADERS_AFTER):
                        await self.worker.call(lambda: None)  # calls are made in their order
            self.inbox.check()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End what still runs."""
        self.watcher.cancel()
        self.inbox.close()
        for ticket in self.tickets:
            self.worker.cancel(ticket)
        self.ending.close()

    async def watch(self, receive: Any) -> None:
        """Wait until the client has left."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.inbox.leave()

    async def whole(self) -> dict[str, Any] | None:
        """Wait for the whole answer; None if the client has left."""
        try:
            while not self.answer.done:
                for index, events in await self.inbox.get():
                    for event in events:
                        self.answer.take(index, event)
            return self.answer.whole()
        except ClientLeft:
            return None
        finally:
            self.stop()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the answer as server-sent events; this is the ASGI application of a response."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send(body_of(self.answer.opening()))
            while not self.answer.done:
                items = await self.inbox.get()
                frames = [
                    frame
                    for index, events in items
                    for event in events
                    if (frame := self._frame(index, event)) is not None
                ]
                if frames or not items:
                    await send(body_of(frames) if frames else KEEP_ALIVE)
            await send(body_of(self.answer.closing(), more=False))
        except ClientLeft:
            pass
        except Exception as error:
            scope.setdefault("state", {})["error"] = error
            await send(body_of([self.answer.failure(api_error(error))], more=False))
        finally:
            self.stop()

    def _frame(self, index: int, event: Event) -> str | None:
        self.answer.take(index, event)
        return self.answer.chunk(index, event)


KEEP_ALIVE = {"type": "http.response.body", "body": b": still working\n\n", "more_body": True}


def body_of(frames: list[str], more: bool = True) -> dict[str, Any]:
    """Return the ASGI message that sends these server-sent events."""
    return {"type": "http.response.body", "body": "".join(frames).encode(), "more_body": more}
