"""Odd files that other tools write: loading and converting read them alike, or refuse both."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path

import pytest
from formats import TINY, again, random_folder, trained_tokenizer

from openelm_mlx import load
from openelm_mlx.errors import OpenELMError


def refused_alike(folder: Path, tmp_path: Path, message: str) -> None:
    """Check that the folder is neither loaded nor converted, for one reason."""
    for use in (lambda: load(folder), lambda: again(folder, tmp_path / "out")):
        with pytest.raises(OpenELMError, match=message):
            use()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_pieces_that_are_not_utf8(tmp_path):
    folder = random_folder(tmp_path / "m")
    data = trained_tokenizer(TINY.vocab_size)
    place = data.index("▁".encode())
    (folder / "tokenizer.model").write_bytes(data[:place] + b"\x96" + data[place + 1 :])
    refused_alike(folder, tmp_path, "tokenizer.model is damaged")


def test_a_byte_order_mark_before_json(tmp_path):
    folder = again(random_folder(tmp_path / "source"), tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes(BOM_UTF8 + (folder / name).read_bytes())
    plain, marked = load(tmp_path / "source"), load(folder)
    assert marked.config.eos_token_ids == plain.config.eos_token_ids
    assert marked.tokenizer.encode("the fox") == plain.tokenizer.encode("the fox")
    assert marked.tokenizer.encode("the fox", continued=True) == plain.tokenizer.encode(
        "the fox", continued=True
    )
    converted = load(again(folder, tmp_path / "again"))
    assert converted.tokenizer.same_pieces(plain.tokenizer)


def test_a_byte_order_mark_before_yaml(tmp_path):
    from openelm_mlx.convert.opening import corenet_section

    text = "model: {language_modeling: {general_gpt: {model_name: OpenELM-270M}}}"
    (tmp_path / "c.yaml").write_bytes(BOM_UTF8 + text.encode())
    assert corenet_section(tmp_path / "c.yaml") == {"model_name": "OpenELM-270M"}


@pytest.mark.parametrize("unknown", ["", "<none>"])
def test_a_tokenizer_json_whose_unknown_piece_is_not_in_it(tmp_path, unknown):
    """Encoding raises a bare exception of the tokenizers package."""
    folder = again(random_folder(tmp_path / "source"), tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["unk_token"] = unknown
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    refused_alike(folder, tmp_path, "tokenizer.json is (damaged|not a tokenizer of LLaMA's kind)")
