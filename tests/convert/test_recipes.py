"""Recipes: which entry speaks for a matrix, what a YAML may say, and what it is told when it says
something else.
"""

from __future__ import annotations

import json

import pytest
from golden_set import NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.quantize.recipes import BUILT_IN, Recipe, find_recipe, read_recipe
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, OptionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec

SHAPES = expected_tensors(OpenELMConfig.from_name("270m"))
YAML = """
default: {bits: 3, group_size: 128}
token_embeddings: 6
ffn.proj_2: {mode: nvfp4}
attn.out_proj: unquantized
first: {layers: 2, bits: 8}
last: {bits: 5, group_size: 32}
layers.7.ffn.proj_1: {bits: 2}
layers.15.ffn.proj_2: {bits: 4}
"""


def test_the_most_particular_line_wins(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    plan = find_recipe(str(path)).plan(SHAPES)
    assert list(plan) == [
        name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2
    ]
    specs = {stem.removeprefix("transformer."): spec for stem, spec in plan.items()}
    assert specs["token_embeddings"] == QuantSpec(6)
    assert specs["layers.0.attn.out_proj"] == specs["layers.1.ffn.proj_2"] == QuantSpec(8)
    assert specs["layers.2.attn.out_proj"] is None
    assert specs["layers.2.attn.qkv_proj"] == QuantSpec(3, 128)
    assert specs["layers.2.ffn.proj_2"] == QuantSpec(4, 16, "nvfp4")
    assert specs["layers.7.ffn.proj_1"] == QuantSpec(2)
    assert specs["layers.15.attn.qkv_proj"] == QuantSpec(5, 32)
    assert specs["layers.15.ffn.proj_2"] == QuantSpec(4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_fit_every_published_size(name):
    for size in ("270m", "450m", "1.1b", "3b"):
        shapes = expected_tensors(OpenELMConfig.from_name(size))
        plan = BUILT_IN[name].plan(shapes)
        assert all(
            spec is not None and shapes[f"{stem}.weight"][1] % spec.group_size == 0
            for stem, spec in plan.items()
        )
        assert len(set(plan.values())) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn.proj2: 4", r"the key 'ffn.proj2'; known: .*did you mean ffn.proj_2\?"),
        ("layers.3.ffn.proj_9: 4", "the key 'layers.3.ffn.proj_9'"),
        ("default: {bit: 4}", r"default has the setting 'bit'; known: .*did you mean bits\?"),
        ("default: {bits: 7}", "default: bits is 7"),
        ("default: {bits: [4]}", "default: bits is "),
        ("default: {mode: {}}", "default: "),
        ("default: some", "default is 'some'; it must be unquantized, a number of bits"),
        ("default: {}", "default is empty"),
        ("first: {layers: 0, bits: 4}", "first has layers 0"),
        ("- 4", "is not a recipe"),
        ("", "is not a recipe"),
        ("default: [", "cannot be read as YAML"),
    ],
)
def test_what_a_recipe_may_not_say(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "bad.yaml")


def test_names_that_are_not_a_recipe():
    with pytest.raises(
        OptionError, match=r"recipe is 'mixed-3_4'; known: mixed-3-4.* did you mean mixed-3-4\?"
    ):
        find_recipe("mixed-3_4")
    with pytest.raises(OptionError, match="layers.99.ffn.proj_1, which this model does not have"):
        Recipe(single={"layers.99.ffn.proj_1": QuantSpec(4)}).plan(SHAPES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "mixed-3-4", "bits": 4}, "--bits or --mode and --recipe each choose the plan"),
        (
            {"recipe": "mixed-3-4", "target_bpw": 4.0},
            "--recipe and --target-bpw each choose the plan",
        ),
        ({"calibrate": "gptq"}, "--calibrate gptq needs something to round"),
        (
            {"recipe": "mixed-3-4", "group_size": 32},
            "--recipe chooses the groups by itself; leave out --group-size",
        ),
        ({"calibration_text": "a.txt", "bits": 4}, "--calibration-text is used by"),
        ({"calibrate": "awq", "bits": 4}, "calibrate is 'awq'; allowed: gptq, distill, best"),
        ({"target_bpw": 1.0}, "target_bpw is 1.0"),
        (
            {"target_format": "gguf", "bits": 8, "dtype": "bfloat16"},
            "--dtype bfloat16 is the type of a GGUF file that is not quantized; leave out --dtype",
        ),
        (
            {"target_format": "gguf", "recipe": "mixed-3-4"},
            "--to gguf quantizes by --gguf-type; leave out --recipe",
        ),
    ],
)
def test_options_that_contradict_each_other(fields, message):
    with pytest.raises(OptionError, match=message):
        ConvertOptions("a", "b", **fields)


def test_a_recipe_lands_in_the_folder(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "default: {bits: 4, group_size: 32}\ntoken_embeddings: 8\nattn.out_proj: whole"
    )
    convert(
        ConvertOptions(
            NANO / "checkpoint.pt", tmp_path / "m", recipe=str(tmp_path / "r.yaml"), dtype="float16"
        )
    )
    stored = mx.load(str(tmp_path / "m" / "model.safetensors"))
    raw = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert raw["transformer.token_embeddings"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert "transformer.layers.0.attn.out_proj.scales" not in stored
    assert stored["transformer.layers.0.attn.out_proj.weight"].dtype == mx.float16
    assert stored["transformer.token_embeddings.scales"].shape == (4096, 2)
