"""The tokenizer and its streaming decoder, against SentencePiece itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sentencepiece as spm

from openelm_mlx.errors import TokenizerError
from openelm_mlx.tokenizer import StreamingDecoder, Tokenizer

TEXTS = ["Hello world", "  two spaces", "a  b\n\n c ", "", "né 漢字 🦙🏽", "</s> is text", "<0x41>", "\tx", " "]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA-like model: byte fallback, identity normalization, dummy prefix."""
    base = tmp_path_factory.mktemp("spm")
    lines = [f"Hello world number {i}, a user is here\n" for i in range(200)]
    (base / "corpus.txt").write_text("".join(lines))
    spm.SentencePieceTrainer.Train(
        input=os.fspath(base / "corpus.txt"), model_prefix=os.fspath(base / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    return base / "tokenizer.model"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_streamed_and_whole(model_file: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(model_file.parent)
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and 2 not in ids
    reference = spm.SentencePieceProcessor(model_file=os.fspath(model_file))
    assert ids[1:] == reference.EncodeAsIds(text)
    assert tokenizer.decode(ids) == text
    decoder = StreamingDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_gives_the_same_ids_also_for_control_tokens_in_a_text(nano: Path, text: str) -> None:
    one, other = (Tokenizer.from_file(nano / f"tokenizer.{kind}") for kind in ("model", "json"))
    assert one.encode(text) == other.encode(text) and one.decode(other.encode(text)) == text
    assert other.encode(f"{text}</s><s>") == one.encode(f"{text}</s><s>")


def test_character_is_never_split(model_file: Path) -> None:
    tokenizer = Tokenizer.from_file(model_file)
    decoder = StreamingDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode("🦙")]
    assert [p for p in parts if p] == ["🦙"]
    decoder.push(tokenizer.encode("🦙")[-4])
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""


def test_refusals(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="pass --tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "no.model")
    with pytest.raises(TokenizerError, match="expected 00; fetch it again"):
        Tokenizer.from_file(model_file, sha256="00")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match="is damaged"):
        Tokenizer.from_file(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="outside the vocabulary of 330"):
        Tokenizer.from_file(model_file).piece_bytes(330)
