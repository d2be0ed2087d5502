"""A client of completion servers that costs little, as it shares the processor with the server.

While an answer comes it only notes when bytes arrived. They are parsed once all answers are there:
the time of an event is that of the bytes which complete it. It speaks to 127.0.0.1 alone, with one
connection for each request, which the server closes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

from openelm_mlx.errors import BenchmarkError

HOST = "127.0.0.1"
LIMIT = 120.0  # seconds until an answer must be complete
Event = dict[str, Any]


@dataclass
class Answer:
    """The bytes that a server sent, with their times by `time.perf_counter`."""

    start: float
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)

    @cached_property
    def parsed(self) -> tuple[int, list[tuple[float, bytes]]]:
        """The status, and the parts of the body with the times of their arrival.

        Raises `BenchmarkError` if this is not HTTP.
        """
        import httptools

        parts: list[tuple[float, bytes]] = []
        now = self.start

        class Body:
            def on_body(self, data: bytes) -> None:
                parts.append((now, data))

        parser = httptools.HttpResponseParser(Body())
        try:
            for now, data in self.arrivals:  # noqa: B007 - on_body notes it
                parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BenchmarkError(f"the server's answer is not HTTP: {error}") from None
        return (parser.get_status_code() if self.arrivals else 0), parts

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.parsed[1])

    @property
    def json(self) -> Any:
        """The body of an answer that is not streamed. Raises `BenchmarkError` for an error."""
        self.check()
        return json.loads(self.body)

    def check(self) -> None:
        if self.parsed[0] != 200:
            text = self.body.decode(errors="replace")[:300]
            raise BenchmarkError(f"the server answered with status {self.parsed[0]}: {text}")

    @cached_property
    def events(self) -> list[tuple[float, Event]]:
        """The server-sent events of JSON with their times. Raises `BenchmarkError`."""
        self.check()
        found = [(at, json.loads(data)) for at, data in self.lines() if data != b"[DONE]"]
        if errors := [event["error"] for _, event in found if "error" in event]:
            raise BenchmarkError(f"the server sent an error: {errors[0]}")
        if not found or not self.body.rstrip().endswith(b"data: [DONE]"):
            raise BenchmarkError("the server's answer ends without [DONE]")
        return found

    def lines(self) -> Iterator[tuple[float, bytes]]:
        rest = b""
        for at, data in self.parsed[1]:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    yield at, line[6:].rstrip(b"\r")

    @property
    def texts(self) -> list[tuple[float, str]]:
        """The pieces of text of the first choice, and when they came."""
        choices = [(at, event["choices"][0]) for at, event in self.events if event["choices"]]
        pieces = [(at, choice.get("text") or text_of(choice)) for at, choice in choices]
        return [(at, text) for at, text in pieces if text]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        return next(event["usage"] for _, event in reversed(self.events) if event.get("usage"))

    @property
    def tokens(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def first(self) -> float:
        """Seconds from the start until text came."""
        if not self.texts:
            raise BenchmarkError("the server's answer has no text")
        return self.texts[0][0] - self.start

    @property
    def end(self) -> float:
        return self.arrivals[-1][0]


def text_of(choice: Mapping[str, Any]) -> str:
    return (choice.get("delta") or {}).get("content") or ""


class Reader(asyncio.Protocol):
    """Notes what arrives on a connection until the server closes it."""

    def __init__(self) -> None:
        self.answer = Answer(perf_counter())
        self.closed = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.answer.arrivals.append((perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def request_bytes(path: str, body: Event | None = None) -> bytes:
    """Return an HTTP request: GET, or POST with a body of JSON."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {HOST}"]
    lines += ["Connection: close", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def ask(port: int, path: str, body: Event | None = None) -> Answer:
    """Send a request and return the answer; its time starts before the connection is made."""
    start = perf_counter()
    (answer,) = await ask_together(port, path, [body])
    answer.start = start
    return answer


async def ask_together(port: int, path: str, bodies: Sequence[Event | None]) -> list[Answer]:
    """Send requests at the same moment, once all are connected, and return their answers.

    Raises `BenchmarkError` if the server does not listen or an answer takes longer than `LIMIT`.
    """
    loop, readers = asyncio.get_running_loop(), list[Reader]()
    requests = [request_bytes(path, body) for body in bodies]
    try:
        async with asyncio.timeout(LIMIT):
            for _ in bodies:  # one by one, as mlx_lm.server's queue of connections is of 5
                readers.append((await loop.create_connection(Reader, HOST, port))[1])
            start = perf_counter()
            for reader, request in zip(readers, requests, strict=True):
                reader.answer.start = start
                reader.transport.write(request)
            await asyncio.gather(*(reader.closed for reader in readers))
    except TimeoutError:
        raise BenchmarkError(f"no complete answer within {LIMIT:g} seconds") from None
    except OSError as error:
        raise BenchmarkError(f"cannot reach a server on port {port}: {error}") from None
    finally:
        for reader in readers:
            reader.transport.abort()
    return [reader.answer for reader in readers]
