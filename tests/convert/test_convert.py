"""A conversion writes what its source has, or names what is wrong with it and writes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import random_folder, tokenizer_file
from golden_set import FLAGS, GOLDEN, NANO
from safetensors.numpy import save_file

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    OptionError,
    TokenizerError,
)
from openelm_mlx.model.config import OpenELMConfig, expected_tensors, layer_shapes

PLAIN = ("tied-gqa4", "untied-mha", "noqknorm-gqa2", "noglu-gqa2", "gpt-test")


def broken(nano: Path, tmp_path: Path, change) -> Path:
    """A copy of the nano folder whose tensors `change` altered."""
    source = tmp_path / "source"
    shutil.copytree(nano, source)
    tensors = {
        name: np.array(array) for name, array in mx.load(str(source / "model.safetensors")).items()
    }
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    return source


@contextmanager
def raises_and_leaves_nothing(tmp_path: Path, error, message: str) -> Iterator[Path]:
    """A conversion to the target that is given here fails with this text and leaves nothing."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(error, match=message):
        yield out / "new" / "model"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", PLAIN)
def test_shapes_are_read_off_the_tensors(name, tmp_path):
    arch = json.loads((GOLDEN / name / "arch.json").read_text())
    tokenizer = tokenizer_file(tmp_path, arch["vocab_size"]) if arch["vocab_size"] > 30 else None
    report = convert(
        ConvertOptions(
            source=GOLDEN / name / "checkpoint.pt",
            target=tmp_path / "m",
            tokenizer=tokenizer,
            **FLAGS.get(name, {}),
        )
    )
    config = OpenELMConfig.from_file(tmp_path / "m" / "config.json")
    shapes = layer_shapes(config)
    assert [s.q_heads for s in shapes] == arch["num_query_heads"]
    assert [s.kv_heads for s in shapes] == arch["num_kv_heads"]
    assert [s.ffn_dim for s in shapes] == arch["ffn_dims"]
    assert config.num_gqa_groups == arch["num_query_heads"][0] // arch["num_kv_heads"][0]
    for key in (
        "head_dim",
        "ffn_with_glu",
        "normalize_qk_projections",
        "share_input_output_layers",
        "rope_freq_constant",
        "max_context_length",
        "model_dim",
    ):
        assert getattr(config, key) == arch[key]
    assert report.parameters == config.num_parameters == arch["num_parameters"]
    assert report.bits_per_weight == 32
    written = mx.load(str(tmp_path / "m" / "model.safetensors"))
    original = TorchCheckpoint(GOLDEN / name / "checkpoint.pt")
    assert {k: v.shape for k, v in written.items()} == expected_tensors(config)
    assert mx.array_equal(
        written["transformer.norm.weight"], original.load("transformer.norm.weight")
    )


def test_head_dim_is_asked_for_by_name(tmp_path):
    with raises_and_leaves_nothing(tmp_path, ConversionError, "--head-dim") as target:
        convert(ConvertOptions(GOLDEN / "noqknorm-gqa2" / "checkpoint.pt", target))


def test_mlx_lm_gives_the_golden_tokens(tmp_path, nano):
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    golden = np.load(NANO / "golden.npz")
    model, tokenizer = load(str(nano))
    prompt = mx.array(golden["input_ids"][0])
    logits = np.array(model(prompt[None]))
    assert np.abs(logits - golden["logits"]).max() < 1e-4
    want = golden["greedy_ids"].flatten().tolist()
    steps = generate_step(prompt, model, max_tokens=len(want))
    assert [int(token) for token, _ in steps] == want
    mx.synchronize()
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    for text in ("Once upon a time", " two  spaces ", "日本 🙂\n\tx", "don't"):
        assert tokenizer.encode(text) == [1, *spm.encode(text)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_weights_are_mlxs(bits, tmp_path):
    options = ConvertOptions(
        source=NANO / "checkpoint.pt", target=tmp_path / "m", bits=bits, group_size=32
    )
    report = convert(options)
    written = mx.load(str(tmp_path / "m" / "model.safetensors"))
    original = TorchCheckpoint(NANO / "checkpoint.pt").load(
        "transformer.layers.1.ffn.proj_2.weight"
    )
    stem = "transformer.layers.1.ffn.proj_2."
    for part, want in zip(
        ("weight", "scales", "biases"), mx.quantize(original, group_size=32, bits=bits), strict=True
    ):
        assert mx.array_equal(written[stem + part], want)
    assert report.written_bytes == sum(array.nbytes for array in written.values())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization"] == {
        "group_size": 32,
        "bits": bits,
        "mode": "affine",
    }


def test_rows_that_do_not_divide_are_refused_by_name(tmp_path):
    source, tokenizer = GOLDEN / "untied-mha" / "checkpoint.pt", tokenizer_file(tmp_path, 112)
    message = "token_embeddings.weight has rows of 96 weights.*use --group-size 32|proj_2"
    with raises_and_leaves_nothing(tmp_path, ConversionError, message) as target:
        convert(ConvertOptions(source, target, tokenizer=tokenizer, bits=4, group_size=128))
    (other := tmp_path / "other").mkdir()
    with raises_and_leaves_nothing(
        other, ConversionError, "; use a recipe with groups of 32$"
    ) as target:
        convert(ConvertOptions(source, target, tokenizer=tokenizer, recipe="mixed-3-4"))


def test_a_source_without_tokenizer(tmp_path):
    with raises_and_leaves_nothing(
        tmp_path, TokenizerError, "no tokenizer.model beside .*--tokenizer"
    ) as target:
        convert(ConvertOptions(GOLDEN / "tied-gqa4" / "checkpoint.pt", target))


def test_padded_embeddings_are_trimmed(tmp_path, nano):
    def pad(tensors):
        name = "transformer.token_embeddings.weight"
        tensors[name] = np.concatenate([tensors[name], np.zeros((128, 128), np.float32)])

    source = broken(nano, tmp_path, pad)
    raw = json.loads((source / "config.json").read_text()) | {"vocab_size": 4224}
    for padding in (4095, 4096, None):  # the last row that stays, the first that goes
        raw["padding_index"] = padding
        (source / "config.json").write_text(json.dumps(raw))
        options = ConvertOptions(source=source, target=tmp_path / "m", force=True)
        report = convert(options)
        assert report.dropped_rows == 128
        assert report.config.padding_index == (4095 if padding == 4095 else None)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        nano / "model.safetensors"
    ).read_bytes()


N = "transformer.layers.2.attn.out_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(N), rf"1 missing \({N}\)"),
        (
            lambda t: t.update({"transformer.extra": np.zeros(3)}),
            r"1 the model does not have \(transformer.extra\)",
        ),
        (
            lambda t: t.update({N: np.zeros((128, 64), np.float32)}),
            rf"{N} has shape \(128, 64\) where .* \(128, 128\)",
        ),
        (lambda t: t.update({N: np.full((128, 128), np.nan, np.float32)}), f"{N} has NaN"),
        (lambda t: t.update({N: np.zeros((128, 128), np.int32)}), f"{N} is int32"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, nano, change, message):
    with raises_and_leaves_nothing(tmp_path, CheckpointError, message) as target:
        convert(ConvertOptions(broken(nano, tmp_path, change), target))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf], ids=str)
def test_one_weight_that_is_no_number_is_found_in_every_type(tmp_path, dtype, value):
    source = random_folder(tmp_path / "source")
    name, file = "transformer.layers.0.ffn.proj_2.weight", str(source / "model.safetensors")
    tensors = {key: array.astype(dtype) for key, array in mx.load(file).items()}
    tensors[name][3, 5] = value
    mx.save_safetensors(file, tensors)
    with raises_and_leaves_nothing(
        tmp_path, CheckpointError, f"{name} has NaN or infinite"
    ) as target:
        convert(ConvertOptions(source, target))


def test_overflowing_float16(tmp_path, nano):
    source = broken(nano, tmp_path, lambda t: t.update({N: np.full((128, 128), 1e6, np.float32)}))
    with raises_and_leaves_nothing(tmp_path, ConversionError, "overflows float16") as target:
        convert(ConvertOptions(source, target, dtype="float16"))


def test_misspelt_config_field(tmp_path, nano):
    source = broken(nano, tmp_path, lambda t: None)
    raw = json.loads((source / "config.json").read_text()) | {"head_dmi": 64}
    (source / "config.json").write_text(json.dumps(raw))
    with raises_and_leaves_nothing(
        tmp_path, ConfigError, "head_dmi .did you mean head_dim"
    ) as target:
        convert(ConvertOptions(source, target))


def test_vocabulary_mismatch(tmp_path):
    source, tokenizer = GOLDEN / "tied-gqa4" / "checkpoint.pt", NANO / "tokenizer.model"
    with raises_and_leaves_nothing(
        tmp_path, TokenizerError, "4096 pieces, but the model 128 rows"
    ) as target:
        convert(ConvertOptions(source, target, tokenizer=tokenizer))


def test_truncated_source(tmp_path, nano):
    source = tmp_path / "source"
    shutil.copytree(nano, source)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1000])
    with raises_and_leaves_nothing(tmp_path, CheckpointError, "is truncated") as target:
        convert(ConvertOptions(source, target))


def test_shards_with_path_tricks(tmp_path, nano):
    source = tmp_path / "source"
    shutil.copytree(nano, source)
    index = {"weight_map": {"transformer.norm.weight": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "shards must be .safetensors files of this folder"
    with raises_and_leaves_nothing(tmp_path, CheckpointError, message) as target:
        convert(ConvertOptions(source, target))


def test_existing_target_needs_force(tmp_path):
    options = ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "m")
    convert(options)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(
        ConversionError, match="exists; choose another folder, or replace it with --force"
    ):
        convert(replace(options, bits=4))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    convert(replace(options, bits=4, force=True))
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < len(before) / 3
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def interrupt(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "a" / "b"),
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on file size stands for a full disk: writing fails in the middle in the same way."""
    code = (
        "import resource, sys; from openelm_mlx.convert import convert, ConvertOptions\n"
        "from openelm_mlx.errors import ConversionError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: convert(ConvertOptions(source=sys.argv[1], target=sys.argv[2]))\n"
        "except ConversionError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, NANO / "checkpoint.pt", tmp_path / "m"],
        capture_output=True,
        text=True,
    )
    assert "cannot be written: File too large" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="file is not a folder"):
        convert(ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "file" / "m"))


@pytest.mark.parametrize(
    "field", [{"bits": 7}, {"group_size": 48}, {"dtype": "int8"}, {"head_dim": 1}]
)
def test_options_are_checked(field):
    with pytest.raises(OptionError, match=next(iter(field))):
        ConvertOptions(source="a", target="b", **field)
