"""Quantized tensors: what MLX packs, and what mlx-lm and this engine make of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from formats import mixed_plan
from golden_set import NANO

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.quantize.plan import check_divides
from openelm_mlx.convert.quantize.rounding import layout, quantized
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.quantization import (
    QuantSpec,
    all_specs,
    matrices,
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("spec", all_specs(), ids=str)
def test_every_form_is_packed_as_planned_and_near_the_weights(spec, dtype):
    weights = mx.random.normal((8, 256), key=mx.random.key(0)).astype(getattr(mx, dtype))
    arrays = quantized("a.weight", weights, spec)
    plan = layout("a.weight", TensorInfo(dtype, (8, 256)), spec)
    assert {n: (str(a.dtype).removeprefix("mlx.core."), a.shape) for n, a in arrays.items()} == plan
    assert (
        spec.nbytes((8, 256), dtype)
        == sum(info.nbytes for info in plan.values())
        == sum(a.nbytes for a in arrays.values())
    )
    ours = np.array(dequantized("a.weight", arrays, spec))
    exact = np.array(weights.astype(mx.float32))
    steps = {"affine": 3 / 2**spec.bits, "mxfp8": 1 / 15}.get(
        spec.mode, 1 / 2
    )  # E4M3 has 3 bits of fraction, E2M1 one
    assert np.abs(ours - exact).max() < np.abs(exact).max() * steps
    parts = [arrays.get("a." + part) for part in ("weight", "scales", "biases")]
    theirs = mx.dequantize(
        *parts, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
    ).astype(mx.float32)
    assert np.abs(ours - np.array(theirs)).max() <= (0 if dtype == "float32" else 0.05)


def test_rows_that_do_not_divide():
    shapes = {"a.weight": (4, 128), "b.weight": (4, 96), "norm.weight": (96,)}
    with pytest.raises(
        ConversionError, match=r"b.weight has rows of 96 weights.*64; use --group-size 32"
    ):
        check_divides(dict.fromkeys(matrices(shapes), QuantSpec(4, 64)), shapes)
    with pytest.raises(
        ConversionError, match="no group size fits: leave it unquantized, by a recipe"
    ):
        check_divides({"a": QuantSpec(4, 64)}, {"a.weight": (4, 100)})
    check_divides({"a": QuantSpec(4, 64), "b": None}, shapes)


@pytest.mark.parametrize("name", ["mixed", "mxfp4", "mxfp8", "nvfp4"])
def test_mlx_lm_and_the_engine_compute_alike(name, tmp_path, monkeypatch):
    from mlx_lm import load as mlx_lm_load

    from openelm_mlx.convert.quantize import plan

    if name == "mixed":
        monkeypatch.setattr(
            plan,
            "given_plan",
            lambda opened, options: mixed_plan(expected_tensors(opened.trimmed)),
        )
    mode = None if name == "mixed" else name
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "m", mode=mode))
    tokens = mx.array([[1, 300, 17, 4000, 5]])
    theirs, _ = mlx_lm_load(str(tmp_path / "m"))
    ours = load(tmp_path / "m")
    assert mx.abs(theirs(tokens) - ours.model(tokens)).max().item() < 1e-3
    stored = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert ours.nbytes == sum(array.nbytes for array in stored.values())
    if name == "mixed":
        entries = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
        assert entries["transformer.layers.1.ffn.proj_2"] == {
            "group_size": 16,
            "bits": 4,
            "mode": "nvfp4",
        }
        assert "transformer.layers.1.attn.qkv_proj" not in entries
