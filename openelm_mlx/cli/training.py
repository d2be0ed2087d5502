"""What is seen of a training: a curve of its losses on a terminal, and lines in a pipe."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openelm_mlx.cli.display import Waiting, moves_cursor, rough
from openelm_mlx.finetune.picture import read_rows

NOTICE_SECONDS = 60.0  # between lines in a pipe; evaluations have one of their own
REDRAW_SECONDS = 0.25
PAUSES = 50  # of a drawing's time lie between two: a long run has many points
HEIGHT, WIDTH = 8, 72  # of the curve in characters, at most
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a Braille pattern, U+2800
MARK = "●"
Points = Sequence[tuple[int, float]]  # step, loss


def curve(training: Points, validation: Points, width: int, height: int) -> list[str]:
    """Return the lines of a drawing: losses of the training as a line of dots, and each validation
    as a circle. The highest and the lowest loss stand at the left.

    Where several steps share a column, their mean is drawn. Without two steps there is nothing.
    """
    training, validation = (
        [(s, y) for s, y in p if math.isfinite(y)] for p in (training, validation)
    )
    if len(training) < 2:
        return []
    last = max(step for step, _ in [*training, *validation])
    line = list(columns_of(training, last, 2 * width))
    marks = [((2 * width - 1) * step // last // 2, loss) for step, loss in validation]
    low = min(loss for _, loss in [*line, *marks])
    high = max(loss for _, loss in [*line, *marks])
    cells = [[0x2800] * width for _ in range(height)]

    def row_of(loss: float) -> int:
        """Return the row of dots, from the top."""
        return round((high - loss) / ((high - low) or 1.0) * (4 * height - 1))

    before = row_of(line[0][1])
    for column, loss in line:
        row = row_of(loss)
        for dot in range(min(row, before), max(row, before) + 1):
            cells[dot // 4][column // 2] |= DOTS[dot % 4][column % 2]
        before = row
    drawn = [[chr(cell) if cell > 0x2800 else " " for cell in one] for one in cells]
    for cell, loss in marks:
        drawn[row_of(loss) // 4][cell] = MARK
    labels = [f"{high:#.4g}", *[""] * (height - 2), f"{low:#.4g}"][:height]
    room = max(map(len, labels))
    return [f"{label:>{room}} │{''.join(row)}" for label, row in zip(labels, drawn, strict=True)]


def columns_of(points: Points, last: int, columns: int) -> Iterator[tuple[int, float]]:
    """Yield every column of dots from the first point to the last, with its mean, or with what lies
    on the line between its neighbours if no step falls into it.
    """
    sums: dict[int, tuple[float, int]] = {}
    for step, loss in points:
        column = (columns - 1) * step // last
        total, count = sums.get(column, (0.0, 0))
        sums[column] = total + loss, count + 1
    means = [(column, total / count) for column, (total, count) in sorted(sums.items())]
    yield means[0]
    for (left, one), (right, other) in zip(means, means[1:], strict=False):
        for column in range(left + 1, right + 1):
            yield column, one + (other - one) * (column - left) / (right - left)


class Progress:
    """Shows the rows of the metrics in `folder` as they come.

    `quiet` shows nothing, for all but the first process of `mlx.launch`.
    """

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet
        self.stack = ExitStack()
        self.waiting = Waiting("computing the first losses")
        self.live: Any = None
        self.training: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.row: dict[str, Any] = {}  # the newest of a step
        self.steps, self.first = 0, 0  # how many there are, and where this session began
        self.begun = self.noticed = time.monotonic()
        self.drawn, self.pause = -math.inf, REDRAW_SECONDS

    def __enter__(self) -> Progress:
        if not self.quiet:
            self.stack.enter_context(self.waiting)
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.draw()  # it stays on the screen
        self.stack.close()

    @property
    def step(self) -> int:
        """The last step that is done."""
        return max([0, *(points[-1][0] for points in (self.training, self.validation) if points)])

    def __call__(self, row: dict[str, Any], steps: int) -> None:
        if self.quiet:
            return
        if not self.steps:
            for earlier in read_rows(self.folder)[:-1]:  # of a run that is resumed
                self.add(earlier)
            self.first = row["step"] - ("loss" in row)
            self.begun = self.noticed = time.monotonic()
        self.steps = steps
        self.add(row)
        self.show(evaluated="validation_loss" in row)

    def add(self, row: dict[str, Any]) -> None:
        if "validation_loss" in row:
            self.validation.append((row["step"], row["validation_loss"]))
        else:
            self.training.append((row["step"], row["loss"]))
            self.row = row

    def show(self, evaluated: bool) -> None:
        now = time.monotonic()
        if moves_cursor(sys.stderr):
            if evaluated or now - self.drawn > self.pause:
                self.draw()
        elif evaluated or now - self.noticed > NOTICE_SECONDS:
            self.noticed = now
            print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """Return one line: where it is, how good, how fast, and how long it takes yet."""
        parts = []
        if self.row:
            parts.append(f"loss {self.row['loss']:.4f}")
        if self.validation:
            step, loss = self.validation[-1]
            best = loss <= min(other for _, other in self.validation)
            parts.append(f"validation {loss:.4f}{' (best)' if best else ''}")
        if "reward_accuracy" in self.row:  # of preference pairs
            parts.append(f"{self.row['reward_accuracy']:.0%} of pairs in order")
        if self.row:
            parts.append(f"learning rate {self.row['learning_rate']:.2e}")
            parts.append(f"{self.row['tokens_per_second']:,.0f} tokens/s")
        done = self.step - self.first
        if done > 0 and self.step < self.steps:
            each = (time.monotonic() - self.begun) / done
            parts.append(f"about {rough(each * (self.steps - self.step))} left")
        return f"step {self.step:,} of {self.steps:,}: {', '.join(parts)}"

    def draw(self) -> None:
        """Draw the curve, a bar, and the line of a pipe below it."""
        from rich.console import Console
        from rich.text import Text

        if self.live is None:
            from rich.live import Live

            self.waiting.end()
            how: Any = {"auto_refresh": False, "redirect_stdout": False}
            self.live = self.stack.enter_context(Live(console=Console(stderr=True), **how))
        console, begun = self.live.console, time.monotonic()
        width, height = min(console.width - 12, WIDTH), min(console.height - 6, HEIGHT)
        lines: list[str] = []
        if min(width, height) > 2 and "utf" in console.encoding:
            lines = curve(self.training, self.validation, width, height)
            done = width * self.step // max(self.steps, 1)
            lines.append("━" * done + "─" * (width - done))
        text = Text("\n".join([*lines, str(self)]))
        text.highlight_regex("[\u2800-\u28ff]+|━+", "cyan")
        text.highlight_regex(MARK, "yellow")
        self.live.update(text, refresh=True)
        self.drawn = time.monotonic()
        self.pause = max(REDRAW_SECONDS, PAUSES * (self.drawn - begun))
