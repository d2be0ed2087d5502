"""A real server on a free port, in a thread of the tests' process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    bell = threading.Event()
    for _ in range(int(SECONDS / 0.02)):
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        bell.wait(0.02)
    raise TimeoutError(f"{address} is not ready")
