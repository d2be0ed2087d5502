"""The comparison of quantizations: every row is measured on the same text, and what does not run
says why.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest
import quantization
from formats import tokenizer_file
from golden_set import GOLDEN

from openelm_mlx.convert.quantize import losses


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 32)  # whose rounding errors are taken
    monkeypatch.setattr(losses, "NEAR", 1.0)  # bits from the target that are measured
    shutil.copy(GOLDEN / "tied-gqa4" / "checkpoint.pt", tmp_path)
    tokenizer_file(tmp_path)
    text = tmp_path / "report.txt"
    text.write_text("once upon a time two birds flew in a forest with a fox " * 10)
    mine = tmp_path / "mine.txt"
    mine.write_text("there was a little girl who lived in a forest with two birds and a fox " * 40)
    status = quantization.main(
        [
            str(tmp_path / "checkpoint.pt"),
            str(text),
            "--bits",
            "4",
            "--methods",
            "target-bpw",
            "gptq",
            "--peers",
            "mixed",
            "gptq",
            "--calibration-text",
            str(mine),
            "--output",
            str(tmp_path / "rows.jsonl"),
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    by_method = {row["method"]: row for row in rows}
    uniform = by_method["uniform"]
    assert status == 0 and uniform["ratio"] == 1 and uniform["bits_per_weight"] > 4.5
    for method in ("target-bpw", "target-bpw + gptq"):
        assert by_method[method]["bytes"] <= uniform["bytes"] and by_method[method]["ratio"] < 1
    assert (
        "does not run: Model does not have expected keys" in by_method["mlx-lm mixed_4_6"]["note"]
    )
    assert math.isnan(by_method["mlx-lm mixed_4_6"]["mean_kl"])
    theirs = by_method["mlx-lm gptq 4 bits, embeddings 4"]
    assert theirs["bytes"] == uniform["bytes"] and 0 < theirs["ratio"] < 2
    table = capsys.readouterr().out
    assert table.count("\n|") == len(rows) + 1 and f"{uniform['bytes']:,}" in table


def test_a_missing_text_is_told(tmp_path, capsys):
    tokenizer_file(tmp_path)
    shutil.copy(GOLDEN / "tied-gqa4" / "checkpoint.pt", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quantization.main([str(tmp_path / "checkpoint.pt"), str(tmp_path / "none.txt")])
    assert stopped.value.code == 2 and "none.txt cannot be read" in capsys.readouterr().err
