"""Odd tokenizers: loading and converting read them alike, or refuse both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import TINY, again, assert_refused_alike, changed, random_folder, trained_tokenizer

from openelm_mlx import load
from openelm_mlx.device import mx


@pytest.fixture
def plain(tmp_path) -> Path:
    return random_folder(tmp_path / "plain")


def test_a_tokenizer_with_pieces_that_are_not_utf8(tmp_path, plain):
    data = trained_tokenizer(TINY.vocab_size)
    place = data.index("▁".encode())
    (plain / "tokenizer.model").write_bytes(data[:place] + b"\x96" + data[place + 1 :])
    assert_refused_alike(plain, tmp_path, "tokenizer.model is damaged")


def test_a_tokenizer_of_another_model(tmp_path, plain):
    (plain / "tokenizer.model").write_bytes(trained_tokenizer(65))
    assert_refused_alike(plain, tmp_path, "65 pieces, but the model 64 rows of embeddings")

    def pad(arrays):
        name = "transformer.token_embeddings.weight"
        arrays[name] = mx.pad(arrays[name], [(0, 258), (0, 0)])

    folder = changed(plain, pad, vocab_size=322)
    assert_refused_alike(
        folder, tmp_path, "65 pieces, but the model 322 rows of embeddings: this is"
    )
    (plain / "tokenizer.model").write_bytes(trained_tokenizer(66))
    assert load(folder).vocab == load(again(folder, tmp_path / "m")).vocab == 66


def test_a_tokenizer_without_a_start_token(tmp_path, plain):
    path = plain / "tokenizer.model"
    renamed = bytes([2 << 3 | 2, 6, 0xF2, 2, 3, *b"<x>"])  # trainer_spec.bos_piece
    path.write_bytes(path.read_bytes() + renamed)
    assert_refused_alike(
        plain, tmp_path, r"tokenizer.model.*(lacks <s> or </s>|tokens are \(0, -1, 2\))"
    )


def test_a_tokenizer_json_with_a_regex_is_never_run(tmp_path, plain):
    folder = again(plain, tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert_refused_alike(
        folder, tmp_path, "tokenizer.json is not a tokenizer of LLaMA's kind: it has a"
    )


@pytest.mark.parametrize("unknown", ["", "<none>"])
def test_a_tokenizer_json_whose_unknown_piece_is_not_in_it(tmp_path, plain, unknown):
    """Encoding raises a bare exception of the tokenizers package."""
    folder = again(plain, tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["unk_token"] = unknown
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert_refused_alike(
        folder, tmp_path, "tokenizer.json is (damaged|not a tokenizer of LLaMA's kind)"
    )
