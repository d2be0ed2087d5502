"""A quiet line at the foot of a terminal while requests run: how many, how fast, what waits.

The event loop says what the line is, a thread of its own draws it, since a terminal may take
nothing for a while. What is written to stderr meanwhile appears above the line as it is.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

if TYPE_CHECKING:
    from fastapi import FastAPI

PAUSE = 0.25  # seconds between two looks at what runs
WINDOW = 8  # pauses over which the rate is taken
LAST_SECONDS = 1.0  # for the line to be wiped
WIPE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Foot:
    """Stands in for a terminal's stream, and keeps a line below all that is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.console = stream, Console(file=stream, highlight=False)
        self.line = ""
        self._drawn = False
        self._free = True  # the cursor is where a line begins
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text above the line."""
        with self._lock:
            self._wipe()
            self.stream.write(text)
            self._free = text.endswith("\n") if text else self._free
            self._draw()
        return len(text)

    def show(self, line: str) -> None:
        """Let the line be this one; "" is none."""
        with self._lock:
            if line != self.line:
                self.line = line
                self._wipe()
                self._draw()

    def _wipe(self) -> None:
        if self._drawn:
            self.console.control(WIPE)
            self._drawn = False

    def _draw(self) -> None:
        """Draw the line, unless another one is being written."""
        if self.line and self._free:
            text = Text(self.line, style="dim")
            text.truncate(self.console.width - 1, overflow="ellipsis")
            self.console.print(text, end="")
            self.stream.flush()
            self._drawn = True


class Live:
    """Follows what a server does, from the first request to the last that runs."""

    def __init__(self, app: FastAPI, foot: Foot) -> None:
        self.state, self.foot = app.state, foot
        self._line, self._closed = "", False
        self._task: asyncio.Task[None] | None = None
        self._bell = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="openelm-live", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Follow what runs, on the event loop, until nothing does."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def close(self) -> None:
        """Wipe the line."""
        self._closed = True
        self._bell.set()
        self._thread.join(LAST_SECONDS)

    async def _follow(self) -> None:
        seen = deque([(time.monotonic(), self.state.metrics.generated)], WINDOW + 1)
        while True:
            await asyncio.sleep(PAUSE)
            if not self.state.worker.tickets:
                break
            seen.append((time.monotonic(), self.state.metrics.generated))
            (begun, before), (now, tokens) = seen[0], seen[-1]
            self._say(self.line((tokens - before) / (now - begun)))
        self._task = None
        self._say("")

    def line(self, rate: float) -> str:
        """Return the line; `rate` is in tokens per second."""
        worker, cache = self.state.worker, self.state.models.cache
        parts = [f"{worker.active} running"]
        if worker.waiting:
            parts.append(f"{worker.waiting} waiting")
        parts.append(f"{rate:,.0f} tokens/s")
        parts.append(f"cache {cache.nbytes / 1e6:,.1f} MB")
        return " · ".join(parts)

    def _say(self, line: str) -> None:
        self._line = line
        self._bell.set()

    def _draw(self) -> None:
        with suppress(OSError, ValueError):  # the terminal has gone
            while not self._closed:
                self._bell.wait()
                self._bell.clear()
                self.foot.show(self._line)
            self.foot.show("")


@contextmanager
def live_line(app: FastAPI) -> Iterator[None]:
    """Show the line of a server on stderr meanwhile; nothing if that is no terminal."""
    stream = sys.stderr
    foot = Foot(stream)
    if not stream.isatty() or foot.console.is_dumb_terminal:
        yield
        return
    live = Live(app, foot)
    app.state.metrics.wake = live.wake
    sys.stderr = foot  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stream
        live.close()
