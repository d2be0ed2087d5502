"""`openelm finetune`: its options, what it shows, and how it stops."""

from __future__ import annotations

from openelm_mlx.cli import main


def test_help_shows_options_in_groups(capsys):
    assert main(["help", "finetune"]) == 0
    page = capsys.readouterr().out
    heads = [line for line in page.splitlines() if line.endswith(" options:")]
    named = [head.removesuffix(" options:") for head in heads]
    assert named == ["method", "data", "training", "optimizer", "run", "preference", "model"]
    assert "--adapter" not in page  # that is what comes out
    assert "(default qkv_proj out_proj proj_1 proj_2)" in " ".join(page.split())
