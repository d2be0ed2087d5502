"""Adapters that were trained here are one model everywhere: applied, merged, in mlx-lm, in PEFT's
form and back; and they know their base.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import TINY, again, mlx_lm_logits, random_folder

from openelm_mlx import load
from openelm_mlx.cli import main
from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import WEIGHTS
from openelm_mlx.errors import OpenELMError
from openelm_mlx.finetune import FinetuneOptions, finetune

TOKENS = np.array([[1, 5, 9, 33, 2, 60]])
SHAPE = replace(TINY, num_transformer_layers=2, max_context_length=64)
TARGETS = ("qkv_proj", "out_proj", "proj_1", "proj_2")
KINDS = {
    "lora": {"targets": TARGETS, "rank": 3, "alpha": 6.0},
    "dora": {"method": "dora", "targets": ("qkv_proj", "proj_2"), "rank": 2},
    "embedding": {"targets": (*TARGETS, "token_embeddings"), "rank": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return again(random_folder(folder / "random", SHAPE, spread=0.3), folder / "base")


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, base, tmp_path_factory) -> Path:
    """The folder of an adapter that was trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": text}) for text in ("a fox", "two birds flew", "a little girl")]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    how = {"steps": 3, "learning_rate": 0.05, "warmup": 0.0, "batch": 1, **KINDS[request.param]}
    options = FinetuneOptions(length=16, validation_share=0.0, **how)
    finetune(load(base), folder / "data.jsonl", folder / request.param, options)
    return folder / request.param


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    return np.array(load(folder, "float32", adapter=adapter).model(mx.array(TOKENS)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def command(*words: object) -> None:
    assert main([*map(str, words)]) == 0


def test_one_model_applied_merged_and_in_mlx_lm(base, adapter, tmp_path):
    applied = logits(base, adapter)
    assert difference(logits(base), applied) > 0.01
    command("fuse", base, "--adapter", adapter, "-o", tmp_path / "merged")
    assert difference(logits(tmp_path / "merged"), applied) < 1e-5
    if not (adapter / WEIGHTS).exists():  # one side of a tied embedding, which mlx-lm's form lacks
        keep = ("--adapter-folder", adapter, "--adapter", "keep")
        command("convert", base, *keep, "-o", tmp_path / "kept")
        base, adapter = tmp_path / "kept", tmp_path / "kept" / "adapter"
    assert difference(mlx_lm_logits(base, TOKENS, adapter), applied) < 1e-5


def test_pefts_form_and_back(base, adapter, tmp_path):
    applied, folder = logits(base, adapter), adapter
    for form in ("hf", "mlx") if (adapter / WEIGHTS).exists() else ("hf",):
        command(
            "convert", folder, "--to", form, "-o", tmp_path / form, "--config", base / "config.json"
        )
        folder = tmp_path / form
        assert (folder / WEIGHTS).exists() == (form == "mlx")
        assert difference(logits(base, folder), applied) < 1e-6


def test_another_base_is_refused(base, adapter, tmp_path):
    other = random_folder(tmp_path / "other", SHAPE, seed=1)
    with pytest.raises(OpenELMError, match="was made for other weights than"):
        load(other, adapter=adapter)
