"""Standard streams and terminals: UTF-8 in, any character out, wrapped words, a status line."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from openelm_mlx.errors import PromptError

PATIENCE_SECONDS = 0.5  # a wait shorter than this needs no sign


def utf8_stdin() -> TextIO:
    """Return standard input, read as UTF-8 whatever the locale says.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer refuses with one line that
    names the place. Raises `PromptError` if stdin is closed.
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
    """Return whether `stream` is a terminal that knows the usual escape sequences."""
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

    It appears after half a second and goes with the wait. The cursor rests at its start: whatever
    else is written there replaces it.
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

    def __exit__(self, *error: object) -> None:
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


TAB = 8  # columns between tab stops
ERASE_BELOW = "\x1b[J"
# one line down and up again scrolls the bottom of the screen; then save the place, write, return
BELOW = "\x1bD\x1b[A\x1b7\x1bD\r\x1b[7m{}\x1b[0m\x1b8"


class WordWrap:
    """Returns what to write for each piece of text, with no word broken at the edge.

        width 10   "the quick" -> "the quick"
                   " bro" -> " ", "bro" moves to a new line
                   "wn" -> "wn"

    `columns()` is called for each piece, so a resized window is respected. The last column stays
    free: a terminal that waits there for the next character forgets it when the cursor moves.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        from rich.cells import cell_len  # not above: `openelm --help` does without rich

        self.cell_len = cell_len
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
        size = self.cell_len(char)
        if self.column + size <= self.width:
            return self._take(char, size)
        # a line breaks between wide characters, between words, and within a word that fills it
        if size > 1 or self.word_width in (0, self.column):
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

    `live` asks for the status line, which needs a terminal that moves its cursor. The cursor always
    rests at the end of the text: a resized window or a killed process leaves only that line behind.
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

    def __exit__(self, *error: object) -> None:
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
        rate = f" at {(self.tokens - 1) / seconds:.1f} tokens/s" if seconds else ""
        return f"{self.tokens} tokens{rate}"


def rough(seconds: float) -> str:
    """Return a time in the largest unit that leaves two or more, else in seconds."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{round(seconds)} seconds" if seconds >= 1.5 else "a second"
