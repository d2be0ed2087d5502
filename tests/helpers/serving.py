"""A real server on a free port, in a thread of the tests' process."""

from __future__ import annotations

import asyncio
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
def serving(
    *names: str | Path,
    loading: ModelOptions | None = None,
    running: EngineOptions | None = None,
    **options: Any,
) -> Iterator[str]:
    """Serve these models, ready to answer, and return the address; `options` are the server's."""
    import uvicorn

    from openelm_mlx.server.api import build_app

    given = replace(ServerOptions(port=0), **options)
    app = build_app([str(name) for name in names], given, loading, running)
    config = uvicorn.Config(app, http="httptools", loop="asyncio", log_level="warning")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True
    )
    thread.start()
    try:
        wait_until_ready(address)
        yield address
    finally:
        server.should_exit = True
        thread.join(SECONDS)


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
