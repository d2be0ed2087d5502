"""A real server on a free port, in a thread of the tests' process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.server.options import ServerOptions

SECONDS = 60.0  # the longest wait for anything


@contextmanager
def serving(*names: str | Path, **options: Any) -> Iterator[str]:
    """Serve these models, ready to answer, and return the address; `options` are the server's."""
    with server_of(*names, **options) as (_, address):
        yield address


@contextmanager
def server_of(
    *names: str | Path,
    loading: ModelOptions | None = None,
    running: EngineOptions | None = None,
    **options: Any,
) -> Iterator[tuple[Any, str]]:
    """Serve these models, ready to answer, and give the `Server` and its address."""
    from openelm_mlx.server.run import make_server

    given = replace(ServerOptions(port=0), **options)
    how = loading or ModelOptions(), running or EngineOptions()
    server = make_server([str(name) for name in names], given, *how)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        wait_until_ready(address)
        yield server, address
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_until_ready(address: str) -> None:
    """Wait until the models of a server are loaded."""

    def ready() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{address}/health").status_code == 200
        return False

    wait_for(ready)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds. Raises `TimeoutError` after `SECONDS`."""
    bell, last = threading.Event(), time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > last:
            raise TimeoutError("what was waited for did not come")
        bell.wait(0.02)
