"""Shapes, names, configurations and tokenizers that can be read but are no OpenELM's are refused,
and the words say why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import again, trained_tokenizer
from golden_set import NANO

from openelm_mlx.convert.opening import check_no_adapter
from openelm_mlx.convert.sources import infer_config
from openelm_mlx.convert.tokenizers import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    TokenizerModel,
    assemble,
    build_tokenizer_json,
    read_tokenizer,
)
from openelm_mlx.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    OpenELMError,
    TokenizerError,
)
from openelm_mlx.files import read_json, read_yaml
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.model.names import canonical

# shapes and names

LAYER = {
    "transformer.layers.0." + name.split(".", 3)[3]: shape
    for name, shape in expected_tensors(OpenELMConfig.from_name("270m")).items()
    if ".layers.0." in name
}
SHAPES = {"transformer.token_embeddings.weight": (32000, 1280)} | LAYER


@pytest.mark.parametrize(
    ("change", "head_dim", "message"),
    [
        ({}, 32, "--head-dim 32 contradicts q_norm, which has 64 entries"),
        (
            {"transformer.layers.2.x": (1,)},
            None,
            "the checkpoint is incomplete: layer 1 is missing and layer 2 present",
        ),
        (
            {"transformer.token_embeddings.weight": (9,)},
            None,
            r"weight has shape \(9,\); it must be a matrix",
        ),
        (
            {"transformer.layers.0.attn.q_norm.weight": (50,)},
            None,
            "layer 0: qkv_proj has 1152 rows and out_proj 768 columns",
        ),
    ],
)
def test_shapes_that_are_no_openelm(change, head_dim, message):
    with pytest.raises(OpenELMError, match=message):
        infer_config(SHAPES | change, {}, head_dim)


def test_another_model_is_no_openelm():
    with pytest.raises(
        OpenELMError,
        match="this is not an OpenELM checkpoint: it contains no tensor named layers.0.attn.qkv",
    ):
        infer_config({"model.layers.0.self_attn.q_proj.weight": (1, 1)}, {})


def test_names_that_mean_one_tensor_or_none_known():
    with pytest.raises(
        CheckpointError,
        match="contains both norm.weight and transformer.norm.weight, which are one tensor",
    ):
        canonical({"norm.weight": 1, "transformer.norm.weight": 2})
    with pytest.raises(
        ConversionError,
        match="the checkpoint contains an adapter .*lora_C.weight.; only complete models",
    ):
        check_no_adapter(["transformer.layers.0.attn.qkv_proj.lora_C.weight"])


# configurations


def test_configurations_beyond_all_size(tmp_path):
    (tmp_path / "c").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(
        ConfigError, match="c is not a configuration: it has more than 4194304 bytes"
    ):
        read_json(tmp_path / "c")
    with pytest.raises(
        ConfigError, match="c is not a configuration: it has more than 262144 bytes"
    ):
        read_yaml(tmp_path / "c")


@pytest.mark.parametrize(
    "text", ["a: &a {b: 1}\nc: {<<: *a}", "[" * 1500, "a: [", "\x00", "{a: b}: c", "a: 2020-99-99"]
)
def test_yaml_that_is_not_read(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="c.yaml cannot be read as YAML: "):
        read_yaml(tmp_path / "c.yaml")


def test_layers_beyond_all_measure():
    with pytest.raises(
        ConfigError, match="num_transformer_layers is 1000000; it must be at most 4096"
    ):
        OpenELMConfig(model_dim=64, head_dim=8, num_transformer_layers=1_000_000)


# tokenizers


def pieces(*names: str) -> TokenizerModel:
    kinds = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(names) - 3)
    return assemble(Path("here"), names, [0.0] * len(names), kinds)


def test_tokenizers_of_another_kind(tmp_path):
    with pytest.raises(
        TokenizerError,
        match="here has a piece of 200 characters; OpenELM's tokenizer has at most 16",
    ):
        build_tokenizer_json(pieces("<unk>", "<s>", "</s>", "a" * 200))
    with pytest.raises(
        TokenizerError, match="here has 2 pieces; <unk>, <s> and </s> must be the first three"
    ):
        build_tokenizer_json(assemble(Path("here"), ("<unk>", "a"), (0.0, 0.0), (UNKNOWN, NORMAL)))
    import io

    import sentencepiece

    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time"] * 9),
        model_writer=other,
        vocab_size=20,
        model_type="unigram",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(
        TokenizerError,
        match="is not a SentencePiece model of LLaMA's kind .BPE, identity normalization, dummy",
    ):
        build_tokenizer_json(TokenizerModel(Path("here"), other.getvalue()))
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"pattern": {"Regex": "(a+)+$"}}}')
    with pytest.raises(
        TokenizerError,
        match="is not a tokenizer of LLaMA's kind: it has a regex; pass --tokenizer",
    ):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_bytes_pieces_are_told_by_their_kind():
    model = pieces("<unk>", "<s>", "</s>", "▁", "a", "▁a")
    assert model.processor.encode("a a") == [5, 5]
    with_bytes = assemble(
        Path("x"),
        ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
        [0.0] * 259,
        [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256,
    )
    assert with_bytes.processor.encode("é")[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert TokenizerModel(Path("x"), trained_tokenizer(64)).num_pieces == 64


def test_a_tokenizer_json_that_cannot_be_rebuilt(tmp_path, nano):
    raw = json.loads((nano / "tokenizer.json").read_text())
    raw["normalizer"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(
        TokenizerError,
        match="is not a tokenizer of LLaMA's kind: .* would get other ids; give the original",
    ):
        read_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(
        TokenizerError,
        match="is not a BPE tokenizer that can be read .* give the original tokenizer.model",
    ):
        read_tokenizer(path)
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(TokenizerError, match="cannot be read as a SentencePiece model"):
        read_tokenizer(path)
    with pytest.raises(TokenizerError, match="cannot be read: "):
        read_tokenizer(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 30)  # sparse: takes no room
    with pytest.raises(TokenizerError, match="is not a tokenizer: it has more than"):
        read_tokenizer(path)


def test_a_tokenizer_that_does_not_exist(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere does not exist; --tokenizer takes"):
        again(NANO / "checkpoint.pt", tmp_path / "m", tokenizer=tmp_path / "nowhere")
