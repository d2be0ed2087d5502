"""The comparison of training speeds gives both sides the same work, and judges what they did."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import pytest

from openelm_mlx import load
from openelm_mlx.benchmarks.scripts import finetune_speed
from openelm_mlx.benchmarks.scripts.finetune_speed import Comparison, Trained, held_out_loss, made


def test_both_sides_train_the_same_weights_on_the_same_tokens(nano: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_speed, "LONGEST", 48)
    tokenizer = load(nano).tokenizer
    texts = made(tokenizer, 6, seed=1)
    assert texts == made(tokenizer, 6, seed=1) != made(tokenizer, 6, seed=2)
    sizes = [len(tokenizer.encode(text)) + 1 for text in texts]  # and the token that ends a text
    assert max(sizes) <= 48 and min(sizes) >= 12
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    before = held_out_loss(nano, None, data)
    for name, train in finetune_speed.SIDES.items():
        found = train(nano, data, tmp_path / name, None, perf_counter, 0)
        left = 2 * (sum(sizes) - len(texts)) - sum(found.tokens)  # of two epochs
        most = 0 if name == "ours" else sum(sizes)  # mlx-lm leaves out what does not fill a batch
        assert 0 <= left <= most
        assert found.ends == sorted(found.ends) and found.total == found.ends[-1]
        assert held_out_loss(nano, tmp_path / name, data) < before


@pytest.mark.parametrize(
    ("mine", "other", "loss", "holds"),
    [(1.0, 1.5, 3.0, True), (1.0, 1.1, 3.0, False), (1.0, 1.5, 3.3, False)],
)
def test_speed_and_loss_are_both_asked_for(mine, other, loss, holds):
    found = Comparison(4.0)
    for seconds, runs, own in ((mine, found.runs[0], loss), (other, found.runs[1], 3.2)):
        for _ in range(2):
            ends = [seconds, 2 * seconds, 3 * seconds, 4 * seconds]
            runs.append(Trained(4 * seconds, ends, [10, 20, 30, 40], True, own))
    assert found.holds is holds and found.as_json()["holds"] is holds
    assert found.runs[0][0].rate == 25 and found.runs[0][0].compiled_rate == 35
    assert f"compiled: 35 (35-35) and {35 / other:.0f}" in str(found)
