from __future__ import annotations

import json
from dataclasses import replace

import pytest

from openelm_mlx.convert.opening import corenet_section
from openelm_mlx.convert.sources import overrides
from openelm_mlx.errors import ConfigError
from openelm_mlx.model.config import OpenELMConfig, layer_shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("270m", 271_527_168), ("450m", 457_179_136), ("1.1b", 1_079_891_456), ("3b", 3_036_647_424)],
)
def test_published_sizes(name, parameters):
    config = OpenELMConfig.from_name(name)
    assert config.num_parameters == parameters
    again = OpenELMConfig.from_hf_dict(config.to_hf_dict())
    assert layer_shapes(again) == layer_shapes(config) and again.to_hf_dict() == config.to_hf_dict()
    assert (
        OpenELMConfig.from_name(f"apple/OpenELM-{name.replace('.', '_').upper()}-Instruct")
        == config
    )


def test_heads_of_the_270m():
    assert [shape.q_heads for shape in layer_shapes(OpenELMConfig.from_name("270m"))] == [
        12
    ] * 5 + [16] * 7 + [20] * 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"modle_dim": 3}, "did you mean model_dim"),
        ({"activation_fn_name": "gelu"}, "computes only 'swish'"),
        ({"model_type": "llama"}, "runs only 'openelm'"),
        ({"head_dim": 63}, "even number"),
        ({"head_dim": "64"}, "a whole number"),
        ({"num_query_heads": [4]}, "1 entries for 16 layers"),
        ({"num_kv_heads": [5] * 16}, "multiple of key/value heads"),
        ({"ffn_with_glu": 1}, "true or false"),
        ({"model_dim": 0}, "at least 1"),
        (
            {"eos_token_id": []},
            r"eos_token_ids is \(\); it must be a whole number or a list of them",
        ),
        (
            {"eos_token_id": [2, "7"]},
            "eos_token_ids is .*; it must be a whole number or a list of them",
        ),
        ({"eos_token_ids": [2, 7]}, "did you mean eos_token_id"),
    ],
)
def test_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        OpenELMConfig.from_hf_dict(OpenELMConfig.from_name("270m").to_hf_dict() | change)


def test_files(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {language_modeling: {general_gpt: {model_name: OpenELM-1_1B, vocab_size: 32128}}}"
    )
    section = corenet_section(tmp_path / "c.yaml")
    assert section["model_name"] == "OpenELM-1_1B" and overrides(section) == {"vocab_size": 32128}
    (tmp_path / "d.yaml").write_text("model: 3")
    with pytest.raises(ConfigError, match="no section"):
        corenet_section(tmp_path / "d.yaml")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        OpenELMConfig.from_file(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="does not exist"):
        OpenELMConfig.from_file(tmp_path / "none.json")


def test_a_text_may_end_at_any_of_several_ids(tmp_path):
    raw = OpenELMConfig.from_name("270m").to_hf_dict()
    assert raw["eos_token_id"] == 2
    config = OpenELMConfig.from_hf_dict(raw | {"eos_token_id": [2, 7]})
    assert (config.eos_token_ids, config.eos_token_id) == ((2, 7), 2)
    assert OpenELMConfig.from_hf_dict(config.to_hf_dict()) == replace(
        config, **written_shapes(config)
    )
    assert config.to_hf_dict()["eos_token_id"] == [2, 7]
    assert config.with_eos_of(tmp_path) == config
    stated = tmp_path / "generation_config.json"
    for ids, ends in (([7, 9], (2, 7, 9)), (7, (2, 7)), (None, (2, 7))):
        stated.write_text(json.dumps({"eos_token_id": ids}))
        assert config.with_eos_of(tmp_path).eos_token_ids == ends
    for wrong in ("7", [[7]], [True]):
        stated.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(
            ConfigError,
            match="generation_config.json: eos_token_id is .*; it must be a whole number or a",
        ):
            config.with_eos_of(tmp_path)


def written_shapes(config):
    again = OpenELMConfig.from_hf_dict(OpenELMConfig.from_name("270m").to_hf_dict())
    return {
        name: getattr(again, name)
        for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    }
