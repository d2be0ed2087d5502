"""The script that measures what a kind of cache costs."""

from __future__ import annotations

import kv_loss
import pytest
from formats import again, long_context
from small import random_engine

from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError

STORY = "Once upon a time there was a king who had three sons, and the youngest was a fool. " * 6


def test_the_table(tmp_path, capsys):
    model = again(long_context(tmp_path), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(STORY)
    given = [str(model), str(text), "--length", "80", "--pieces", "1"]
    assert kv_loss.main(given) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "| 8 bits",
        "| 4 bits",
        "| window of 40",
        "| window of 40, 8 bits",
    ]
    losses = [float(row[2]) for row in rows]
    assert 0 < losses[0] < losses[1] and all(0 < loss < 2 for loss in losses)
    assert kv_loss.main([*given, "--answers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "plain: of 1 texts of 2 tokens differ 0 in chunks of 7; 0 in a batch"
    )


def test_a_text_that_is_too_short(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.")
    with pytest.raises(BenchmarkError, match=r"tokens, too few for 2 pieces of 300$"):
        kv_loss.cut(tiny, text, 300, 2)
    with pytest.raises(BenchmarkError, match="64 tokens are too short: the first 64 are not"):
        kv_loss.cut(tiny, text, 64, 2)


def test_answers_of_a_plain_cache_differ_in_no_way_and_wrong_ones_are_seen(tiny, monkeypatch):
    engine = random_engine(tiny, seed=4)
    pieces = [[1, *range(5, 25)], [1, *range(30, 50)]]
    found = kv_loss.differences(engine, pieces, EngineOptions(), 6)
    assert found == {"in chunks of 7": 0, "in a batch": 0, "with prompt lookup": 0}
    monkeypatch.setattr(
        kv_loss,
        "answer",
        lambda engine, prompt, how: [how["prefill_chunk"]] if "prefill_chunk" in how else [],
    )
    assert kv_loss.differences(engine, pieces, EngineOptions(), 6) == dict.fromkeys(found, 2)
