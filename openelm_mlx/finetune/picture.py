"""The picture of a fine-tuning: its losses and the learning rate, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.drawing import LIGHT, Theme, legend, new_figure, note, save, style
from openelm_mlx.files import replacing
from openelm_mlx.finetune.state import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "loss.png"
WIDTH, HEIGHT = 7.2, 4.4  # inches
SMOOTHED = 0.02  # of the steps: how far the mean reaches to each side


def write_picture(folder: Path) -> bool:
    """Draw the rows of metrics.jsonl into loss.png.

    Return False, and write nothing, if there are no losses. Raises `OptionError` if matplotlib is
    missing.
    """
    rows = read_rows(folder)
    if not any("loss" in row for row in rows):
        return False
    with style(LIGHT):
        drawn = save(figure(rows, folder.absolute().name), "png")
    with replacing(folder / PICTURE) as new:
        new.write_bytes(drawn)
    return True


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl."""
    with open(folder / METRICS, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Return the figure, within `drawing.style`."""
    drawn = new_figure(WIDTH, HEIGHT)
    above, below = drawn.subplots(2, sharex=True, height_ratios=[4, 1])
    drawn.suptitle(f"Losses of {title:.60}", x=0.02, ha="left", size=10.5, weight="bold")
    draw(above, LIGHT, rows)
    trained = [row for row in rows if "loss" in row]
    below.plot(*columns(trained, "learning_rate"), color=LIGHT.muted, lw=1.2)
    below.set_ylabel("learning rate")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    legend(above, LIGHT, columns=4)
    return drawn


def draw(ax: Any, theme: Theme, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the loss of each step and its running mean, and the validation loss with its best."""
    steps, losses = columns([row for row in rows if "loss" in row], "loss")
    first, second = theme.engines[:2]
    ax.plot(steps, losses, color=first, lw=0.7, alpha=0.35, label="training")
    mean = running_mean(losses, math.ceil(SMOOTHED * len(losses)))
    ax.plot(steps, mean, color=first, lw=1.6, label="training, mean")
    validation = [row for row in rows if "validation_loss" in row]
    if validation:
        ax.plot(
            *columns(validation, "validation_loss"),
            color=second,
            marker="o",
            ms=3.5,
            lw=1.2,
            label="validation",
        )
        best = min(validation, key=lambda row: float(row["validation_loss"]))
        at = (best["step"], best["validation_loss"])
        ax.plot(*at, color=second, marker="o", ms=9, mfc="none", ls="", label="best")
        note(ax, theme, f"{at[1]:.4f} at step {at[0]:,}", at, (0, 10), ha="center")
    ax.set_ylabel("loss")


def columns(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps of the rows, and what they have as `key`."""
    return [row["step"] for row in rows], [row[key] for row in rows]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and of at most `reach` before and after it.

    At the ends it reaches as far to both sides as there are values on the shorter one.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        means.append((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return means
