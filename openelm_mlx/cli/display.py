"""Shows an answer on stdout: wraps its words on a terminal, with a status line below."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from rich.cells import cell_len

from openelm_mlx.cli.streams import Waiting, columns, moves_cursor, printable

TAB = 8  # columns between tab stops
ERASE_BELOW = "\x1b[J"
# One line down and up again makes room at the bottom of the screen. Then: remember the place, write
# below, return.
BELOW = "\x1bD\x1b[A\x1b7\x1bD\r\x1b[7m{}\x1b[0m\x1b8"


class WordWrap:
    """Returns what to write for each piece of text so that no word breaks at the edge.

        width 10   "the quick" -> "the quick"
                   " bro" -> " ", "bro" moves to a new line
                   "wn" -> "wn"

    `columns()` is asked at each piece, so that a resized window is respected. The last column stays
    free: a terminal that waits there for the next character forgets so when the cursor is moved.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self.columns, self.width = columns, columns() - 1
        self.column = 0  # of the cursor
        self.word, self.word_width = "", 0  # the part of a word that ends at the cursor

    def push(self, text: str) -> str:
        """Return the text with its line breaks.

        Control characters, which could command the terminal, and lone surrogates, which no stream
        can write, become U+FFFD.
        """
        self._resize()
        return "".join(map(self._character, text))

    def _resize(self) -> None:
        """Follow a new width. In a narrower window the terminal has folded the line its own way."""
        width = max(self.columns() - 1, 1)
        if width < self.column:
            self.column %= width + 1
            self._new_word()
        self.width = width

    def _character(self, char: str) -> str:
        if char == "\n":
            self.column = 0
            self._new_word()
            return "\n"
        if char in " \t":
            return self._blank(1 if char == " " else TAB - self.column % TAB)
        if char == "\ufe0f":  # draws the character before as a picture, two columns wide
            return self._take(char, 1) if self.column < self.width else ""
        if ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) < 0xE000:
            char = "\ufffd"
        size = cell_len(char)
        if self.column + size <= self.width:
            return self._take(char, size)
        if size > 1 or self.word_width in (
            0,
            self.column,
        ):  # between wide characters, words, or within a long one
            self.column = 0
            self._new_word()
            return "\n" + self._take(char, size)
        moved, self.column = self.word, self.word_width
        back = f"\x1b[{self.word_width}D\x1b[K\n{moved}"
        return back + self._take(char, size)

    def _blank(self, size: int) -> str:
        """Return spaces; at the edge nothing, as a line break comes there with the next word."""
        self._new_word()
        if self.column + size > self.width:
            self.column = self.width
            return ""
        self.column += size
        return " " * size

    def _take(self, char: str, size: int) -> str:
        self.column += size
        self.word, self.word_width = self.word + char, self.word_width + size
        if size > 1:  # a line may break after a wide character
            self._new_word()
        return char

    def _new_word(self) -> None:
        self.word, self.word_width = "", 0


class Display:
    """Shows one answer: `with Display(live=True) as display: display.write("text", "status")`.

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
