"""Words wrapped while they stream, seen on a model of a terminal."""

from __future__ import annotations

import random
import re

from rich.cells import cell_len

from openelm_mlx.cli.display import WordWrap


class Screen:
    """Lines of a terminal of `width` columns that knows the line break, "back" and "erase to the
    end of the line".
    """

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.at = width, [[]], 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[A-Z]|.|\n", text):
            line = self.lines[-1]
            if part == "\n":
                self.lines.append([])
                self.at = 0
            elif part.endswith("D") and len(part) > 1:
                self.at -= int(part[2:-1])
            elif part == "\x1b[K":
                del line[self.at :]
            else:
                assert self.at == len(line)
                if not cell_len(part):
                    line[-1] += part
                    continue
                line += [
                    part,
                    *[""] * (cell_len(part) - 1),
                ]  # the second half of a wide character is a cell too
                self.at = len(line)
                assert self.at <= self.width, "the terminal would have wrapped by itself"

    def shown(self) -> list[str]:
        return ["".join(line) for line in self.lines]


def wrapped(pieces: list[str], width: int) -> list[str]:
    screen, wrap = Screen(width), WordWrap(lambda: width)
    for piece in pieces:
        screen.write(wrap.push(piece))
    return screen.shown()


def test_a_word_is_never_cut_however_it_arrives():
    assert wrapped(["the quick", " bro", "wn fox", " ju", "mps"], 12) == [
        "the quick ",
        "brown fox ",
        "jumps",
    ]
    rng = random.Random(4)
    for _ in range(200):
        text = " ".join("x" * rng.randint(1, 9) for _ in range(30))
        cuts = sorted(rng.sample(range(len(text)), 12))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        lines = wrapped(pieces, 20)
        assert [word for line in lines for word in line.split()] == text.split()
        assert lines == wrapped([text], 20) and all(len(line) < 20 for line in lines)
        for line, following in zip(lines, lines[1:], strict=False):  # as many words as fit
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 19


def test_a_word_longer_than_a_line_fills_lines():
    assert wrapped(["a ", "x" * 25], 10) == ["a ", "x" * 9, "x" * 9, "x" * 7]


def test_wide_characters_take_two_columns_and_part_anywhere():
    assert wrapped(["ab\u72ac\u732b", "\u9ce5\u9b5a"], 8) == ["ab\u72ac\u732b", "\u9ce5\u9b5a"]
    assert wrapped(["e\u0301" * 12], 10) == [
        "e\u0301" * 9,
        "e\u0301" * 3,
    ]  # a combining accent takes none


def test_line_breaks_indents_and_blanks_at_the_edge():
    assert wrapped(["  in\n\n  dented\tx"], 20) == ["  in", "", "  dented        x"]
    assert wrapped(["123456789 ", "  next"], 10) == ["123456789", "next"]
    assert wrapped(["123456789\nnext"], 10) == ["123456789", "next"]


def test_a_model_cannot_command_the_terminal():
    assert wrapped(["a\x1b[2Jb\rc\x9b"], 40) == ["a\ufffd[2Jb\ufffdc\ufffd"]


def test_a_resized_window_is_respected():
    width = [30]
    wrap = WordWrap(lambda: width[0])
    assert wrap.push("one two three four five") == "one two three four five"
    width[0] = (
        # the terminal shows "one two thre", "e four five": 11 columns of its second line are taken
        12
    )
    assert wrap.push(" six") == "\nsix"
    width[0] = 80
    assert "\n" not in wrap.push(" seven eight nine")
