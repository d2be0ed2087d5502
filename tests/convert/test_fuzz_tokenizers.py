"""Damaged tokenizers: a folder with one is converted and loaded, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

from formats import again, everything
from fuzzing import (
    FUZZ,
    SCRATCH,
    assert_survival,
    damage,
    damaged,
    json_values,
    made,
    scratch,
    tiny_folder,
)
from hypothesis import given
from hypothesis import strategies as st

from openelm_mlx import load

__all__ = ["scratch"]  # a fixture


@given(damage(), st.sampled_from([300, -600, 1 << 30]), st.booleans())
@FUZZ
def test_tokenizers(change, span, model):
    """Loading takes more kinds of tokenizer.json than converting: those it encodes with anyway."""
    name = "tokenizer.model" if model else "tokenizer.json"
    folder = folder_with(name, damaged((made("plain") / name).read_bytes(), change, span))
    with assert_survival(str(folder)):
        everything(folder)
        again(folder, SCRATCH / "again", force=True)
    with assert_survival(str(folder)):
        tokenizer = load(folder).tokenizer
        assert tokenizer.encode("once upon a time", continued=True)


@given(st.data(), json_values)
@FUZZ
def test_any_value_in_a_tokenizer_json(data, value):
    raw = json.loads((made("plain") / "tokenizer.json").read_text(encoding="utf-8"))
    place, keys = raw, list(raw)
    while True:
        key = data.draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            break
        place = place[key]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    place[key] = value
    folder = folder_with("tokenizer.json", json.dumps(raw).encode())
    with assert_survival(str(folder)):
        everything(folder)
        again(folder, SCRATCH / "again", force=True)
    with assert_survival(str(folder)):
        load(folder).tokenizer.encode("once upon a time", continued=True)


def folder_with(tokenizer: str, data: bytes) -> Path:
    """The tiny folder with only this file of a tokenizer."""
    folder = SCRATCH / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((tiny_folder() / name).read_bytes())
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / tokenizer).write_bytes(data)
    return folder
