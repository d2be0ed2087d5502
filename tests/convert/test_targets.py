"""Folders and GGUF files are written for the tools that read them, and lose nothing that their
types keep.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import TINY, random_folder, tokenizer_file, weights
from golden_set import GOLDEN

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.targets.folder import split, write_weights
from openelm_mlx.convert.targets.gguf import encoded
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import TensorInfo

N = "transformer.layers.2.ffn.proj_1.weight"


def run(source, target, **fields):
    return convert(ConvertOptions(source=source, target=target, **fields))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hf_to_mlx_to_hf_is_bit_exact(tmp_path, nano, dtype):
    run(nano, tmp_path / "hf", target_format="hf", dtype=dtype)
    run(tmp_path / "hf", tmp_path / "mlx")
    run(tmp_path / "mlx", tmp_path / "back", target_format="hf")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == (
        tmp_path / "hf" / "config.json"
    ).read_bytes()
    before, after = weights(nano), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert mx.array_equal(after[name], array.astype(getattr(mx, dtype)))


def test_hf_metadata_is_what_transformers_asks_for(tmp_path, nano):
    from safetensors import safe_open

    run(nano, tmp_path / "hf", target_format="hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_quantized_folder_as_hf_is_whole(tmp_path, nano):
    run(nano, tmp_path / "q", bits=8)
    run(tmp_path / "q", tmp_path / "hf", target_format="hf")
    assert "quantization" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    stored = weights(tmp_path / "q")
    stem = N.removesuffix("weight")
    want = mx.dequantize(
        *(stored[stem + part] for part in ("weight", "scales", "biases")), group_size=64, bits=8
    )
    assert mx.array_equal(weights(tmp_path / "hf")[N], want)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("F32", {}),
        ("F16", {"dtype": "float16"}),
        ("BF16", {"dtype": "bfloat16"}),
        ("Q8_0", {"bits": 8}),
    ],
)
def test_mlx_to_gguf_to_mlx_within_the_formats_rounding(tmp_path, nano, kind, fields):
    planned = run(nano, tmp_path / "x.gguf", target_format="gguf", dry_run=True, **fields)
    assert list(tmp_path.iterdir()) == [] and planned.memory_bytes > 0
    report = run(nano, tmp_path / "x.gguf", target_format="gguf", **fields)
    run(tmp_path / "x.gguf", tmp_path / "back")
    before, after = weights(nano), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        if array.ndim == 1 or kind != "Q8_0":
            want = (
                array
                if kind == "Q8_0"
                else array.astype(getattr(mx, fields.get("dtype", "float32")))
            )
            assert mx.array_equal(after[name], want)
        else:  # half a step of a block of 32, and float16's rounding (2 ** -11) of 127 steps
            blocks, error = (x.reshape(-1, 32) for x in (array, mx.abs(after[name] - array)))
            largest = mx.abs(blocks).max(axis=1, keepdims=True)
            assert (error <= largest * (0.5 / 127 + 2**-11 + 1e-6)).all().item()
            assert error.max().item() > 0
    assert planned.written_bytes == report.written_bytes == sum(_nbytes(tmp_path / "x.gguf"))


def _nbytes(path):
    import gguf

    return [int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors]


def test_gguf_holds_llama_cpps_keys_and_names(tmp_path, nano):
    """The set that llama.cpp's conversion/openelm.py writes, and its loader asks for."""
    import gguf

    run(nano, tmp_path / "nano-instruct.gguf", target_format="gguf", bits=8)
    reader = gguf.GGUFReader(tmp_path / "nano-instruct.gguf")
    values = {
        name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."
    }
    raw = json.loads((nano / "config.json").read_text())
    assert values["general.architecture"] == "openelm" and values["general.type"] == "model"
    assert (
        values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
        and values["general.quantization_version"] == 2
    )
    want = {
        "block_count": 4,
        "context_length": raw["max_context_length"],
        "embedding_length": 128,
        "attention.head_count": raw["num_query_heads"],
        "attention.head_count_kv": raw["num_kv_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "rope.dimension_count": raw["head_dim"],
        "rope.freq_base": 10000.0,
        "feed_forward_length": [int(m * 128) for m in raw["ffn_multipliers"]],
    }
    assert {key: values[f"openelm.{key}"] for key in want} == want
    assert np.float32(values["openelm.attention.layer_norm_rms_epsilon"]) == np.float32(1e-6)
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.pre"] == "default"
    flags = ("add_bos_token", "add_eos_token", "add_space_prefix")
    assert [values[f"tokenizer.ggml.{flag}"] for flag in flags] == [True, False, True]
    assert [values[f"tokenizer.ggml.{key}_token_id"] for key in ("unknown", "bos", "eos")] == [
        0,
        1,
        2,
    ]
    assert len(values["tokenizer.ggml.tokens"]) == 4096 and values["tokenizer.ggml.token_type"][
        :4
    ] == [2, 3, 3, 6]
    assert "<|system|>" in values["tokenizer.chat_template"]
    arch = gguf.MODEL_ARCH.OPENELM
    layers = [t for t in gguf.MODEL_TENSORS[arch] if "blk" in gguf.TENSOR_NAMES[t]]
    names = {gguf.TENSOR_NAMES[t].format(bid=n) + ".weight" for t in layers for n in range(4)}
    assert {t.name for t in reader.tensors} == names | {"token_embd.weight", "output_norm.weight"}
    assert {t.tensor_type.name for t in reader.tensors if t.data.ndim == 1} == {"F32"}


def test_a_gguf_target_is_replaced_only_with_force(tmp_path, nano):
    target = tmp_path / "x.gguf"
    run(nano, target, target_format="gguf")
    before = target.read_bytes()
    with pytest.raises(
        ConversionError, match="exists; choose another file, or replace it with --force"
    ):
        run(nano, target, target_format="gguf", bits=8)
    assert target.read_bytes() == before
    run(nano, target, target_format="gguf", bits=8, force=True)
    assert target.stat().st_size < len(before) / 2
    with pytest.raises(ConversionError, match=r"contains what is to be read \(.*x.gguf\)"):
        run(target, target, target_format="gguf", force=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConversionError, match="is not a GGUF file, so --force does not replace it"):
        run(nano, tmp_path / "folder", target_format="gguf", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.gguf"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("untied-mha", "a head of its own"),
        ("noqknorm-gqa2", "no QK-norm"),
        ("noglu-gqa2", "a plain FFN"),
        ("lora", "a head of its own"),
    ],
)
def test_models_that_llama_cpp_cannot_express(tmp_path, name, what):
    head = {"head_dim": 64} if name == "noqknorm-gqa2" else {}
    size = json.loads((GOLDEN / name / "arch.json").read_text())["vocab_size"]
    with pytest.raises(
        ConversionError, match=f"the model has {what}, which llama.cpp's openelm cannot express"
    ):
        run(
            GOLDEN / name / "checkpoint.pt",
            tmp_path / "x",
            target_format="gguf",
            tokenizer=tokenizer_file(tmp_path, size),
            **head,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_format": "hf", "bits": 4}, "--to hf writes unquantized weights"),
        (
            {"target_format": "gguf", "adapter": "keep"},
            "--to gguf writes one file of weights; leave out --adapter keep",
        ),
        (
            {"target_format": "gguf", "bits": 4},
            "--to gguf writes F32, F16, BF16 .--dtype., Q8_0 .--bits 8., and the types of",
        ),
        ({"target_format": "onnx"}, "target_format is 'onnx'; allowed: mlx, hf, gguf"),
        (
            {"source_format": "x"},
            "source_format is 'x'; allowed: pt, huggingface, mlx, corenet-mlx, gguf",
        ),
        ({"adapter": "x"}, "adapter is 'x'; allowed: merge, keep"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, nano, fields, message):
    with pytest.raises(OptionError, match=message):
        run(nano, tmp_path / "x", **fields)


def changed(nano: Path, tmp_path: Path, name: str, array: np.ndarray) -> Path:
    from safetensors.numpy import save_file

    shutil.copytree(nano, tmp_path / "source")
    tensors = {key: np.array(value) for key, value in weights(nano).items()} | {name: array}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


def test_weights_beyond_q8_0(tmp_path, nano):
    largest = 127 * 65504  # 127 steps of the largest number of float16
    assert np.isfinite(encoded("w", mx.full((1, 32), largest), "Q8_0").view(np.float16)[0, 0])
    with pytest.raises(ConversionError, match="w has weights beyond the range of Q8_0"):
        encoded("w", mx.full((1, 32), largest * 1.001), "Q8_0")
    source = changed(nano, tmp_path, N, np.full(weights(nano)[N].shape, 1e7, np.float32))
    with pytest.raises(ConversionError, match=f"{N} has weights beyond the range of Q8_0"):
        run(source, tmp_path / "x", target_format="gguf", bits=8)
    assert not (tmp_path / "x").exists()


def test_rows_that_are_no_q8_0_blocks(tmp_path):
    narrow = replace(TINY, model_dim=24, ffn_dim_divisor=8)
    source = random_folder(tmp_path / "s", narrow)
    message = r"has rows of 24 weights, which is not a multiple of Q8_0's 32; leave out --gguf"
    with pytest.raises(ConversionError, match=message):
        run(source, tmp_path / "x", target_format="gguf", bits=8)


def test_shards_are_written_and_read(tmp_path, nano):
    """Three shards with an index, read by mlx-lm's rule (every model*.safetensors) and by this
    converter.
    """
    arrays = weights(nano)
    plan = {
        name: TensorInfo(str(a.dtype).removeprefix("mlx.core."), a.shape)
        for name, a in arrays.items()
    }
    sharded = tmp_path / "sharded"
    shutil.copytree(nano, sharded)
    (sharded / "model.safetensors").unlink()
    names = write_weights(sharded, plan, arrays.items(), limit=2 << 20)
    assert names == [
        f"model-{n}-of-{len(names):05d}.safetensors"
        for n in ("00001", "00002", "00003", "00004")[: len(names)]
    ]
    assert len(names) > 1
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"].keys() == arrays.keys() and set(index["weight_map"].values()) == set(
        names
    )
    assert all(mx.array_equal(array, arrays[name]) for name, array in weights(sharded).items())
    run(sharded, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        nano / "model.safetensors"
    ).read_bytes()


def test_the_3b_is_never_written_in_float16(tmp_path):
    from openelm_mlx.convert.pipeline import target_dtype
    from openelm_mlx.model.config import OpenELMConfig

    options = ConvertOptions(source=tmp_path, target="x", dtype="float16")
    with pytest.raises(
        ConversionError,
        match="OpenELM-3B needs a wider range than float16 has; use --dtype bfloat16 or",
    ):
        target_dtype("w", "bfloat16", OpenELMConfig.from_name("3b"), options)


def test_the_3b_is_written_in_float16_for_llama_cpp(tmp_path):
    from openelm_mlx.convert.pipeline import target_dtype
    from openelm_mlx.model.config import OpenELMConfig

    options = ConvertOptions(source=tmp_path, target="x", dtype="float16", target_format="gguf")
    assert target_dtype("w", "bfloat16", OpenELMConfig.from_name("3b"), options) == "float16"


def test_a_chat_template_goes_from_format_to_format(tmp_path, nano):
    run(nano, tmp_path / "a", instruct=True)
    run(tmp_path / "a", tmp_path / "b", bits=8)
    run(tmp_path / "b", tmp_path / "c.gguf", target_format="gguf")
    run(tmp_path / "c.gguf", tmp_path / "d")
    template = (tmp_path / "a" / "chat_template.jinja").read_bytes()
    for name in ("b", "d"):
        assert (tmp_path / name / "chat_template.jinja").read_bytes() == template
    run(tmp_path / "a", tmp_path / "e", instruct=False)
    assert not (tmp_path / "e" / "chat_template.jinja").exists()


def test_gguf_is_read_without_its_name(tmp_path, nano):
    run(nano, tmp_path / "anything", target_format="gguf")
    assert GGUFFile(tmp_path / "anything").config.model_dim == 128


def test_a_shard_is_filled_up_to_its_limit():
    sizes = {"a": 2, "b": 2, "c": 1, "d": 9}
    tensors = {name: TensorInfo("float32", (size,)) for name, size in sizes.items()}
    assert [list(shard) for shard in split(tensors, 16)] == [["a", "b"], ["c"], ["d"]]
    assert [list(shard) for shard in split(tensors, 15)] == [["a"], ["b", "c"], ["d"]]
