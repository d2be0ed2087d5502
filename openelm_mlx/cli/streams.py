"""Standard input as UTF-8, output that fails on no character, and a sign of life while waiting."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any, TextIO

from openelm_mlx.errors import PromptError

PATIENCE_SECONDS = 0.5  # a wait shorter than this needs no sign


def utf8_stdin() -> TextIO:
    """Return standard input, read as UTF-8 whatever the locale says.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer refuses with one line that
    names the place. Raises `PromptError` where stdin is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("standard input is closed; give the text on the command line")
    reconfigure: Any = getattr(
        sys.stdin, "reconfigure", None
    )  # a stand-in such as StringIO has none
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def without_line_end(text: str) -> str:
    """Remove one line break from the end of a text, be it that of Unix or of Windows."""
    return text[: -len("\n")].removesuffix("\r") if text.endswith("\n") else text


def all_characters(stream: TextIO) -> None:
    """Let `stream` write every text: what its encoding lacks becomes a question mark."""
    reconfigure: Any = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def printable(text: str) -> str:
    """Replace the lone surrogates in a text, which no stream can write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def moves_cursor(stream: TextIO | None) -> bool:
    """Tell whether `stream` is a terminal that knows the usual escape sequences."""
    return (
        stream is not None and stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    )


def columns(stream: TextIO) -> int:
    """Return the width of the terminal now.

    COLUMNS, which shutil prefers, does not follow a resized window.
    """
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Waiting:
    """Shows a line on a terminal's stderr that says what is going on.

        with Waiting("loading 3b"): ...

    It appears after half a second and goes with the wait. The cursor rests at its start, so that
    whatever else is written there takes its place.
    """

    def __init__(self, text: str) -> None:
        self.text, self.shown, self.over = text, False, False
        self.lock = threading.Lock()  # the timer has a thread of its own
        self.timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self.timer.daemon = True

    def __enter__(self) -> Waiting:
        if moves_cursor(sys.stderr):
            self.timer.start()
        return self

    def say(self, text: str) -> None:
        """Change what the line says."""
        with self.lock:
            self.text = text
            if self.shown:
                self._write()

    def progress(self, done: int, total: int) -> None:
        """Say how many tokens of a prompt are prefilled, as `stream_generate(progress=)` asks."""
        self.say(f"reading the prompt: {done} of {total} tokens")

    def end(self) -> None:
        """Take the line away; further calls change nothing."""
        self.timer.cancel()
        with self.lock:
            if self.shown and not self.over:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.over = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _show(self) -> None:
        with self.lock:
            if not self.over:
                self.shown = True
                self._write()

    def _write(self) -> None:
        if not self.over:
            line = printable(f"{self.text} ...")[: columns(sys.stderr) - 1]
            print(f"\r\x1b[K{line}\r", end="", file=sys.stderr, flush=True)
