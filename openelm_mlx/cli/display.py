"""Shows an answer on stdout: on a terminal with words wrapped, and a status line below."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from openelm_mlx.cli.streams import Waiting, columns, moves_cursor, printable
from openelm_mlx.cli.wrap import WordWrap

ERASE_BELOW = "\x1b[J"
# One line down and up again makes room at the bottom of the screen. Then: remember the place, write
# below, return.
BELOW = "\x1bD\x1b[A\x1b7\x1bD\r\x1b[7m{}\x1b[0m\x1b8"


class Display:
    """One answer. `with Display(live=True) as display: display.write("text", "status")`.

    `live` asks for the status line, which needs a terminal that moves its cursor. The cursor rests
    at the end of the text all the time, so that a resized window and a killed process leave nothing
    but that one line behind.
    """

    def __init__(self, live: bool) -> None:
        capable = moves_cursor(sys.stdout)
        self.live = live and capable
        self.wrap = WordWrap(lambda: columns(sys.stdout)) if capable else None
        self.waiting = Waiting("reading the prompt")

    def __enter__(self) -> Display:
        if self.live:
            self._draw("", "reading the prompt")
        else:
            self.waiting.__enter__()
        return self

    def progress(self, done: int, total: int) -> None:
        """Say how many tokens of the prompt are prefilled."""
        if self.live:
            self._draw("", f"reading the prompt: {done} of {total} tokens")
        else:
            self.waiting.progress(done, total)

    def write(self, text: str, status: str = "") -> None:
        """Show a piece of the answer, and what the status line says from now on."""
        self.waiting.end()
        text = self.wrap.push(text) if self.wrap else printable(text)
        if self.live:
            self._draw(text, status)
        else:
            print(text, end="", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.waiting.end()
        print(ERASE_BELOW if self.live else "", flush=True)

    def _draw(self, text: str, status: str) -> None:
        line = f" {status} | Ctrl-C stops "[: columns(sys.stdout) - 1]
        print(ERASE_BELOW, text, BELOW.format(line), sep="", end="", flush=True)


class Meter:
    """Counts the tokens of an answer, and their rate, while it runs and after it was stopped."""

    def __init__(self) -> None:
        self.tokens, self.first, self.last = 0, 0.0, 0.0

    def token(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += 1

    def __str__(self) -> str:
        seconds = self.last - self.first
        return f"{self.tokens} tokens" + (
            f" at {(self.tokens - 1) / seconds:.1f} tokens/s" if seconds else ""
        )


class StopKey:
    """Turns Ctrl-C into a request to end the answer at the next token or prefilled chunk.

    So nothing is torn in the middle of a pass. A second Ctrl-C before that is a
    `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.asked, self.over = False, False
        self.before: Any = None

    def __enter__(self) -> StopKey:
        self.before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.over:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if the key was pressed."""
        if self.asked:
            self.over = True  # what cleans up now is not to be interrupted again
            raise KeyboardInterrupt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self.before)
