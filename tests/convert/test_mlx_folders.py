"""Folders that MLX, mlx-lm or CoreNet wrote stay quantized as they are, or are dequantized."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import again, mlx_lm_logits, our_logits, random_folder, tokenizer_file, weights
from golden_set import GOLDEN, NANO

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.opening import open_source
from openelm_mlx.convert.quantize import rounding
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.tokenizers import read_tokenizer
from openelm_mlx.device import mx, nn
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import CheckpointError, ConfigError, OpenELMError
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import QuantSpec

N = "transformer.layers.2.ffn.proj_1"


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 3},
        {"mode": "mxfp4"},
        {"mode": "mxfp8"},
        {"mode": "nvfp4"},
    ],
)
def test_a_quantized_folder_stays_as_it_is_or_becomes_whole(tmp_path, nano, form):
    quantized = again(nano, tmp_path / "q", dtype="bfloat16", **form)
    same = again(quantized, tmp_path / "same")
    assert (same / "model.safetensors").read_bytes() == (
        quantized / "model.safetensors"
    ).read_bytes()
    assert json.loads((same / "config.json").read_text()) == json.loads(
        (quantized / "config.json").read_text()
    )
    whole = weights(again(quantized, tmp_path / "whole", dtype="float32"))
    stored, settings = (
        weights(quantized),
        json.loads((quantized / "config.json").read_text())["quantization"],
    )
    parts = [
        stored[f"{N}.{part}"] for part in ("weight", "scales", "biases") if f"{N}.{part}" in stored
    ]
    parts = [
        part if part.dtype in (mx.uint8, mx.uint32) else part.astype(mx.float32) for part in parts
    ]
    want = mx.dequantize(*parts, **settings, dtype=mx.float32)
    scale_type = stored[f"{N}.scales"].dtype if "biases" in str(stored.keys()) else mx.bfloat16
    assert mx.array_equal(whole[f"{N}.weight"], want.astype(scale_type).astype(mx.float32))
    spec = QuantSpec(**settings)
    anew = weights(again(quantized, tmp_path / "anew", dtype="float32", **form))
    packed = rounding.quantized(f"{N}.weight", whole[f"{N}.weight"], spec)
    for name, array in packed.items():  # the scales are of the type that was asked for
        assert anew[name].dtype == array.dtype and mx.array_equal(anew[name], array)


def test_a_block_format_is_unpacked_in_the_type_of_the_vectors(tmp_path, nano):
    """Its scales are bytes and say nothing of it."""
    for dtype in ("float16", "float32"):
        quantized = again(nano, tmp_path / dtype, dtype=dtype, mode="mxfp4")
        source = open_source(quantized)
        name = f"{N}.weight"
        assert source.tensors[name].dtype == dtype
        assert source.load(name).dtype == source.load("transformer.norm.weight").dtype


def test_a_folder_may_have_other_safetensors_beside_the_model(tmp_path, nano):
    folder = shutil.copytree(nano, tmp_path / "model")
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x": mx.zeros(3)})
    assert open_source(folder).tensors == open_source(nano).tensors


def test_a_folder_mlx_lm_wrote_with_settings_of_its_own_per_layer(tmp_path, nano):
    """mlx-lm's own writer, its tokenizer.json without tokenizer.model, one layer finer and one
    unquantized.
    """
    from mlx_lm.utils import load, quantize_model, save

    model, tokenizer, config = load(str(nano), return_config=True)

    def choose(path, module):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or path.endswith("out_proj"):
            return False
        return {"bits": 8, "group_size": 32} if path.endswith("proj_2") else True

    model, config = quantize_model(model, config, 64, 4, quant_predicate=choose)
    save(tmp_path / "theirs", str(nano), model, tokenizer, config)
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    tokens = np.load(NANO / "golden.npz")["input_ids"]
    theirs = mlx_lm_logits(tmp_path / "theirs", tokens)
    kept = again(tmp_path / "theirs", tmp_path / "kept")
    assert np.array_equal(mlx_lm_logits(kept, tokens), theirs)
    assert (
        np.abs(
            our_logits(again(tmp_path / "theirs", tmp_path / "w", dtype="float32"), tokens) - theirs
        ).max()
        < 1e-3
    )
    original = read_tokenizer(NANO / "tokenizer.model").processor
    rebuilt = read_tokenizer(kept / "tokenizer.model").processor
    for text in ("Once upon a time, two  birds", " naïve 日本", "\tx</s>"):
        assert rebuilt.encode(text) == original.encode(text)


def corenet_mlx(folder: Path, bits: int | None) -> Path:
    """What CoreNet's mlx_examples/open_elm/convert.py writes: its names, three keys, linear layers
    quantized only.
    """
    folder.mkdir()
    source = TorchCheckpoint(GOLDEN / "tied-gqa4" / "checkpoint.pt")
    named = {name.removeprefix("transformer."): source.load(name) for name in source.tensors}
    arrays, config = {}, {"model_name": "golden", "vocab_size": 128, "max_context_length": 64}
    for name, array in named.items():
        array = array.astype(mx.float16)
        if bits and array.ndim == 2 and name != "token_embeddings.weight":
            for part, value in zip(
                ("weight", "scales", "biases"), mx.quantize(array, 32, bits), strict=True
            ):
                arrays[name.removesuffix("weight") + part] = value
            config["quantization"] = {"group_size": 32, "bits": bits}
        else:
            arrays[name] = array
    mx.save_safetensors(str(folder / "weights.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_file(folder, 128).rename(folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("bits", [None, 4])
def test_corenets_own_mlx_folders(tmp_path, bits):
    source = corenet_mlx(tmp_path / "theirs", bits)
    target = again(source, tmp_path / "m")
    golden = np.load(GOLDEN / "tied-gqa4" / "golden.npz")
    logits = mlx_lm_logits(target, golden["input_ids"])
    whole = (
        golden["logits"]
        if bits is None
        else our_logits(again(source, tmp_path / "w", dtype="float32"), golden["input_ids"])
    )
    assert np.abs(logits - whole).max() < 0.15  # float16 all the way through
    written, stored = weights(target), mx.load(str(source / "weights.safetensors"))
    assert mx.array_equal(
        written["transformer.layers.0.attn.qkv_proj.weight"],
        stored["layers.0.attn.qkv_proj.weight"],
    )
    assert "transformer.token_embeddings.scales" not in written
    assert OpenELMConfig.from_file(target / "config.json").max_context_length == 64


def test_a_width_this_project_does_not_write_becomes_whole(tmp_path):
    source = corenet_mlx(tmp_path / "theirs", 1)
    assert open_source(source).plan == {}
    written = weights(again(source, tmp_path / "m"))
    name = "layers.1.ffn.proj_2.weight"
    assert mx.array_equal(
        written["transformer." + name], open_source(source).load("transformer." + name)
    )


def test_a_layers_own_entry_is_found_under_corenets_name(tmp_path):
    source = corenet_mlx(tmp_path / "theirs", 4)
    config = json.loads((source / "config.json").read_text())
    tensors = mx.load(str(source / "weights.safetensors"))
    stem = "layers.1.ffn.proj_2"
    matrix = open_source(source).load(f"transformer.{stem}.weight")
    for part, value in zip(("weight", "scales", "biases"), mx.quantize(matrix, 32, 8), strict=True):
        tensors[f"{stem}.{part}"] = value
    config["quantization"][stem] = {"group_size": 32, "bits": 8}
    (source / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(source / "weights.safetensors"), tensors)
    again = open_source(source)
    assert again.plan[f"transformer.{stem}"].bits == 8
    assert mx.allclose(again.load(f"transformer.{stem}.weight"), matrix, atol=0.01).item()


def test_packed_weights_mean_what_they_meant_in_mlx_0_10(tmp_path):
    """mlx v0.10.0, mlx/ops.cpp, dequantize: eight 4-bit numbers a word, lowest first, times scale
    plus bias.
    """
    source = corenet_mlx(tmp_path / "theirs", 4)
    stem = "layers.1.ffn.proj_2."
    stored = {
        part: np.array(a)
        for part in ("weight", "scales", "biases")
        for a in [mx.load(str(source / "weights.safetensors"))[stem + part]]
    }
    numbers = np.stack([(stored["weight"] >> shift) & 15 for shift in range(0, 32, 4)], axis=-1)
    groups = numbers.reshape(*stored["scales"].shape, 32).astype(np.float32)
    whole = groups * stored["scales"][..., None].astype(np.float32) + stored["biases"][
        ..., None
    ].astype(np.float32)
    loaded = open_source(source).load(f"transformer.{stem}weight")
    np.testing.assert_array_equal(np.array(loaded), whole.reshape(loaded.shape).astype(np.float16))


def test_a_published_size_in_corenets_config(tmp_path):
    """`model_name` alone names the shapes there."""
    from openelm_mlx.convert.opening import config_for
    from openelm_mlx.model.config import expected_tensors

    size = OpenELMConfig.from_name("270m")
    raw = {"model_name": "OpenELM-270M", "vocab_size": 32000, "max_context_length": 2048}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shapes, options = expected_tensors(size), ConvertOptions(source=tmp_path, target="x")
    assert config_for(tmp_path, shapes, options) == size
    # a head of its own is what the tensors tell, not the size's name
    apart = replace(size, share_input_output_layers=False)
    assert config_for(tmp_path, expected_tensors(apart), options) == apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: c.pop("quantization"),
            "contains quantized weights, but its config.json has no quantization",
        ),
        (
            lambda c, t: c["quantization"].update(mode="x"),
            "in mode 'x'; MLX has affine, mxfp4, mxfp8, nvfp4",
        ),
        (
            lambda c, t: c["quantization"].update(bits=7),
            "to 7 bits in groups of 32, which MLX does not have in mode affine",
        ),
        (
            lambda c, t: c["quantization"].update(bits=8),
            "do not make a matrix of 8 bits in groups of 32",
        ),
        (
            lambda c, t: c["quantization"].update(mode="mxfp4"),
            "do not make a matrix of 4 bits in groups of 32 .mxfp4",
        ),
        (
            lambda c, t: t.pop("layers.0.ffn.proj_2.weight"),
            "layers.0.ffn.proj_2.scales has no weight beside it",
        ),
        (lambda c, t: t.pop("layers.0.ffn.proj_2.biases"), r"biases none\) do not make a matrix"),
        (
            lambda c, t: t.update({"layers.0.ffn.proj_2.scales": t["norm.weight"]}),
            r"scales float16 \[128\]",
        ),
    ],
)
def test_quantized_folders_whose_parts_do_not_fit(tmp_path, change, message):
    source = corenet_mlx(tmp_path / "theirs", 4)
    config, tensors = (
        json.loads((source / "config.json").read_text()),
        mx.load(str(source / "weights.safetensors")),
    )
    change(config, tensors)
    (source / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(source / "weights.safetensors"), tensors)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_source(source)


def test_scales_that_are_no_numbers(tmp_path):
    source = corenet_mlx(tmp_path / "theirs", 4)
    tensors = mx.load(str(source / "weights.safetensors"))
    tensors["layers.0.ffn.proj_2.scales"] = tensors["layers.0.ffn.proj_2.scales"] * mx.array(
        float("nan"), mx.float16
    )
    mx.save_safetensors(str(source / "weights.safetensors"), tensors)
    with pytest.raises(OpenELMError, match="layers.0.ffn.proj_2.scales has NaN or infinite scales"):
        again(source, tmp_path / "m")
    with pytest.raises(OpenELMError, match="layers.0.ffn.proj_2.weight has NaN"):
        again(source, tmp_path / "m", dtype="float32", measure=False)
    with pytest.raises(OpenELMError, match="layers.0.ffn.proj_2.scales has NaN or infinite scales"):
        again(source, tmp_path / "m", dtype="float32")  # what is measured reads them first
    assert not (tmp_path / "m").exists()


def test_a_source_that_is_quantized_has_packed_arrays_only_there():
    source = TorchCheckpoint(NANO / "checkpoint.pt")
    with pytest.raises(KeyError):
        source.packed("transformer.norm.weight")
    assert source.plan == {} and np.array(source.load("transformer.norm.weight")).ndim == 1


def test_how_a_model_chats_goes_along_and_mlx_lm_reads_the_folder(tmp_path):
    """Apple's defaults where the source has none of its own; a text ends at any id that either file
    names.
    """
    from mlx_lm.utils import load as mlx_lm_load

    source = random_folder(tmp_path / "source")
    written = json.loads((again(source, tmp_path / "a") / "generation_config.json").read_text())
    assert written == {
        "do_sample": False,
        "repetition_penalty": 1.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    stated = {
        "do_sample": True,
        "temperature": 0.6,
        "eos_token_id": 7,
        "transformers_version": "4.39.3",
    }
    (source / "generation_config.json").write_text(json.dumps(stated))
    target = again(source, tmp_path / "b", dtype="float16")
    written = json.loads((target / "generation_config.json").read_text())
    assert written == stated | {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert load(target).config.eos_token_ids == load(source).config.eos_token_ids == (2, 7)
    assert (
        load(target).chat_sampling == load(source).chat_sampling == SamplingOptions(temperature=0.6)
    )
    _, tokenizer = mlx_lm_load(str(target))
    assert set(tokenizer.eos_token_ids) == {2, 7}
