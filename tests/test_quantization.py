"""The spec of one tensor, from options and from config.json, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
from formats import mixed_plan

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.device import mx, nn
from openelm_mlx.errors import ConfigError, OptionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import (
    BITS,
    GROUP_SIZES,
    MODES,
    QuantSpec,
    all_specs,
    config_entry,
    make_spec,
    quantization_of,
    spec_of,
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((7, None, None), "bits is 7; "),
        ((4, 16, None), "group_size is 16; mode affine has 32 or 64 or 128"),
        ((4, 64, "mxfp4"), "group_size is 64; mode mxfp4 has 32"),
        ((8, None, "nvfp4"), "bits is 8; mode nvfp4 has 4"),
        ((None, None, "affine"), "mode affine needs --bits"),
        ((None, 64, None), "nothing is quantized; give --bits or --mode"),
        ((4, None, "gguf"), "mode is 'gguf'; allowed: affine, mxfp4, mxfp8, nvfp4"),
        ((True, None, None), "bits is True"),
    ],
)
def test_combinations_that_do_not_exist(flags, message):
    with pytest.raises(OptionError, match=message):
        make_spec(*flags)
    with pytest.raises(OptionError, match=message):
        ConvertOptions("a", "b", bits=flags[0], group_size=flags[1], mode=flags[2])


def test_options_make_specs():
    assert make_spec(4, None, None) == QuantSpec(4, 64, "affine")
    assert make_spec(None, None, "nvfp4") == QuantSpec(4, 16, "nvfp4")
    assert make_spec(None, None, None) is None
    with pytest.raises(OptionError, match="mode is 'x'"):
        QuantSpec(4, 64, "x")


def test_one_bit_is_read_but_not_written():
    assert spec_of({"bits": 1, "group_size": 64}, "a") == QuantSpec(1, 64)
    assert QuantSpec(1, 64) not in all_specs() and QuantSpec(2, 64) in all_specs()
    with pytest.raises(OptionError, match="bits is 1; allowed: 2, 3, 4, 5, 6, 8"):
        make_spec(1, None, None)


def test_mlx_has_the_bits_and_group_sizes_of_the_table():
    """MLX names what it has when it refuses; modes of one size are tried."""
    weights = mx.random.normal((8, 128))
    for bits in MODES["affine"][0]:
        for size in GROUP_SIZES:
            mx.eval(mx.quantize(weights, size, bits))
    for bits, size in ((7, 64), (9, 64), (4, 16), (4, 256)):
        with pytest.raises(ValueError, match="quantize"):
            mx.quantize(weights, size, bits)
    for spec in all_specs():
        arrays = mx.quantize(weights, **spec.as_config())
        shape = (8, 128)
        assert arrays[0].nbytes == spec.weight_bytes(shape)
        assert sum(a.nbytes for a in arrays[1:]) == spec.scale_bytes(shape, "float32")
        assert sum(a.nbytes for a in arrays) == spec.nbytes(shape, "float32")
        assert spec.bits in BITS


COMMON = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("quantization", "spec"),
    [
        (COMMON, QuantSpec(4, 64)),
        (COMMON | {"mode": "affine", "b": {"bits": 8}}, QuantSpec(4, 64)),
        (COMMON | {"a": True}, QuantSpec(4, 64)),
        (COMMON | {"a": False}, None),
        ({"group_size": 32, "bits": 3, "a": {"bits": 8, "group_size": 128}}, QuantSpec(8, 128)),
        ({"a": {"bits": 8, "group_size": 32}}, QuantSpec(8, 32)),
        ({"mode": "mxfp4"}, QuantSpec(4, 32, "mxfp4")),
        (COMMON | {"a": {"mode": "nvfp4"}}, QuantSpec(4, 16, "nvfp4")),
        ({"group_size": 32, "bits": 3, "a": {"bits": 6}}, QuantSpec(6, 64)),
    ],
)
def test_what_config_json_says_of_a_tensor(quantization: dict[str, Any], spec: QuantSpec | None):
    assert spec_of(quantization, "a") == spec


@pytest.mark.parametrize("own", [{"bits": 6}, {"group_size": 128}, {"mode": "nvfp4"}, COMMON])
def test_an_entry_of_its_own_is_filled_up_as_mlx_does(own: dict[str, Any]):
    """mlx-lm hands the entry to nn.quantize as it is."""
    model = nn.Module()
    model.a = nn.Linear(128, 32, bias=False)
    nn.quantize(model, 32, 3, class_predicate=lambda path, module: own if path == "a" else False)
    layer = model.a
    assert spec_of({"group_size": 32, "bits": 3, "a": own}, "a") == QuantSpec(
        layer.bits, layer.group_size, layer.mode
    )


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"bits": 4}, "config.json has a quantization without group_size$"),
        ({"a.b": 3}, "config.json has a quantization without bits and group_size$"),
        (COMMON | {"bits": 7}, "quantizes a to 7 bits in groups of 64, which MLX does not have in"),
        (COMMON | {"bits": "4"}, "quantizes a to '4' bits in groups of 64, which MLX does not"),
        (COMMON | {"bits": None}, "quantizes a to None bits"),
        (COMMON | {"bits": True}, "quantizes a to True bits"),
        (COMMON | {"mode": "mxfp4"}, "4 bits in groups of 64, which MLX does not have in mode mxf"),
        (COMMON | {"mode": ["x"]}, r"in mode \['x'\]; MLX has affine, mxfp4, mxfp8, nvfp4"),
        (COMMON | {"a": 4}, "config.json has quantization 4 for a; give an object"),
        (COMMON | {"a": None}, "config.json has quantization None for a; give an object"),
    ],
)
def test_what_config_json_cannot_mean(quantization: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        spec_of(quantization, "a")


def test_either_key_of_config_json():
    assert quantization_of({"quantization_config": COMMON}) == COMMON
    assert quantization_of({"quantization": COMMON, "quantization_config": {}}) == COMMON
    assert quantization_of({"quantization": {}}) is None and quantization_of({}) is None
    with pytest.raises(ConfigError, match="config.json has quantization 'x'; it must be an object"):
        quantization_of({"quantization": "x"})


def test_config_entry_is_read_back():
    shapes = expected_tensors(OpenELMConfig.from_name("270m"))
    plan = mixed_plan(shapes)
    entry = config_entry(plan)
    quantized = {stem: spec for stem, spec in plan.items() if spec is not None}
    assert {stem: spec_of(entry, stem) for stem in quantized} == quantized
    assert config_entry(dict.fromkeys(plan)) is None
    uniform = config_entry(dict.fromkeys(plan, QuantSpec(4, 64)))
    assert uniform == {"group_size": 64, "bits": 4, "mode": "affine"}
