"""Wraps words that arrive in pieces: one that no longer fits in the line moves to the next."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len

TAB = 8


class WordWrap:
    """Says what to write for each piece of text so that no word breaks at the edge.

        width 10   "the quick" -> "the quick", " bro" -> " ", then back over "bro": a new line, "bro"; "wn" -> "wn"

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
