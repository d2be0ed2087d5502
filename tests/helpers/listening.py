"""An ASGI application on a port of this machine, served by uvicorn in a thread; raw requests."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

LIMIT = 10  # seconds after which a test gives up
JSON = b"Content-Type: application/json\r\n"


class Answer(NamedTuple):
    """An answer: status, headers by name in lower case, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The inside of OpenAI's envelope."""
        assert self.headers["content-type"] == "application/json"
        found = json.loads(self.body)
        assert list(found) == ["error"]
        assert list(found["error"]) == ["message", "type", "param", "code"]
        return found["error"]


@contextmanager
def listening(app: Any, shared: Any = None, **how: Any) -> Iterator[int]:
    """Serve `app`, with the limits `shared` of connections, and give the port."""
    import uvicorn

    from openelm_mlx.server.protocol import Connection, Connections

    http: Any = partial(Connection, shared or Connections(100, 5.0, 5.0))
    config = uvicorn.Config(
        app, http=http, ws="none", lifespan="off", log_config=None, access_log=False, **how
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(LIMIT)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), LIMIT)


def head(path: bytes, port: int = 80, more: bytes = b"", method: bytes = b"GET") -> bytes:
    """Return the head of a request to localhost."""
    return method + b" " + path + b" HTTP/1.1\r\nHost: localhost:%d\r\n" % port + more + b"\r\n"


def post(path: bytes, body: bytes, more: bytes = JSON) -> bytes:
    return head(path, more=more + b"Content-Length: %d\r\n" % len(body), method=b"POST") + body


def read_answer(connection: socket.socket, method: bytes = b"GET") -> Answer:
    """Read one answer. Raises `ConnectionError` if the connection ends before it."""
    from http.client import HTTPResponse, RemoteDisconnected

    response = HTTPResponse(connection, method=method.decode())
    try:
        response.begin()
    except RemoteDisconnected as error:
        raise ConnectionError("closed") from error
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    response.close()
    return Answer(response.status, headers, body)


def ask(port: int, request: bytes) -> Answer:
    """Send one request on a connection of its own and return the answer."""
    with connect(port) as connection:
        connection.sendall(request)
        return read_answer(connection, request.split(b" ", 1)[0])


def ended(connection: socket.socket) -> bool:
    """Wait until the server closes a connection that has nothing to say."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
