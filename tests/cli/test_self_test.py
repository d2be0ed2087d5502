"""The self test of `openelm doctor` knows what whole passes give, and sees a kernel that is
wrong.
"""

from __future__ import annotations

import pytest

from openelm_mlx import load
from openelm_mlx.cli import main
from openelm_mlx.cli.doctor import PROMPT, TOKENS
from openelm_mlx.device import mx
from openelm_mlx.engine.prompts import prompt_tokens

pytestmark = pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")


def test_the_expected_tokens_are_those_of_whole_passes_and_no_other_comes_near():
    engine = load("openelm-tiny", dtype="float32")
    ids = prompt_tokens(engine, PROMPT)
    for token in TOKENS:
        logits = engine.model(mx.array([ids]))[0, -1, : engine.vocab]
        second, first = mx.sort(logits)[-2:].tolist()
        assert int(mx.argmax(logits).item()) == token and first - second > 0.2
        ids.append(token)


def test_a_wrong_kernel_is_seen_and_said(capsys, monkeypatch):
    assert main(["doctor"]) == 0 and "16 of 16 greedy tokens" in capsys.readouterr().out
    monkeypatch.setattr(
        "openelm_mlx.model.decoder.rotate", lambda x, normed, swapped, weights, turn: x
    )
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "16 of 16" not in shown and "! this device computes wrong results; update" in shown


def test_the_facts_are_printed_where_mlx_fails(capsys, monkeypatch):
    def fail(*arrays):
        raise RuntimeError("[metal] no such kernel")

    monkeypatch.setattr("openelm_mlx.model.decoder.rotate", fail)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert (
        "MLX failed: [metal] no such kernel" in shown
        and "converted cache" in shown
        and "! this device" in shown
    )
