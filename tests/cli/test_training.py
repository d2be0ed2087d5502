"""What is seen of a training: the curve of its losses, and lines in a pipe."""

from __future__ import annotations

import math

from openelm_mlx.cli.training import MARK, curve


def heights(lines: list[str]) -> list[list[int]]:
    """Return the rows of dots of each column of dots that are set, from the top."""
    cells = [line.partition("│")[2] for line in lines]
    columns: list[list[int]] = [[] for _ in range(2 * len(cells[0]))]
    for number, row in enumerate(cells):
        for place, char in enumerate(row):
            bits = 0 if char == MARK else ord(char) - 0x2800
            for dot, pair in enumerate(((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))):
                for side, bit in enumerate(pair):
                    if bits & bit:
                        columns[2 * place + side].append(4 * number + dot)
    return columns


def test_a_line_of_dots_falls_with_the_loss_and_has_no_gap():
    lines = curve([(step, 10.0 - step) for step in range(10)], [], 10, 3)
    assert lines[0].startswith("10.00 │") and lines[-1].startswith("1.000 │")
    dots = heights(lines)
    assert dots[0] == [0] and dots[-1][-1] == 11 and all(dots)
    for before, after in zip(dots, dots[1:], strict=False):
        assert after[0] == before[-1] and after == [*range(after[0], after[-1] + 1)]


def test_steps_that_share_a_column_are_averaged_and_those_to_come_take_no_room():
    assert len({len(line) for line in curve([(1, 1.0), (2, 0.5)], [], 30, 4)}) == 1
    many = [(step, 1.0 + (-1) ** step) for step in range(4000)]
    lines = curve([*many, (4000, 5.0)], [], 10, 4)
    # 0 and 2 in turn are a line at 1, and one step of 5 raises the last column
    assert {tuple(rows) for rows in heights(lines)[:-1]} == {(15,)}
    assert heights(lines)[-1] == [*range(16)]


def test_validations_are_circles_at_their_steps():
    lines = curve([(1, 3.0), (9, 1.0)], [(0, 3.0), (9, 2.0)], 10, 3)
    cells = [line.partition("│")[2] for line in lines]
    assert [(row, cells[row].index(MARK)) for row in range(3) if MARK in cells[row]] == [
        (0, 0),
        (1, 9),
    ]


def test_what_cannot_be_drawn_is_left_out():
    assert curve([], [], 10, 3) == curve([(1, 2.0)], [(0, 1.0)], 10, 3) == []
    flat = curve([(1, 2.0), (2, 2.0), (3, math.nan)], [], 10, 3)
    assert {rows[0] for rows in heights(flat) if rows} == {0}
