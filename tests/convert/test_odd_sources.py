"""Odd files that other tools write: loading and converting read them alike, or refuse both."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pytest
from formats import again, assert_refused_alike, changed, random_folder

from openelm_mlx import load
from openelm_mlx.cli.inspect import inspect
from openelm_mlx.convert.opening import corenet_section
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import OpenELMError

TOKENS = mx.array([[1, 5, 9, 30]])
HEAD, EMBEDDINGS = "lm_head", "transformer.token_embeddings"
FREQUENCIES = mx.array([1, 0.1, 0.01, 0.001])  # of head_dim 8 and base 10,000
OUT = "transformer.layers.0.attn.out_proj"


def logits(engine: Engine) -> np.ndarray:
    return np.array(engine.model(TOKENS).astype(mx.float32))


def read_alike(folder: Path, tmp_path: Path) -> Engine:
    """Load the folder; check that a copy of it which is converted has the same logits."""
    engine, copied = load(folder), load(again(folder, tmp_path / "copy"))
    np.testing.assert_array_equal(logits(copied), logits(engine))
    assert copied.config.share_input_output_layers == engine.config.share_input_output_layers
    assert copied.chat_sampling == engine.chat_sampling
    facts, sizes = inspect(str(folder)), inspect(str(tmp_path / "copy"))
    assert facts["bytes_by_part"] == sizes["bytes_by_part"] and facts["layers_total"] == 1
    return engine


@pytest.fixture
def plain(tmp_path) -> Path:
    return random_folder(tmp_path / "plain")


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("model.", ""),
        ("module._orig_mod.model.", ""),
        ("", "_orig_mod."),
        ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    ],
)
def test_names_of_a_model_that_others_are_put_around(tmp_path, plain, before, inside):
    def wrap(arrays):
        buffers = {"rotary.inv_freq": FREQUENCIES.astype(mx.float16)}
        return buffers | {
            before + name.replace("layers.0.", f"layers.0.{inside}"): array
            for name, array in arrays.items()
        }

    want = logits(load(plain))
    np.testing.assert_array_equal(logits(read_alike(changed(plain, wrap), tmp_path)), want)


@pytest.mark.parametrize("frequencies", [FREQUENCIES**2, FREQUENCIES[:3], mx.zeros(4, mx.int32)])
def test_rotary_frequencies_of_another_model(tmp_path, plain, frequencies):
    buffer = {"transformer.layers.0.attn.pos_embedding.inv_freq": frequencies}
    folder = changed(plain, lambda arrays: arrays | buffer)
    message = "inv_freq is not that of head_dim 8 and base 10000: give the base .* as --rope-base"
    assert_refused_alike(folder, tmp_path, message)
    with pytest.raises(OpenELMError, match=message):
        inspect(str(folder))


def test_rotary_frequencies_of_another_base(tmp_path, plain):
    buffer = {"inv_freq": FREQUENCIES**2}
    folder = changed(plain, lambda arrays: arrays | buffer, rope_freq_constant=1e8)
    assert read_alike(folder, tmp_path).config.rope_freq_constant == 1e8
    folder = changed(plain, lambda arrays: arrays, rope_freq_constant=1e4)
    again(folder, tmp_path / "m", rope_base=1e8)


def test_names_that_only_some_tensors_have_around_them(tmp_path, plain):
    def wrap(arrays):
        return {f"model.{name}": array for name, array in arrays.items()} | {"loss.w": mx.ones(1)}

    assert_refused_alike(
        changed(plain, wrap), tmp_path, "1 of 11 tensors are not of model.*first: loss.w"
    )


def test_two_names_of_one_tensor(tmp_path, plain):
    def both(arrays):
        return arrays | {"_orig_mod.transformer.norm.weight": arrays["transformer.norm.weight"]}

    assert_refused_alike(changed(plain, both), tmp_path, "contains both .*, which are one tensor")


@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_that_repeats_the_embeddings(tmp_path, plain, bits):
    folder = plain if bits is None else again(plain, tmp_path / "q", bits=bits, group_size=32)

    def copy(arrays):
        parts = [name for name in arrays if name.startswith(EMBEDDINGS)]
        return arrays | {name.replace(EMBEDDINGS, HEAD): arrays[name] for name in parts}

    want = logits(load(folder))
    engine = read_alike(changed(folder, copy), tmp_path)
    assert engine.config.share_input_output_layers
    np.testing.assert_array_equal(logits(engine), want)


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_head_that_differs_is_the_models_own(tmp_path, plain, stated):
    def add(arrays):
        arrays[f"{HEAD}.weight"] = arrays[f"{EMBEDDINGS}.weight"] * 2

    want = 2 * logits(load(plain))
    engine = read_alike(changed(plain, add, share_input_output_layers=stated), tmp_path)
    assert not engine.config.share_input_output_layers
    np.testing.assert_allclose(logits(engine), want, rtol=1e-6)


def test_a_head_of_another_type_is_the_models_own(tmp_path, plain):
    def add(arrays):
        arrays[f"{EMBEDDINGS}.weight"] = arrays[f"{EMBEDDINGS}.weight"].astype(mx.bfloat16)
        arrays[f"{HEAD}.weight"] = arrays[f"{EMBEDDINGS}.weight"].astype(mx.float32)

    assert not read_alike(changed(plain, add), tmp_path).config.share_input_output_layers


def test_half_a_head_is_none(tmp_path, plain):
    folder = again(plain, tmp_path / "q", bits=4, group_size=32)

    def add(arrays):
        arrays[f"{HEAD}.biases"] = arrays[f"{EMBEDDINGS}.biases"]

    assert_refused_alike(
        changed(folder, add), tmp_path, "1 the model does not have .lm_head.biases"
    )


def test_a_head_that_is_said_to_be_the_models_own_stays(tmp_path, plain):
    def copy(arrays):
        arrays[f"{HEAD}.weight"] = arrays[f"{EMBEDDINGS}.weight"]

    engine = read_alike(changed(plain, copy, share_input_output_layers=False), tmp_path)
    assert not engine.config.share_input_output_layers
    (plain / "config.json").unlink()  # where no file says so, it need not be
    assert load(again(plain, tmp_path / "m")).config.share_input_output_layers


# written by transformers 4.46 for a model with settings of its own
WRITTEN = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "apple/OpenELM-270M",
    "architectures": ["OpenELMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
    "max_length": 64,
    "no_repeat_ngram_size": 3,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "pruned_heads": {},
}


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({}, {"repetition_penalty": 1.2}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1},
            {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.0}, {}),
    ],
)
def test_generation_keys_in_a_configuration(tmp_path, plain, stated, wanted):
    engine = read_alike(changed(plain, lambda arrays: arrays, **WRITTEN, **stated), tmp_path)
    assert engine.chat_sampling == SamplingOptions(**wanted)
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert {key: written[key] for key in stated} == stated and written["max_length"] == 64
    (plain / "generation_config.json").write_text('{"do_sample": true}')  # which says it alone
    assert load(plain).chat_sampling == SamplingOptions(temperature=1.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", "hot", "config.json: temperature is 'hot'; allowed is a number"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "computes only None"),
        ("attention_bias", True, "config.json has keys this engine does not know: attention_bias"),
    ],
)
def test_keys_of_a_configuration_that_are_refused(tmp_path, plain, key, value, message):
    changed(plain, lambda arrays: arrays, **{key: value})
    assert_refused_alike(plain, tmp_path, message)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(tmp_path, plain, dtype, value):
    def spoil(arrays):
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        arrays[f"{OUT}.weight"][3, 7] = value
        return arrays

    assert_refused_alike(
        changed(plain, spoil), tmp_path, f"{OUT}.weight has NaN or infinite weights"
    )


@pytest.mark.parametrize(
    ("mode", "part", "value"),
    [
        ("affine", "scales", float("inf")),
        ("affine", "biases", float("nan")),
        ("mxfp4", "scales", 0xFF),
        ("mxfp8", "scales", 0xFF),
        ("mxfp8", "weight", 0x7F),
        ("nvfp4", "scales", 0x7F),
    ],
)
def test_quantized_weights_that_are_no_numbers(tmp_path, plain, mode, part, value):
    fields = {"bits": 4, "group_size": 32} if mode == "affine" else {"mode": mode}
    folder = again(plain, tmp_path / "q", **fields)

    def spoil(arrays):
        array = arrays[f"{OUT}.{part}"]
        numbers = array.view(mx.uint8) if part == "weight" else array
        numbers[2, 0] = value
        arrays[f"{OUT}.{part}"] = numbers.view(array.dtype)

    assert_refused_alike(changed(folder, spoil), tmp_path, f"{OUT}.{part} has NaN or infinite")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mode": "afine"}, "in mode 'afine'; MLX has affine, mxfp4"),
        ({"group_size": 1}, "4 bits in groups of 1, which MLX does not have in mode affine"),
        ({"bits": 7}, "7 bits in groups of 32, which MLX does not have"),
        ({"bits": "8"}, "'8' bits in groups of 32, which MLX does not have"),
        ({"bits": 8}, "do not make a matrix of 8 bits in groups of 32"),
        ({OUT: False}, f"{OUT} is quantized, but config.json says that it is not"),
        ({"quant_method": "gptq"}, "says that the weights are quantized by 'gptq'; only MLX's"),
        ({OUT: 3}, f"has quantization 3 for {OUT}; give an object"),
        (None, "contains quantized weights, but its config.json has no quantization"),
    ],
)
def test_a_quantization_that_does_not_fit(tmp_path, plain, entry, message):
    folder = again(plain, tmp_path / "q", bits=4, group_size=32)
    raw = json.loads((folder / "config.json").read_text())
    stated = None if entry is None else raw["quantization"] | entry
    changed(folder, lambda arrays: arrays, quantization=stated, quantization_config=None)
    assert_refused_alike(folder, tmp_path, message)


def test_types_that_no_weights_have(tmp_path, plain):
    def whole(arrays):
        arrays[f"{OUT}.weight"] = arrays[f"{OUT}.weight"].astype(mx.int8)

    message = f"{OUT}.weight is int8; weights must be floating-point numbers"
    assert_refused_alike(changed(plain, whole), tmp_path, message)


def test_doubles_are_read_as_singles(tmp_path, plain, monkeypatch):
    """MLX reads none, so that loading converts the folder first."""
    from safetensors.numpy import load_file, save_file

    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    want, path = logits(load(plain)), plain / "model.safetensors"
    save_file({name: array.astype(np.float64) for name, array in load_file(path).items()}, path)
    np.testing.assert_array_equal(logits(read_alike(plain, tmp_path)), want)


def test_what_loading_leaves_to_converting(tmp_path, plain, monkeypatch):
    """A configuration of CoreNet's, which tells less, and adapters beside their base."""
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    want, config = logits(load(plain)), (plain / "config.json").read_text()
    (plain / "config.json").write_text('{"model_name": "mine", "max_context_length": 64}')
    engine = load(plain)
    np.testing.assert_array_equal(logits(engine), want)
    assert engine.config.max_context_length == 64 and engine.path.parent != tmp_path
    (plain / "config.json").write_text(config)

    def adapt(arrays):
        arrays[f"{OUT}.base_layer.weight"] = arrays.pop(f"{OUT}.weight")
        arrays[f"{OUT}.lora_A.default.weight"] = mx.ones((2, 32))
        arrays[f"{OUT}.lora_B.default.weight"] = mx.ones((32, 2))

    message = "contains an adapter of .*, whose strength is not in the tensors"
    assert_refused_alike(changed(plain, adapt), tmp_path, message)


@pytest.mark.parametrize("offsets", [[0, None], ["a", 3], 5, [0], {"0": 1}, [1e3, 2e3], None])
def test_odd_offsets_in_a_header(tmp_path, plain, offsets):
    path = plain / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[f"{OUT}.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert_refused_alike(plain, tmp_path, "the header's entry of tensor .* is malformed")
    with pytest.raises(OpenELMError, match="the header's entry of tensor .* is malformed"):
        inspect(str(plain))


def test_a_byte_order_mark_before_json(tmp_path, plain):
    folder = again(plain, tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes(BOM_UTF8 + (folder / name).read_bytes())
    want, marked = load(plain), read_alike(folder, tmp_path)
    np.testing.assert_array_equal(logits(marked), logits(want))
    for continued in (False, True):
        ids = want.tokenizer.encode("the fox", continued=continued)
        assert marked.tokenizer.encode("the fox", continued=continued) == ids


def test_a_byte_order_mark_before_yaml(tmp_path):
    text = "model: {language_modeling: {general_gpt: {model_name: OpenELM-270M}}}"
    (tmp_path / "c.yaml").write_bytes(BOM_UTF8 + text.encode())
    assert corenet_section(tmp_path / "c.yaml") == {"model_name": "OpenELM-270M"}
