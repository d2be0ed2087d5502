"""Two processes of `mlx.launch` train as one with twice the batch."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import launched_training
import pytest
from training import curve, options, small_engine

from openelm_mlx.device import mx
from openelm_mlx.engine import ranks
from openelm_mlx.finetune import finetune


def launch(*words: str) -> str:
    """Return what two processes say."""
    port = str(random.SystemRandom().randrange(20000, 30000, 4))
    command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--starting-port"]
    done = subprocess.run(
        [*command, port, "--", sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_arrays_are_sent_in_portions_of_one_type(monkeypatch):
    monkeypatch.setattr(ranks, "SUM_BYTES", 40)
    sizes = [(3, mx.float32), (7, mx.float32), (1, mx.float32), (20, mx.float16), (1, mx.float32)]
    arrays = [mx.zeros(size, dtype) for size, dtype in sizes]
    found = list(ranks.portions(arrays))
    assert [[array.size for array in part] for part in found] == [[3, 7], [1], [20], [1]]
    assert list(ranks.portions([])) == [] and ranks.Ranks().sums(arrays) == arrays


def test_two_processes_stop_and_go_on_together_and_equal_one(tiny, tmp_path):
    """The second is told to stop at a step; both do at the next, and the first one saves."""
    said = launch(launched_training.__file__, str(tmp_path))
    other = "process 2 of mlx.launch has other options than the first; give all the same, and each "
    refused = f"{other}such command here its own --starting-port"
    lines = [
        [
            line.partition(": ")[2]
            for line in said.splitlines()
            if line.startswith(f"process {rank}")
        ]
        for rank in (0, 1)
    ]
    assert lines[0] == lines[1] and lines[0][:2] == [refused, "stopped"] and len(lines[0]) == 3
    asked = options(batch=2 * launched_training.BATCH, epochs=2.0)
    finetune(small_engine(tiny), tmp_path / "pairs.jsonl", tmp_path / "one", asked)
    rows = curve(tmp_path / "out"), curve(tmp_path / "one")
    assert len(rows[0]) == len(rows[1]) > 6
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
