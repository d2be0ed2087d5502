"""Clients that are slow, silent or too many: what they get, and that others are served meanwhile.

`OPENELM_LOAD=1` runs the same tests with the numbers of a long run.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from listening import (
    JSON,
    LIMIT,
    ask,
    connect,
    ended,
    head,
    listening,
    post,
    read_answer,
)
from serving import wait_for

from openelm_mlx.server import protocol
from openelm_mlx.server.guard import Guard
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.protocol import MOST_HEAD, Connections, most_connections

LONG = bool(os.environ.get("OPENELM_LOAD"))
BLOCK = b"x" * 65_536
SOON = 0.1  # seconds a client is given here


class Stream:
    """Answers /endless with blocks until the client has left, everything else at once."""

    def __init__(self) -> None:
        self.left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while scope["path"] == "/endless" and not gone.done():
            await send({"type": "http.response.body", "body": BLOCK, "more_body": True})
            await asyncio.sleep(0)
        self.left += gone.done()
        gone.cancel()
        await send({"type": "http.response.body", "body": scope["path"].encode()})


class Served:
    def __init__(self) -> None:
        self.stream = Stream()
        self.shared = Connections(100, SOON, SOON, SOON)
        self.port = 0

    def others(self) -> None:
        """Check that another client is served."""
        assert ask(self.port, head(b"/other")).body == b"/other"


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    guard = Guard(made.stream, ServerOptions(max_body=1024, body_seconds=SOON))
    with listening(guard, made.shared) as made.port:
        yield made


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", b"GET / HT", head(b"/")[:-2] + b"X-A: "])
def test_a_head_that_does_not_come_ends_the_connection(served: Served, sent: bytes):
    with connect(served.port) as connection:
        connection.sendall(sent)
        served.others()
        if sent:
            answer = read_answer(connection)
            assert answer.status == 408 and answer.headers["connection"] == "close"
            assert answer.error["message"] == "the head did not arrive within 0.1 seconds"
        assert ended(connection)


def test_a_head_that_comes_a_byte_at_a_time_ends_too(served: Served):
    with connect(served.port) as connection, pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(b"G")
            served.others()


def test_a_second_head_has_the_same_time_and_nothing_before_it_counts(served: Served):
    for start in (b"\r\n", b"GET"):
        with connect(served.port) as connection:
            connection.sendall(head(b"/first"))
            assert read_answer(connection).body == b"/first"
            time.sleep(1.5 * SOON)  # between requests a client may take its time
            connection.sendall(head(b"/second"))
            assert read_answer(connection).body == b"/second"
            connection.sendall(start)
            assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_late_head_does_not_cut_the_answer_before_it(served: Served):
    with connect(served.port) as connection:
        connection.sendall(head(b"/endless") + b"GET")
        read, until = 0, time.monotonic() + 3 * SOON
        while time.monotonic() < until:
            read += len(connection.recv(1_000_000))
        assert read > len(BLOCK)
        assert connection.recv(1)
    for complete in (head(b"/first"), head(b"/first") + head(b"/second")):
        with connect(served.port) as connection:
            connection.sendall(complete + b"GET")
            answers = b""
            while data := connection.recv(1_000_000):
                answers += data
            assert answers.count(b"HTTP/1.1 200") == complete.count(b"GET")
            assert answers.count(b"HTTP/1.1 408") == 1


@pytest.mark.parametrize("parts", [1, 40])
def test_a_large_head_is_refused(served: Served, parts: int):
    request = head(b"/", more=b"X-A: " + b"a" * MOST_HEAD + b"\r\n")
    with connect(served.port) as connection:
        size = len(request) // parts + 1
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
        answer = read_answer(connection)
        assert answer.status == 431 and "more than 32,768 bytes" in answer.error["message"]
        assert ended(connection)
    with connect(served.port) as connection:  # it is refused before it ends, if it ever does
        for part in (request[:-2], b"X-B: ", b"b" * MOST_HEAD):
            connection.sendall(part)
            served.others()
        assert read_answer(connection).status == 431
    long = b"a" * MOST_HEAD
    for large in (head(b"/" + long), head(b"/", more=long + b": 1\r\n")):
        assert ask(served.port, large).status == 431
    fits = head(b"/", more=b"X-A: " + b"a" * (MOST_HEAD - 100) + b"\r\n")
    assert ask(served.port, fits).status == 200


def test_requests_that_follow_a_large_body_are_not_taken_for_a_head(served: Served):
    served.shared.header_seconds = LIMIT
    body = post(b"/", b" " * 1000)
    with connect(served.port) as connection:
        connection.sendall(body * 60 + body[:10])
        answers = b""
        while answers.count(b"\r\n0\r\n\r\n") < 60:
            answers += connection.recv(1_000_000)
        assert answers.count(b"HTTP/1.1 200 OK") == 60
        connection.sendall(body[10:])
        assert read_answer(connection).status == 200


def test_what_is_not_http_is_refused(served: Served):
    for nonsense in (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        head(b"/", more=JSON + b"Transfer-Encoding: chunked\r\n", method=b"POST") + b"no number",
    ):
        with connect(served.port) as connection:
            connection.sendall(nonsense)
            answer = read_answer(connection)
            assert answer.status == 400 and answer.error["code"] == "invalid_http"
            assert answer.headers["x-content-type-options"] == "nosniff" and ended(connection)


@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_not_http_does_not_come_into_an_answer(served: Served, guarded: bool):
    """It follows an answer that is under way, or is in the body that this one did not wait for."""
    body = head(b"/endless", more=JSON + b"Transfer-Encoding: chunked\r\n", method=b"POST")
    with ExitStack() as stack:
        port = served.port if guarded else stack.enter_context(listening(Stream(), served.shared))
        connection = stack.enter_context(connect(port))
        connection.sendall(head(b"/endless") if guarded else body + b"1\r\nx\r\n")
        answer = connection.recv(1000)
        connection.sendall(body + b"no number" if guarded else b"no number")
        with suppress(ConnectionResetError):
            while data := connection.recv(1_000_000):
                answer += data
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_an_offer_of_another_protocol_is_answered_in_this_one(served: Served):
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    )
    with connect(served.port) as connection:
        for more in (offer, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"):
            connection.sendall(post(b"/plain", b"{}", JSON + more))
            assert read_answer(connection).body == b"/plain"


def test_a_client_of_http_1_0_gets_no_chunks(served: Served):
    """They would be part of the body; the connection ends with it."""
    for method, length in ((b"GET", 6), (b"HEAD", 0)):
        with connect(served.port) as connection, connection.makefile("rb") as answer:
            connection.sendall(head(b"/plain", method=method).replace(b"HTTP/1.1", b"HTTP/1.0"))
            start, body = answer.read().lower().split(b"\r\n\r\n")
            assert body == b"/plain"[:length]
            assert b"connection: close" in start and b"transfer-encoding" not in start


def test_the_rest_of_a_refused_body_has_a_time_limit(served: Served):
    with connect(served.port) as connection:
        connection.sendall(head(b"/", more=JSON + b"Content-Length: 9999\r\n", method=b"POST"))
        assert read_answer(connection).status == 413
        connection.sendall(b" " * 5000)
        assert ended(connection)


def test_a_connection_is_idle_after_a_body_that_nobody_wanted(served: Served, monkeypatch):
    request, served.shared.body_seconds = post(b"/", b" " * 2000), 30.0
    with connect(served.port) as connection:
        connection.sendall(request[:-1])
        assert read_answer(connection).status == 413
        connection.sendall(request[-1:])
        until = time.monotonic() + LIMIT
        while connection.getsockname() not in {one.client for one in list(served.shared.idle)}:
            assert time.monotonic() < until
        connection.sendall(head(b"/again"))
        assert read_answer(connection).body == b"/again"
        monkeypatch.setattr(protocol, "IDLE_SECONDS", SOON)
        connection.sendall(request[:-1])
        assert read_answer(connection).status == 413
        connection.sendall(request[-1:])
        assert ended(connection)


def test_an_idle_connection_is_closed_after_a_while(served: Served):
    with (
        listening(served.stream, served.shared, timeout_keep_alive=SOON) as port,
        connect(port) as connection,
    ):
        connection.sendall(head(b"/once"))
        assert read_answer(connection).body == b"/once"
        assert ended(connection)


def test_a_client_that_stops_reading_is_dropped(served: Served):
    slow = 50 if LONG else 5
    with ExitStack() as stack:
        for _ in range(slow):
            connection = stack.enter_context(connect(served.port))
            connection.sendall(head(b"/endless"))
        until = time.monotonic() + LIMIT
        while served.stream.left < slow and time.monotonic() < until:
            served.others()
        assert served.stream.left == slow


def test_a_client_that_leaves_amid_several_requests_is_noticed(served: Served, caplog):
    with connect(served.port) as connection:
        connection.sendall(head(b"/endless") + head(b"/next") * 3)
        assert connection.recv(1)
    wait_for(lambda: served.stream.left)
    assert served.stream.left == 1 and caplog.messages == []


def test_a_client_that_reads_slowly_is_not_dropped(served: Served, monkeypatch):
    monkeypatch.setattr(protocol, "UNSENT", 4096)
    served.shared.write_seconds = 5 * SOON
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(LIMIT)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(head(b"/endless"))
        read = 0
        while read < len(BLOCK):  # this takes several times as long as a client may read nothing
            read += len(connection.recv(500))
            time.sleep(0.01)
        served.others()
        assert served.stream.left == 0


def test_idle_connections_make_room_and_the_oldest_goes_first(served: Served):
    served.shared.most, served.shared.header_seconds = 20, 30.0
    count = 1000 if LONG else 100
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(served.port)) for _ in range(count)]
        served.others()
        assert ended(idle[0]) and ended(idle[count - 22])
        idle[-1].sendall(head(b"/youngest"))
        assert read_answer(idle[-1]).body == b"/youngest"


def test_a_thousand_idle_connections_are_kept_while_others_are_served(served: Served):
    served.shared.most, served.shared.header_seconds = 2000, 30.0
    count = 1000 if LONG else 200
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * count + 100:
        most_connections()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(served.port)) for _ in range(count)]
        served.others()
        for number, connection in enumerate(idle):
            connection.sendall(head(b"/%d" % number))
        for number, connection in enumerate(idle):
            assert read_answer(connection).body == b"/%d" % number


def test_where_every_connection_is_busy_health_is_answered(served: Served, monkeypatch):
    served.shared.most = 3
    served.shared.header_seconds = served.shared.write_seconds = 30.0
    with ExitStack() as stack:
        for _ in range(3):
            busy = stack.enter_context(connect(served.port))
            busy.sendall(head(b"/endless"))
            assert busy.recv(12) == b"HTTP/1.1 200"
        answer = ask(served.port, head(b"/v1/models"))
        assert answer.status == 503 and answer.error["code"] == "too_many_connections"
        assert answer.headers["retry-after"] == "1"
        assert ask(served.port, head(b"/health")).status == 200
        monkeypatch.setattr(protocol, "RESERVE", 0)
        with connect(served.port) as connection:
            assert ended(connection)


def test_connections_that_have_ended_do_not_count(served: Served):
    for _ in range(3):
        served.others()
    busy = connect(served.port)
    busy.sendall(head(b"/endless"))
    assert busy.recv(1)
    busy.close()
    until = time.monotonic() + LIMIT
    while served.shared.count or served.shared.idle:
        assert time.monotonic() < until


def test_the_limit_of_open_files_is_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        most = most_connections()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft == (10_240 if hard < 0 else min(hard, 10_240))
        if hard < 0 or hard > 11_000:
            resource.setrlimit(resource.RLIMIT_NOFILE, (11_000, hard))
            assert most_connections() > most
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert most == max(soft - protocol.RESERVE - protocol.SPARE_FILES, 16) < soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
