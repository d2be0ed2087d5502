"""Starts the server, and ends it: what runs is answered to the end, what comes later is told so.

The first signal closes the guard: every new request gets 503, at `/health` too, so that a balancer
turns elsewhere, while the socket stays open. When all requests have ended, or `grace` is over, the
rest gets an error at the end of what it has, and the process ends with status 0. A second signal
ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn

from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.server.api import build_app
from openelm_mlx.server.errors import ApiError
from openelm_mlx.server.guard import Guard
from openelm_mlx.server.live import live_line
from openelm_mlx.server.log import Logged, log, logging_to_stderr
from openelm_mlx.server.metrics import Metered
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.protocol import IDLE_SECONDS, Connection, Connections, most_connections

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048  # connections that the system accepts before this process does
TICK = 0.02  # seconds between two looks at what still runs
LAST_SECONDS = 2  # for answers that were ended to reach their clients


class Server(uvicorn.Server):
    """uvicorn with an end of its own."""

    def __init__(self, config: uvicorn.Config, app: Any, guard: Guard, grace: float) -> None:
        super().__init__(config)
        self.app, self.guard, self.grace = app, guard, grace
        self.ending: asyncio.Task[None] | None = None
        self.failed: BaseException | None = None  # what kept a model from being loaded
        self.ready: Callable[[], None] = lambda: None  # called when all models are loaded

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals. uvicorn would raise them once more at the end."""
        self.loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.loop.add_signal_handler(number, self.end, number)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.app.state.loading.add_done_callback(self.loaded)

    def loaded(self, loading: asyncio.Task[None]) -> None:
        """Say that every request is answered now, or end because a model cannot be had."""
        if loading.cancelled():
            return
        self.failed = loading.exception()
        if self.failed is None:
            self.ready()
        else:
            self.should_exit = True

    def end(self, number: int) -> None:
        """End after what runs; at once if this is not the first signal."""
        if self.ending is not None:
            os._exit(128 + number)
        self.guard.closing = True
        if self.guard.running:
            what = f"ending after what runs ({self.guard.running}), within {self.grace:g} seconds"
            log.info(f"{what}; a second signal ends at once")
        self.ending = self.loop.create_task(self.drain())

    async def drain(self) -> None:
        """Wait for what runs, end what is left, and stop."""
        if not await self.quiet(self.grace):
            over = ApiError(503, "the server has ended; ask again", code="shutting_down")
            self.app.state.worker.end_all(over)
            if not await self.quiet(LAST_SECONDS):
                for connection in self.connections:
                    connection.transport.abort()
        self.should_exit = True

    async def quiet(self, seconds: float) -> bool:
        """Wait until all that was answered has been sent; return False if it takes longer."""
        until = self.loop.time() + seconds
        while self.guard.running or any(map(unsent, self.connections)):
            if self.loop.time() >= until:
                return False
            await asyncio.sleep(TICK)
        return True

    @property
    def connections(self) -> list[Any]:
        return list(self.server_state.connections)


def unsent(connection: Any) -> int:
    """Return how many bytes a client has not taken yet."""
    return int(connection.transport.get_write_buffer_size())


def make_server(
    names: Sequence[str],
    options: ServerOptions,
    loading: ModelOptions,
    running: EngineOptions,
) -> Server:
    """Return a server of the models `names`, which loads them when it starts.

    Raises `OptionError` for a file of keys that cannot be used.
    """
    app = build_app(names, options, loading, running)
    guard = Guard(app, options)
    limits = Connections(most_connections(), options.header_seconds, options.body_seconds)
    http: Any = partial(Connection, limits)
    config = uvicorn.Config(
        Logged(Metered(guard, app, app.state.metrics), options.log_text),
        http=http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return Server(config, app, guard, options.grace)


def serve(
    names: Sequence[str],
    options: ServerOptions,
    loading: ModelOptions,
    running: EngineOptions,
) -> int:
    """Serve the models `names` until a signal ends it; return the exit status.

    Raises an `OpenELMError` before a model is loaded if the address cannot be had, and if a model
    cannot be loaded.
    """
    server = make_server(names, options, loading, running)
    with listen(options.host, options.port) as listener:
        address = f"http://{shown_host(options.host)}:{listener.getsockname()[1]}"
        server.ready = partial(announce, f"openelm serve: {address}  (page, API at /v1)")
        with live_line(server.app), logging_to_stderr() as writer:
            server.run([listener])
    if server.failed is not None:
        raise server.failed
    if writer.is_alive() or server.app.state.loading.cancelled():
        os._exit(0)  # a download, or a terminal that takes nothing, would hold up the end
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `OptionError`."""
    try:
        found = {entry[0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        family = socket.AF_INET if socket.AF_INET in found else socket.AF_INET6
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        raise OptionError(why_not(host, port, error)) from None


def why_not(host: str, port: int, error: OSError) -> str:
    """Return why an address cannot be listened on, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; give another --port, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the system; give a --port from 1024 up"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"host {host!r} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all"
    return f"cannot listen on {host}, port {port}: {error.strerror or error}"


def shown_host(host: str) -> str:
    """Return a host as a URL has it."""
    return f"[{host}]" if ":" in host else host


def announce(line: str) -> None:
    """Print a line at once; nobody may be there to read it."""
    with suppress(OSError, ValueError):
        print(line, flush=True)
