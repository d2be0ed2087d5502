"""The picture of a fine-tuning: its losses are where the rows of the metrics say."""

from __future__ import annotations

import json

import pytest
from optional import hide

from openelm_mlx.drawing import LIGHT, new_figure, style
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.picture import draw, running_mean, write_picture

ROWS = [
    {"step": 0, "validation_loss": 4.0, "best": True},
    *({"step": n, "loss": 4.0 / n, "learning_rate": n * 1e-4} for n in (1, 2, 3)),
    {"step": 3, "validation_loss": 2.0, "best": True},
    {"step": 4, "loss": 1.0, "learning_rate": 0.0},
    {"step": 4, "validation_loss": 2.5, "best": False},
]


def test_the_mean_reaches_as_far_to_both_sides():
    assert running_mean([3.0, 6.0, 0.0, 3.0], 1) == [3.0, 3.0, 3.0, 3.0]
    assert running_mean([1.0, 5.0, 3.0], 9) == [1.0, 3.0, 3.0]
    assert running_mean([], 1) == []


@pytest.mark.needs("matplotlib")
def test_losses_are_drawn_where_they_were_and_the_best_is_marked():
    with style(LIGHT):
        ax = new_figure(4, 3).add_subplot()
        draw(ax, LIGHT, ROWS)
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["training"] == [[1, 4.0], [2, 2.0], [3, 4.0 / 3], [4, 1.0]]
    assert lines["validation"] == [[0, 4.0], [3, 2.0], [4, 2.5]] and lines["best"] == [[3, 2.0]]
    assert [text.get_text() for text in ax.texts] == ["2.0000 at step 3"]


@pytest.mark.needs("matplotlib")
def test_a_picture_is_written_beside_the_metrics(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert write_picture(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_losses_or_matplotlib_there_is_none(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert not write_picture(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    with pytest.raises(OptionError, match="pictures need matplotlib: `pip install 'openelm-mlx"):
        write_picture(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
