"""What is seen of a training: the curve of its losses, and lines in a pipe."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from openelm_mlx.cli import training
from openelm_mlx.cli.training import MARK, Progress, curve


def heights(lines: list[str]) -> list[list[int]]:
    """Return the rows of dots of each column of dots that are set, from the top."""
    cells = [line.partition("│")[2] for line in lines]
    columns: list[list[int]] = [[] for _ in range(2 * len(cells[0]))]
    for number, row in enumerate(cells):
        for place, char in enumerate(row):
            bits = 0 if char in (MARK, " ") else ord(char) - 0x2800
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


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 4.0 / step, "learning_rate": 1e-4, "tokens_per_second": 1234.5}


@pytest.fixture
def show(tmp_path):
    """Show rows, of which the metrics have some more from an earlier session."""

    def told(*rows: dict[str, float], earlier: tuple[dict[str, float], ...] = ()) -> None:
        lines = [json.dumps(one) for one in (*earlier, rows[0])]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        with Progress(tmp_path, quiet=False) as progress:
            for one in rows:
                progress(one, 8)

    return told


def test_in_a_pipe_there_is_a_line_for_each_evaluation_and_each_minute(show, capsys, monkeypatch):
    rows = [
        {"step": 0, "validation_loss": 5.0},
        row(1),
        {"step": 1, "validation_loss": 5.5},
        row(2),
    ]
    show(*rows)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 0 of 8: validation 5.0000 (best)"
    wanted = "step 1 of 8: loss 4.0000, validation 5.5000, learning rate 1.00e-04, 1,234 tokens/s"
    assert second.startswith(f"{wanted}, about ") and second.endswith(" left")
    monkeypatch.setattr(training, "NOTICE_SECONDS", -1.0)
    show(*rows)
    assert len(capsys.readouterr().err.splitlines()) == 4
    with Progress(None, quiet=True) as progress:
        progress(row(1), 8)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_curve_has_what_an_earlier_session_trained(show, monkeypatch):
    class Screen(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Screen())
    show(row(5), row(8), earlier=(row(1), row(2), {"step": 2, "validation_loss": 3.0}))
    shown = sys.stderr.getvalue().rpartition("4.000 │")[2]  # what stays on the screen
    assert MARK in shown and "0.5000 │" in shown and "━" in shown
    assert "step 8 of 8: loss 0.5000, validation 3.0000 (best), learning rate 1.00e-04" in shown
    monkeypatch.setattr(sys, "stderr", Screen())
    sys.stderr.encoding = "ascii"  # where nothing of it can be written but the line
    show(row(1), row(2))
    assert "│" not in sys.stderr.getvalue() and "step 2 of 8" in sys.stderr.getvalue()
