"""HTTP connections with limits: uvicorn's protocol, which waits for a client as long as it likes.

A connection is closed if the head of a request is not complete in time, if a body that nobody wants
does not end, or if the client has stopped reading. There are at most `Connections.most` of them:
one more takes the place of the one that has been idle longest, and if none is idle, only `/health`
is answered on it.
"""

from __future__ import annotations

import asyncio
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from openelm_mlx.server.errors import RETRY, ApiError
from openelm_mlx.server.guard import USUAL

MOST_HEAD = 32_768  # bytes of a request's line and headers
IDLE_SECONDS = 75  # between requests; longer than a balancer keeps its own side open
WRITE_SECONDS = 30.0  # without a byte read by the client
UNSENT = 131_072  # bytes that the system holds for a client that does not read
RESERVE = 64  # connections beyond the limit, which only /health is answered on
SPARE_FILES = 128  # descriptors for models, the log and what libraries open


class Connections:
    """The limits that all connections share, and those that are idle, oldest first."""

    def __init__(
        self,
        most: int,
        header_seconds: float,
        body_seconds: float,
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        self.most, self.header_seconds = most, header_seconds
        self.body_seconds, self.write_seconds = body_seconds, write_seconds
        self.count = 0  # but those that are being closed
        self.idle: dict[Connection, None] = {}


class Connection(HttpToolsProtocol):
    """One connection of a client, which `shared` limits."""

    def __init__(self, shared: Connections, **how: Any) -> None:
        super().__init__(**how)
        self.shared, self.routes = shared, self.app
        self.head: int | None = 0  # bytes of a head that is not complete; None between heads
        self.begun = False  # by the data that is being read
        self.discounted = False
        self.unanswered: list[Any] = []  # requests of this connection, in uvicorn's words cycles
        self.patience: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, UNSENT)
        self.shared.count += 1
        if self.full and self.shared.idle:
            next(iter(self.shared.idle)).leave()
        self.rest()
        self.wait(self.shared.header_seconds, self.head_is_late)
        if self.shared.count > self.shared.most + RESERVE:
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.discount()
        self.wait(None)
        self.resume_writing()
        super().connection_lost(exc)  # which tells the latest request only
        for cycle in self.unanswered:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()
        self.unanswered.clear()

    @property
    def answering(self) -> bool:
        """True while a request of this connection has not been answered wholly."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def full(self) -> bool:
        """True while there are more connections than there should be."""
        return self.shared.count > self.shared.most

    def discount(self) -> None:
        """Count this connection no more: it is being closed, or was."""
        self.shared.idle.pop(self, None)
        self.shared.count -= not self.discounted
        self.discounted = True

    def rest(self) -> None:
        """Count this connection among the idle ones, as the youngest."""
        self.shared.idle[self] = None

    def wait(self, seconds: float | None, late: Any = None) -> None:
        """Call `late` unless the next thing happens within some seconds."""
        if self.patience is not None:
            self.patience.cancel()
        self.patience = None if seconds is None else self.loop.call_later(seconds, late)

    def leave(self) -> None:
        """Close the connection. What the client does not read is dropped after a while."""
        self.discount()
        self.transport.close()
        self.wait(self.shared.write_seconds, self.transport.abort)

    # the head of a request

    def data_received(self, data: bytes) -> None:
        if self.head is None and self in self.shared.idle:
            self.head = 0
            self.wait(self.shared.header_seconds, self.head_is_late)
        self.begun = False
        super().data_received(data)
        if self.head is not None and not self.begun and not self.transport.is_closing():
            self.head += len(data)
            if self.head > MOST_HEAD:
                self.refuse(head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head, self.begun = 1, True  # how much of the data is before it is not known

    def on_headers_complete(self) -> None:
        self.head = None
        self.wait(None)
        self.shared.idle.pop(self, None)
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self.app = self.routes
        if size > MOST_HEAD:
            self.app = refusing(head_too_large())
        elif self.full and self.url != b"/health":
            self.app = refusing(too_many())
        if self.parser.get_http_version() == "1.0":
            self.app = without_chunks(self.app)
        super().on_headers_complete()
        self.unanswered = [one for one in self.unanswered if not one.response_complete]
        self.unanswered.append(self.cycle)

    def head_is_late(self) -> None:
        """Close a connection whose head did not come, with a word if it had begun."""
        if self.head:
            what = f"the head did not arrive within {self.shared.header_seconds:g} seconds"
            self.refuse(ApiError(408, what, code="request_timeout"))
        else:
            self.leave()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; uvicorn calls this."""
        self.refuse(ApiError(400, "this is not a request in HTTP/1.1", code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request that offers another protocol is answered in this one."""

    def refuse(self, error: ApiError) -> None:
        """Answer what is no request, unless another one is being answered."""
        begun = self.answering and (self.pipeline or self.cycle.response_started)
        if self.answering and self.cycle.more_body and not begun:  # its body is what is wrong
            self.cycle.disconnected = self.cycle.response_complete = True
        if not self.answering:
            body, headers = encoded(error)
            lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        self.leave()

    # after the answer

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.leave()
        elif self.answering:  # the next request, which was there
            pass
        elif self.head is not None:  # part of the next request is there
            self.wait(self.shared.header_seconds, self.head_is_late)
        elif self.cycle.more_body:
            self.wait(self.shared.body_seconds, self.leave)  # the rest of a body nobody wants
        else:
            self.rest()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.answering:
            self.wait(IDLE_SECONDS, self.leave)
            self.rest()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self.leave()

    def timeout_keep_alive_handler(self) -> None:
        self.leave()

    # a client that stops reading

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def watch(self, before: int) -> None:
        """Drop a client that has read nothing since `before` bytes waited for it."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self.unread = self.loop.call_later(self.shared.write_seconds, self.watch, left)


def without_chunks(app: Any) -> Any:
    """Return `app` for a client of HTTP/1.0, to which chunks are part of the body.

    The end of the connection, which is closed after every such answer, ends a body of any length.
    """

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        cycle, endless = send.__self__, False  # uvicorn's

        async def sent(message: Any) -> None:
            nonlocal endless
            if message["type"] == "http.response.start":
                endless = all(name.lower() != b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = False if endless else None
            elif endless:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, sent)

    return plain


def refusing(error: ApiError) -> Any:
    """Return an application that answers with an error and ends the connection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, headers = encoded(error)
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def encoded(error: ApiError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return body and headers of the last answer on a connection."""
    body, headers = error.encoded(Connection="close")
    return body, [*USUAL, *headers]


def head_too_large() -> ApiError:
    what = f"the head of the request has more than {MOST_HEAD:,} bytes; send fewer headers"
    return ApiError(431, what, code="headers_too_large")


def too_many() -> ApiError:
    what = "as many connections as this server takes are busy; ask again"
    return ApiError(503, what, code="too_many_connections", headers=RETRY)


def most_connections() -> int:
    """Raise the limit of open files as far as is allowed, and return how many may be clients."""
    import resource

    wanted = 10_240  # macOS allows no more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    files = wanted if soft == resource.RLIM_INFINITY else soft
    return max(files - RESERVE - SPARE_FILES, 16)
