"""A GGUF file is read as the gguf package reads it, with its configuration and tokenizer, or
refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import WIDE, again, random_folder, tokenizer_file

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import kquants
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError, OpenELMError, TokenizerError
from openelm_mlx.model.config import OpenELMConfig

KINDS = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q6_K",
    "Q2_K",
    "Q3_K",
    "Q5_K",
    "IQ4_NL",
    "IQ4_XS",
]


def rewritten(path: Path, target: Path, kind: str | None = None, change=None) -> Path:
    """A GGUF file written again by the gguf package, its matrices in another type, its keys
    changed.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if name[:5] != "GGUF."
    }
    tensors = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    if kind is not None:
        chosen = gguf.GGMLQuantizationType[kind]
        tensors = {
            n: (encode(d, chosen), chosen) if d.ndim == 2 else (d, t)
            for n, (d, t) in tensors.items()
        }
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
    """Return float32 rows in a GGUF type, by the package's quantizers where it has them."""
    import gguf

    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        return kquants.encode(data, kind.name)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A GGUF file whose rows divide by 256, as K-quants need."""
    folder = tmp_path_factory.mktemp("wide")
    return again(
        random_folder(folder / "hf", WIDE, seed=1, spread=0.05),
        folder / "wide.gguf",
        target_format="gguf",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_format_is_read_as_the_gguf_package_reads_it(tmp_path, wide, kind):
    import gguf

    path = rewritten(wide, tmp_path / "x", kind)
    source = GGUFFile(path)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def want(name):
        return gguf.quants.dequantize(reader[name].data, reader[name].tensor_type)

    stem = "transformer.layers.1."
    assert source.tensors[stem + "attn_norm.weight"].dtype == {
        "F16": "float16",
        "BF16": "bfloat16",
    }.get(kind, "float32")
    for name, stored in (
        (stem + "attn.qkv_proj", "blk.1.attn_qkv"),
        ("transformer.token_embeddings", "token_embd"),
    ):
        np.testing.assert_array_equal(
            np.array(source.load(f"{name}.weight").astype(mx.float32)), want(f"{stored}.weight")
        )
    joined = np.concatenate([want("blk.1.ffn_gate.weight"), want("blk.1.ffn_up.weight")])
    np.testing.assert_array_equal(
        np.array(source.load(stem + "ffn.proj_1.weight").astype(mx.float32)), joined
    )


def test_a_gguf_file_brings_its_config_and_tokenizer(tmp_path, nano):
    again(nano, tmp_path / "x.gguf", target_format="gguf")
    back = again(tmp_path / "x.gguf", tmp_path / "back")
    a, b = (OpenELMConfig.from_file(folder / "config.json") for folder in (nano, back))
    assert (
        replace(
            b,
            qkv_multipliers=a.qkv_multipliers,
            ffn_multipliers=a.ffn_multipliers,
            num_gqa_groups=a.num_gqa_groups,
            padding_index=a.padding_index,
        )
        == a
    )
    assert (back / "tokenizer.json").read_bytes() == (nano / "tokenizer.json").read_bytes()


def test_a_head_beside_the_embeddings(tmp_path, wide):
    """One that repeats them is left out; another one is the model's own."""

    def head(factor):
        def add(keys, tensors):
            data, kind = tensors["token_embd.weight"]
            tensors["output.weight"] = data * np.float32(factor), kind

        return rewritten(wide, tmp_path / f"{factor}.gguf", change=add)

    for factor, tied in ((1, True), (2, False)):
        opened = open_model(ConvertOptions(head(factor), tmp_path / "m"))
        assert opened.config.share_input_output_layers == tied
        assert ("lm_head.weight" in opened.source.tensors) != tied


def set_key(name, value):
    return lambda keys, tensors: keys.update({name: (value, keys[name][1])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_key("general.architecture", "llama"),
            "model of architecture 'llama'; only openelm is converted",
        ),
        (
            set_key("openelm.attention.head_count", [9, 9]),
            "says attention.head_count .9, 9.*, its tensors say otherwise",
        ),
        (
            set_key("openelm.rope.freq_base", -1.0),
            "says openelm.rope.freq_base -1.0; it must be a number above 0",
        ),
        (
            set_key("tokenizer.ggml.model", "gpt2"),
            "tokenizer of kind 'gpt2' with special ids .0, 1, 2., where OpenELM's",
        ),
        (
            set_key("tokenizer.ggml.scores", [0.0]),
            "the lists of its tokenizer .* do not fit together",
        ),
        (
            lambda k, t: k.update({"split.count": (3, k["general.file_type"][1])}),
            "is one part of 3; join them with llama-gguf",
        ),
        (
            lambda k, t: t.update({"blk.0.ffn_up.weight": t["blk.0.attn_qkv.weight"]}),
            "shapes .* they must be alike",
        ),
        (
            lambda k, t: t.pop("blk.0.attn_output.weight"),
            "transformer.layers.0.attn.out_proj.weight",
        ),
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
        (
            4,
            b"\x01",
            "is a GGUF file of version 1; little-endian files of versions 2 and 3 are read",
        ),
        (4, b"\x00\x00\x00\x03", "is a GGUF file big-endian"),
        (8, b"\xff" * 8, "claims 18446744073709551615 tensors"),
        (24, b"\xff" * 8, "its header goes on past byte"),
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
    with pytest.raises(
        (ConfigError, ConversionError),
        match="--head-dim 32 contradicts the configuration, which has 64",
    ):
        again(wide, tmp_path / "m", head_dim=32)
