"""Which type a model is computed in, and that float16 is the better one where it fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_set import NANO

from openelm_mlx import device, load
from openelm_mlx.cli.inspect import inspect
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx
from openelm_mlx.engine.compute_type import compute_dtype, largest_activation
from openelm_mlx.errors import OptionError
from openelm_mlx.model.checkpoint import read_headers
from openelm_mlx.model.config import OpenELMConfig

SMALL, LARGE = (OpenELMConfig.from_name(size) for size in ("270m", "3b"))
MEASURED = "the largest activation measured is "


@pytest.mark.parametrize(
    ("config", "stored", "asked", "kind", "largest", "wanted"),
    [
        (SMALL, "float32", None, "cpu", 1.0, "float32: the CPU backend emulates half types"),
        (LARGE, "bfloat16", None, "cpu", None, "float32: the CPU backend emulates half types"),
        (SMALL, "float32", "bfloat16", "cpu", None, "bfloat16: it was asked for"),
        (SMALL, "float32", "float16", "metal", None, "float16: it was asked for"),
        (LARGE, "float16", "float32", "metal", None, "float32: it was asked for"),
        (SMALL, "bfloat16", None, "metal", 1.0, "bfloat16: the weights are stored in it"),
        (SMALL, "float16", None, "cuda", 9e9, "float16: the weights are stored in it"),
        (LARGE, "float16", None, "metal", 1.0, "bfloat16: a model of this size overflows float16"),
        (LARGE, "float32", None, "cuda", 1.0, "bfloat16: a model of this size overflows float16"),
        (SMALL, "float32", None, "metal", None, "bfloat16: no conversion has measured the largest"),
        (
            SMALL,
            "float32",
            None,
            "metal",
            68.1,
            f"float16: {MEASURED}68.1, 962 times less than its",
        ),
        (SMALL, "float32", None, "cuda", 4094.0, f"float16: {MEASURED}4,094, 16 times less than"),
        (SMALL, "float32", None, "cuda", 4094.1, f"bfloat16: {MEASURED}4,094, 16 times less than"),
        (SMALL, "float32", None, "metal", 9e4, f"bfloat16: {MEASURED}9e+04, more than float16 has"),
    ],
)
def test_the_type_follows_from_what_is_known(
    config: OpenELMConfig,
    stored: str,
    asked: str | None,
    kind: str,
    largest: float | None,
    wanted: str,
) -> None:
    found = compute_dtype(config, stored, asked, kind, largest)
    assert ": ".join(found).startswith(wanted)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(OptionError, match="needs a wider range than float16 has; use bfloat16"):
        compute_dtype(LARGE, "bfloat16", "float16", "metal")
    with pytest.raises(OptionError, match="dtype is 'int8'; allowed: float32"):
        compute_dtype(SMALL, "bfloat16", "int8", "cpu")


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"mode": "mxfp4"}, {"recipe": "mixed-3-4"}])
def test_every_kind_of_conversion_records_the_bytes_that_it_wrote(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    convert(ConvertOptions(NANO / "checkpoint.pt", folder, **options))
    assert largest_activation(folder, read_headers(folder))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden nano model, quantized, with a record."""
    folder = tmp_path_factory.mktemp("measured") / "m"
    convert(ConvertOptions(NANO / "checkpoint.pt", folder, bits=8))
    return folder


def test_the_record_counts_for_the_weights_it_was_made_for(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(measured, folder)
    headers = read_headers(folder)
    record = json.loads((folder / "conversion.json").read_text())
    assert largest_activation(folder, headers) == record["activations"]["largest"]
    numbers = ("9", True, 10**400, float("inf"), 0.0)
    changed = [record | {"activations": value} for value in ({}, None)]
    changed += [record | {"activations": {"largest": value}} for value in numbers]
    for other in (record | {"bytes": record["bytes"] - 1}, {}, *changed):
        (folder / "conversion.json").write_text(json.dumps(other))
        assert largest_activation(folder, headers) is None
    (folder / "conversion.json").write_text("{")
    assert largest_activation(folder, headers) is None
    (folder / "conversion.json").unlink()
    assert largest_activation(folder, headers) is None


def test_a_gpu_computes_what_was_measured_in_float16_and_inspect_says_why(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = inspect(str(measured))["computed_in"]
    assert where["a processor"] == ("float32", "the CPU backend emulates half types")
    assert where["a GPU"][0] == "float16" and MEASURED in where["a GPU"][1]
    hub = inspect("apple/OpenELM-270M")["computed_in"]["a GPU"]
    assert hub == ("bfloat16", "no conversion has measured the largest activation")
    assert load(measured).model.transformer.norm.weight.dtype == mx.float32
    monkeypatch.setattr(device, "kind", lambda: "metal")
    monkeypatch.setattr(device, "recommended_bytes", device.memory_bytes)
    assert load(measured).model.transformer.norm.weight.dtype == mx.float16
    assert load(measured, dtype="bfloat16").model.transformer.norm.weight.dtype == mx.bfloat16


def test_a_file_that_is_converted_to_be_loaded_is_measured_where_a_gpu_has_use_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "kind", lambda: "metal")
    monkeypatch.setattr(device, "recommended_bytes", device.memory_bytes)
    engine = load(NANO / "checkpoint.pt")
    assert engine.model.transformer.norm.weight.dtype == mx.float16
    assert largest_activation(engine.path, read_headers(engine.path))


def test_float16_is_nearer_to_float32_than_bfloat16(measured: Path) -> None:
    tokens = mx.array([[1, *range(300, 307)]])
    exact, half, wide = (
        load(measured, dtype=dtype).model(tokens).astype(mx.float32)
        for dtype in ("float32", "float16", "bfloat16")
    )
    errors = [mx.abs(logits - exact).mean().item() for logits in (half, wide)]
    assert errors[0] < errors[1] / 4  # three bits more: about an eighth
