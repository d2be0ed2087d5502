"""Starts the server, and ends it."""

from __future__ import annotations

from collections.abc import Sequence

import uvicorn

from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.server.api import build_app
from openelm_mlx.server.options import ServerOptions


def serve(
    names: Sequence[str],
    options: ServerOptions,
    loading: ModelOptions | None = None,
    running: EngineOptions | None = None,
) -> int:
    """Serve the models `names` until a signal ends it; return the exit status."""
    app = build_app(names, options, loading, running)
    config = uvicorn.Config(
        app, options.host, options.port, loop="uvloop", http="httptools", access_log=False
    )
    uvicorn.Server(config).run()
    return 0
