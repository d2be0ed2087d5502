"""conversion.json, the model card and the summary say what the weights are and what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats import TINY, again, random_folder, weights

from openelm_mlx.cli import main
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.quantization import matrices, stem_of

FOUR = {"bits": 4, "group_size": 32}
EIGHT = {"bits": 8, "group_size": 32}
AGAIN = (
    "The source is itself quantized ({}): {} matrices are rounded a second time, which adds to its "
    "loss; the original, if you have it, gives a better result."
)
LOST = "The source is itself quantized ({}): what that has lost stays lost."
MATRICES = len(matrices(expected_tensors(TINY)))
FORM = "8 bits, groups of 32"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model so small that a conversion takes milliseconds."""
    return random_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, source) -> Path:
    return again(source, tmp_path_factory.mktemp("quantized") / "model", **EIGHT)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "conversion.json").read_text())


@pytest.mark.parametrize(
    ("fields", "again_of", "dequantized", "sentence"),
    [
        (FOUR, MATRICES, 0, AGAIN.format(FORM, MATRICES)),
        ({"recipe": "r.yaml"}, 1, MATRICES - 2, AGAIN.format(FORM, 1)),
        ({"dtype": "float16", **EIGHT}, MATRICES, 0, AGAIN.format(FORM, MATRICES)),
        (
            {"calibrate": "gptq", "calibration_tokens": 257, **EIGHT},
            MATRICES,
            0,
            AGAIN.format(FORM, MATRICES),
        ),
        ({"target_format": "hf"}, 0, MATRICES, LOST.format(FORM)),
        ({"dtype": "bfloat16"}, 0, MATRICES, LOST.format(FORM)),
        ({}, 0, 0, None),
        (EIGHT, 0, 0, None),
    ],
    ids=["4", "recipe", "8 of float16", "8 by gptq", "hf", "bfloat16", "kept", "8 again"],
)
def test_a_source_that_is_quantized_is_told(
    tmp_path, monkeypatch, quantized, fields, again_of, dequantized, sentence
):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "token_embeddings: {bits: 8, group_size: 32}\nffn.proj_1: {bits: 3, group_size: 32}"
    )
    record = record_of(again(quantized, tmp_path / "m", **fields))
    assert record["source_quantization"] == {FORM: MATRICES}
    assert (record["rounded_again"], record["dequantized"]) == (again_of, dequantized)
    card = (tmp_path / "m" / "README.md").read_text()
    assert sentence in card if sentence else "itself quantized" not in card


def test_a_source_that_is_not_quantized_is_not_told(source, quantized):
    assert "source_quantization" not in record_of(quantized)
    assert "itself quantized" not in (quantized / "README.md").read_text()


def test_the_summary_tells_it_too(tmp_path, source, quantized, capsys):
    words = ["convert", str(quantized), "-o", str(tmp_path / "m"), "--bits", "4"]
    assert main([*words, "--group-size", "32"]) == 0
    assert AGAIN.format(FORM, MATRICES) in capsys.readouterr().out
    gguf = again(source, tmp_path / "x.gguf", bits=8)
    assert main(["convert", str(gguf), "-o", str(tmp_path / "y.gguf"), "--bits", "8"]) == 0
    assert AGAIN.format("Q8_0", MATRICES) in capsys.readouterr().out
    assert main(["convert", str(gguf), "-o", str(tmp_path / "z"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["dtypes"]) == ("float32", {})
    assert found["source_quantization"] == {"Q8_0": MATRICES} and found["rounded_again"] == 0
    assert found["dequantized"] == MATRICES


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A model whose layers are bfloat16, and the rest float32."""
    folder = random_folder(tmp_path / "mixed")
    arrays = {
        name: array.astype(mx.bfloat16) if ".layers." in name else array
        for name, array in weights(folder).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def test_types_that_differ_are_told_tensor_by_tensor(tmp_path, mixed, capsys):
    assert main(["convert", str(mixed), "-o", str(tmp_path / "m")]) == 0
    assert "types: float32 (2 tensors), bfloat16 (8 tensors)" in capsys.readouterr().out
    record = record_of(tmp_path / "m")
    assert record["dtype"] == "mixed"
    told = {name: dtype for dtype, names in record["dtypes"].items() for name in names}
    assert told == {
        stem_of(name): str(array.dtype).removeprefix("mlx.core.")
        for name, array in weights(tmp_path / "m").items()
    }
    card = (tmp_path / "m" / "README.md").read_text()
    assert "float32 (2 tensors), bfloat16 (8 tensors), 19.568 bits per weight" in card


def test_the_types_of_a_quantized_folder_are_those_of_its_scales(tmp_path, mixed):
    record = record_of(again(mixed, tmp_path / "m", **FOUR))
    scales = weights(tmp_path / "m")
    for dtype, names in record["dtypes"].items():
        for name in names:
            array = scales.get(f"{name}.scales", scales[f"{name}.weight"])
            assert str(array.dtype) == f"mlx.core.{dtype}"
    assert record_of(again(mixed, tmp_path / "one", dtype="float16", **FOUR))["dtype"] == "float16"


@pytest.mark.parametrize("method", ["gptq", "distill"])
def test_what_is_learned_has_one_type(tmp_path, mixed, method):
    report = convert(
        ConvertOptions(mixed, tmp_path / "m", calibrate=method, calibration_tokens=257, **FOUR)
    )
    assert list(report.types) == ["float32"] and record_of(tmp_path / "m")["dtype"] == "float32"
    stored = {array.dtype for array in weights(tmp_path / "m").values()}
    assert stored == {mx.float32, mx.uint32}
