from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from formats import GOLDEN, NANO, mlx_lm_logits, our_logits, tokenizer_file
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.sources import open_source
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.tokenizer_model import read_tokenizer

from openelm_mlx.config import OpenELMConfig
from openelm_mlx.errors import ConfigError, ConversionError, OpenELMError, TokenizerError

N = "transformer.layers.2.ffn.proj_1"


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("nano") / "nano"
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=target))
    return target


def weights(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def again(source: Path, target: Path, **fields) -> Path:
    convert(ConvertOptions(source=source, target=target, **fields))
    return target


# what a source is, by its content


def test_a_format_is_found_by_content_not_by_name(tmp_path, nano):
    shutil.copy(NANO / "checkpoint.pt", tmp_path / "weights.gguf")
    assert isinstance(open_source(tmp_path / "weights.gguf"), TorchCheckpoint)
    again(nano, tmp_path / "g", target_format="gguf")
    (tmp_path / "g").rename(tmp_path / "model.pt")
    assert isinstance(open_source(tmp_path / "model.pt"), GGUFFile)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.pt").rename(tmp_path / "folder" / "model.safetensors")
    assert isinstance(open_source(tmp_path / "folder"), GGUFFile)


def test_from_forces_a_format(tmp_path, nano):
    source = tmp_path / "both"
    shutil.copytree(nano, source)
    shutil.copy(NANO / "checkpoint.pt", source / "checkpoint.pt")
    assert open_source(source).tensors.keys() == weights(nano).keys()
    assert isinstance(open_source(source, "pt"), TorchCheckpoint)
    with pytest.raises(ConversionError, match="holds nothing that --from gguf reads"):
        open_source(source, "gguf")
    with pytest.raises(ConversionError, match="is no GGUF file"):
        open_source(NANO / "checkpoint.pt", "gguf")
    with pytest.raises(ConversionError, match="is no folder; --from mlx takes the folder of a model"):
        open_source(NANO / "checkpoint.pt", "mlx")
    with pytest.raises(ConversionError, match="no checkpoint of torch.save"):
        open_source(nano / "config.json", "pt")


def test_sources_that_are_none(tmp_path, nano):
    with pytest.raises(ConversionError, match="does not exist; give a CoreNet .pt file, a folder of safetensors or a GGUF"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ConversionError, match="holds neither safetensors nor a .pt or GGUF file"):
        open_source(tmp_path)
    with pytest.raises(ConversionError, match="is one file of a model; give its folder"):
        open_source(nano / "model.safetensors")
    for name in ("a", "b"):
        shutil.copy(NANO / "checkpoint.pt", tmp_path / name)
    with pytest.raises(ConversionError, match="holds 2 pt files; name one of them"):
        open_source(tmp_path)


def test_a_folder_without_config_is_read_off_its_shapes(tmp_path, nano):
    shutil.copytree(nano, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    opened = open_model(ConvertOptions(source=tmp_path / "bare", target=tmp_path / "m"))
    assert opened.trimmed.num_parameters == OpenELMConfig.from_file(nano / "config.json").num_parameters


# folders that MLX quantized


@pytest.mark.parametrize(
    "form", [{"bits": 4, "group_size": 32}, {"bits": 3}, {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"}]
)
def test_a_quantized_folder_stays_as_it_is_or_becomes_whole(tmp_path, nano, form):
    quantized = again(nano, tmp_path / "q", dtype="bfloat16", **form)
    same = again(quantized, tmp_path / "same")
    assert (same / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()
    assert json.loads((same / "config.json").read_text()) == json.loads((quantized / "config.json").read_text())
    whole = weights(again(quantized, tmp_path / "whole", dtype="float32"))
    stored, settings = weights(quantized), json.loads((quantized / "config.json").read_text())["quantization"]
    parts = [stored[f"{N}.{part}"] for part in ("weight", "scales", "biases") if f"{N}.{part}" in stored]
    parts = [part if part.dtype in (mx.uint8, mx.uint32) else part.astype(mx.float32) for part in parts]
    want = mx.dequantize(*parts, **settings, dtype=mx.float32)
    scale_type = stored[f"{N}.scales"].dtype if "biases" in str(stored.keys()) else mx.bfloat16
    assert mx.array_equal(whole[f"{N}.weight"], want.astype(scale_type).astype(mx.float32))


def test_a_folder_mlx_lm_wrote_with_settings_of_its_own_per_layer(tmp_path, nano):
    """mlx-lm's own writer, its tokenizer.json without tokenizer.model, one layer finer and one whole."""
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
    assert np.abs(our_logits(again(tmp_path / "theirs", tmp_path / "w", dtype="float32"), tokens) - theirs).max() < 1e-3
    original = read_tokenizer(NANO / "tokenizer.model").processor
    rebuilt = read_tokenizer(kept / "tokenizer.model").processor
    for text in ("Once upon a time, two  birds", " naïve 日本", "\tx</s>"):
        assert rebuilt.encode(text) == original.encode(text)


def corenet_mlx(folder: Path, bits: int | None) -> Path:
    """What CoreNet's mlx_examples/open_elm/convert.py writes: its names, three keys, linear layers quantized only."""
    folder.mkdir()
    source = TorchCheckpoint(GOLDEN / "tied-gqa4" / "checkpoint.pt")
    arrays, config = {}, {"model_name": "golden", "vocab_size": 128, "max_context_length": 64}
    for name in source.tensors:
        array = source.load(name).astype(mx.float16)
        if bits and array.ndim == 2 and name != "token_embeddings.weight":
            for part, value in zip(("weight", "scales", "biases"), mx.quantize(array, 32, bits), strict=True):
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
    whole = golden["logits"] if bits is None else our_logits(again(source, tmp_path / "w", dtype="float32"), golden["input_ids"])
    assert np.abs(logits - whole).max() < 0.15  # float16 all the way through
    written, stored = weights(target), mx.load(str(source / "weights.safetensors"))
    assert mx.array_equal(written["transformer.layers.0.attn.qkv_proj.weight"], stored["layers.0.attn.qkv_proj.weight"])
    assert "transformer.token_embeddings.scales" not in written
    assert OpenELMConfig.from_file(target / "config.json").max_context_length == 64


def test_a_width_this_project_does_not_write_becomes_whole(tmp_path):
    source = corenet_mlx(tmp_path / "theirs", 1)
    assert open_source(source).forms == {}
    written = weights(again(source, tmp_path / "m"))
    name = "layers.1.ffn.proj_2.weight"
    assert mx.array_equal(written["transformer." + name], open_source(source).load(name))


def test_packed_weights_mean_what_they_meant_in_mlx_0_10(tmp_path):
    """mlx v0.10.0, mlx/ops.cpp, dequantize: eight 4-bit numbers a word, lowest first, times scale plus bias."""
    source = corenet_mlx(tmp_path / "theirs", 4)
    stem = "layers.1.ffn.proj_2."
    stored = {part: np.array(a) for part in ("weight", "scales", "biases")
              for a in [mx.load(str(source / "weights.safetensors"))[stem + part]]}  # fmt: skip
    numbers = np.stack([(stored["weight"] >> shift) & 15 for shift in range(0, 32, 4)], axis=-1)
    groups = numbers.reshape(*stored["scales"].shape, 32).astype(np.float32)
    whole = groups * stored["scales"][..., None].astype(np.float32) + stored["biases"][..., None].astype(np.float32)
    loaded = open_source(source).load(stem + "weight")
    np.testing.assert_array_equal(np.array(loaded), whole.reshape(loaded.shape).astype(np.float16))


def test_a_published_size_in_corenets_config(tmp_path):
    """`model_name` alone names the shapes there."""
    from openelm_mlx.convert.infer import config_for

    from openelm_mlx.config import expected_tensors

    size = OpenELMConfig.from_name("270m")
    raw = {"model_name": "OpenELM-270M", "vocab_size": 32000, "max_context_length": 2048}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert config_for(tmp_path, expected_tensors(size), ConvertOptions(source=tmp_path, target="x")) == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("quantization"), "holds quantized weights, but its config.json has no quantization"),
        (lambda c, t: c["quantization"].update(mode="x"), "in mode 'x'; MLX has affine, mxfp4, mxfp8, nvfp4"),
        (lambda c, t: c["quantization"].update(bits=7), "to 7 bits in groups of 32, which MLX does not have in mode affine"),
        (lambda c, t: c["quantization"].update(bits=8), "do not make a matrix of 8 bits in groups of 32"),
        (lambda c, t: c["quantization"].update(mode="mxfp4"), "do not make a matrix of 4 bits in groups of 32 .mxfp4"),
        (lambda c, t: t.pop("layers.0.ffn.proj_2.weight"), "layers.0.ffn.proj_2.scales has no weight beside it"),
        (lambda c, t: t.pop("layers.0.ffn.proj_2.biases"), r"biases none\) do not make a matrix"),
        (lambda c, t: t.update({"layers.0.ffn.proj_2.scales": t["norm.weight"]}), r"scales float16 \[128\]"),
    ],
)
def test_quantized_folders_whose_parts_do_not_fit(tmp_path, change, message):
    source = corenet_mlx(tmp_path / "theirs", 4)
    config, tensors = json.loads((source / "config.json").read_text()), mx.load(str(source / "weights.safetensors"))
    change(config, tensors)
    (source / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(source / "weights.safetensors"), tensors)
    with pytest.raises(ConversionError, match=message):
        open_source(source)


def test_scales_that_are_no_numbers(tmp_path):
    source = corenet_mlx(tmp_path / "theirs", 4)
    tensors = mx.load(str(source / "weights.safetensors"))
    tensors["layers.0.ffn.proj_2.scales"] = tensors["layers.0.ffn.proj_2.scales"] * mx.array(float("nan"), mx.float16)
    mx.save_safetensors(str(source / "weights.safetensors"), tensors)
    with pytest.raises(OpenELMError, match="layers.0.ffn.proj_2.scales holds NaN or infinite scales"):
        again(source, tmp_path / "m")
    with pytest.raises(OpenELMError, match="layers.0.ffn.proj_2.weight holds NaN"):
        again(source, tmp_path / "m", dtype="float32")
    assert not (tmp_path / "m").exists()


# tokenizers


def test_a_tokenizer_json_that_cannot_be_rebuilt(tmp_path, nano):
    raw = json.loads((nano / "tokenizer.json").read_text())
    raw["normalizer"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="is no tokenizer of LLaMA's kind: .* would get other ids; give the original"):
        read_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(TokenizerError, match="is no BPE tokenizer that can be read .* give the original tokenizer.model"):
        read_tokenizer(path)
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(TokenizerError, match="cannot be read as a SentencePiece model"):
        read_tokenizer(path)
    with pytest.raises(TokenizerError, match="cannot be read: "):
        read_tokenizer(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 30)  # sparse: takes no room
    with pytest.raises(TokenizerError, match="is no tokenizer: it has more than"):
        read_tokenizer(path)


def test_a_tokenizer_that_does_not_exist(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere does not exist; --tokenizer takes"):
        again(NANO / "checkpoint.pt", tmp_path / "m", tokenizer=tmp_path / "nowhere")


# GGUF

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K"]


def rewritten(path: Path, target: Path, kind: str | None = None, change=None) -> Path:
    """A GGUF file written again by the gguf package, its matrices in another type, its keys changed."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {name: (field.contents(), field.types) for name, field in reader.fields.items() if name[:5] != "GGUF."}
    tensors = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    if kind is not None:
        chosen = gguf.GGMLQuantizationType[kind]
        tensors = {n: (encode(d, chosen), chosen) if d.ndim == 2 else (d, t) for n, (d, t) in tensors.items()}
    if change is not None:
        change(keys, tensors)
    architecture = keys.pop("general.architecture", (None,))[0]
    writer = gguf.GGUFWriter(target, architecture or "openelm")
    for name, (value, types) in keys.items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def encode(data: np.ndarray, kind) -> np.ndarray:
    """float32 rows in a GGUF type; K-quants, which the package only reads, as blocks of small random numbers."""
    import gguf

    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(0).integers(0, 256, (data.shape[0], data.shape[1] // block, size), dtype=np.uint8)
        scales = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q2_K": [80, 82], "Q3_K": [108]}[kind.name]
        for at in scales:
            data[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return data.reshape(data.shape[0], -1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A GGUF file whose rows divide by 256, as K-quants need."""
    folder = tmp_path_factory.mktemp("wide")
    config = OpenELMConfig(model_dim=256, head_dim=64, num_transformer_layers=2, vocab_size=64, num_gqa_groups=4,
                           ffn_multipliers=(1.0, 2.0), qkv_multipliers=(1.0, 1.0))  # fmt: skip
    from openelm_mlx.config import expected_tensors

    rng = np.random.default_rng(1)
    arrays = {n: mx.array(rng.normal(0, 0.05, s).astype(np.float32)) for n, s in expected_tensors(config).items()}
    (folder / "hf").mkdir()
    mx.save_safetensors(str(folder / "hf" / "model.safetensors"), arrays)
    (folder / "hf" / "config.json").write_text(json.dumps(config.to_hf_dict()))
    again(folder / "hf", folder / "wide.gguf", target_format="gguf", tokenizer=tokenizer_file(folder, 64))
    return folder / "wide.gguf"


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_format_is_read_as_the_gguf_package_reads_it(tmp_path, wide, kind):
    import gguf

    path = rewritten(wide, tmp_path / "x", kind)
    source = GGUFFile(path)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def want(name):
        return gguf.quants.dequantize(reader[name].data, reader[name].tensor_type)

    stem = "transformer.layers.1."
    assert source.tensors[stem + "attn_norm.weight"].dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    for name, stored in ((stem + "attn.qkv_proj", "blk.1.attn_qkv"), ("transformer.token_embeddings", "token_embd")):
        np.testing.assert_array_equal(np.array(source.load(f"{name}.weight").astype(mx.float32)), want(f"{stored}.weight"))
    joined = np.concatenate([want("blk.1.ffn_gate.weight"), want("blk.1.ffn_up.weight")])
    np.testing.assert_array_equal(np.array(source.load(stem + "ffn.proj_1.weight").astype(mx.float32)), joined)


def test_a_gguf_file_brings_its_config_and_tokenizer(tmp_path, nano):
    again(nano, tmp_path / "x.gguf", target_format="gguf")
    back = again(tmp_path / "x.gguf", tmp_path / "back")
    a, b = (OpenELMConfig.from_file(folder / "config.json") for folder in (nano, back))
    assert replace(b, qkv_multipliers=a.qkv_multipliers, ffn_multipliers=a.ffn_multipliers,
                   num_gqa_groups=a.num_gqa_groups, padding_index=a.padding_index) == a  # fmt: skip
    assert (back / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()


def set_key(name, value):
    return lambda keys, tensors: keys.update({name: (value, keys[name][1])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_key("general.architecture", "llama"), "model of architecture 'llama'; only openelm is converted"),
        (set_key("openelm.attention.head_count", [9, 9]), "says attention.head_count .9, 9.*, its tensors say otherwise"),
        (set_key("openelm.rope.freq_base", -1.0), "says openelm.rope.freq_base -1.0; it must be a number above 0"),
        (set_key("tokenizer.ggml.model", "gpt2"), "tokenizer of kind 'gpt2' with special ids .0, 1, 2., where OpenELM's"),
        (set_key("tokenizer.ggml.scores", [0.0]), "the lists of its tokenizer .* do not fit together"),
        (lambda k, t: k.update({"split.count": (3, k["general.file_type"][1])}), "is one part of 3; join them with llama-gguf"),
        (lambda k, t: t.update({"blk.0.ffn_up.weight": t["blk.0.attn_qkv.weight"]}), "shapes .* they must be two alike"),
        (lambda k, t: t.pop("blk.0.attn_output.weight"), "transformer.layers.0.attn.out_proj.weight"),
    ],
)
def test_gguf_files_that_do_not_fit(tmp_path, wide, change, message):
    with pytest.raises(OpenELMError, match=message):
        GGUFFile(rewritten(wide, tmp_path / "x", change=change))


def patched(path: Path, target: Path, at: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (4, b"\x01", "is a GGUF file of version 1; little-endian files of versions 2 and 3 are read"),
        (4, b"\x00\x00\x00\x03", "is a GGUF file big-endian"),
        (8, b"\xff" * 8, "claims 18446744073709551615 tensors"),
        (24, b"\xff" * 8, "its header needs bytes past the end"),
    ],
)
def test_damaged_gguf_headers(tmp_path, wide, at, data, message):
    with pytest.raises(ConversionError, match=message):
        GGUFFile(patched(wide, tmp_path / "x", at, data))


def test_gguf_places_and_types(tmp_path, wide):
    content = wide.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight")
    for offset, data, message in (
        (0, b"\x09", "has 9 dimensions"),
        (4, bytes(8), "is not made of F32 blocks"),
        (20, b"\xee", "token_embd.weight has type 238; readable are F32"),
        (24, b"\xff" * 7, "is truncated: tensor token_embd.weight ends at byte"),
    ):
        with pytest.raises(OpenELMError, match=message):
            GGUFFile(patched(wide, tmp_path / "x", at + offset, data))
    with pytest.raises(ConversionError, match="is truncated: tensor"):
        (tmp_path / "y").write_bytes(content[:-64])
        GGUFFile(tmp_path / "y")
    (tmp_path / "z").write_bytes(b"")
    with pytest.raises(ConversionError, match="cannot be read: cannot mmap an empty file"):
        GGUFFile(tmp_path / "z")


def test_a_gguf_without_tokenizer_needs_one(tmp_path, wide):
    path = rewritten(wide, tmp_path / "x", change=lambda k, t: k.pop("tokenizer.ggml.model"))
    with pytest.raises(TokenizerError, match="no tokenizer.model beside"):
        again(path, tmp_path / "m")
    again(path, tmp_path / "m", tokenizer=tokenizer_file(tmp_path, 64))


def test_head_dim_flag_against_metadata(tmp_path, wide):
    with pytest.raises((ConfigError, ConversionError), match="--head-dim 32 contradicts the configuration, which has 64"):
        again(wide, tmp_path / "m", head_dim=32)
