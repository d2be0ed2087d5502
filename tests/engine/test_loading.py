from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from formats import again, random_folder
from golden_set import NANO

from openelm_mlx import device, load
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.pipeline import convert
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import loaded_bytes
from openelm_mlx.engine.options import ModelOptions, SamplingOptions
from openelm_mlx.errors import CheckpointError, ConfigError, OptionError, TokenizerError
from openelm_mlx.model.checkpoint import read_headers
from openelm_mlx.model.decoder import parameters


def broken(nano, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(nano, folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def test_quantizing_while_loading_equals_converting(nano, tmp_path):
    target = tmp_path / "q"
    convert(
        ConvertOptions(
            source=NANO / "checkpoint.pt", target=target, tokenizer=NANO / "tokenizer.model", bits=4
        )
    )
    tokens = mx.array([[1, 5, 9]])
    assert mx.array_equal(load(nano, bits=4).model(tokens), load(target).model(tokens))
    with pytest.raises(OptionError, match="quantized already"):
        load(target, bits=4)


def types(engine):
    return {array.dtype for array in parameters(engine.model).values()}


@pytest.fixture
def metal(monkeypatch):
    """A Mac as MLX would describe it."""
    monkeypatch.setattr(device, "kind", lambda: "metal")
    facts = {"max_recommended_working_set_size": 11 << 30}
    monkeypatch.setattr(mx, "device_info", lambda *device: facts)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", mx.bfloat16), ("bfloat16", mx.bfloat16), ("float16", mx.float16)],
)
@pytest.mark.usefixtures("metal")
def test_metal_computes_in_half_types(tmp_path, stored, computed):
    source = random_folder(tmp_path / "source")
    folder = again(source, tmp_path / "model", dtype=stored, measure=False)
    assert types(load(folder)) == {computed}
    assert types(load(folder, dtype="float32")) == {mx.float32}


def test_the_cpu_computes_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    folder = again(random_folder(tmp_path / "source"), tmp_path / "model", dtype="bfloat16")
    assert types(load(folder)) == {mx.float32}


def test_damaged_weights_are_named(nano, tmp_path):
    name = "transformer.layers.0.attn.q_norm.weight"
    with pytest.raises(CheckpointError, match=f"broken: the tensors .*: 1 missing .{name}"):
        load(broken(nano, tmp_path / "a", lambda w: w.pop(name)))
    with pytest.raises(CheckpointError, match="1 the model does not have .extra."):
        load(broken(nano, tmp_path / "b", lambda w: w.update(extra=mx.zeros(3))))
    with pytest.raises(CheckpointError, match=r"q_norm.weight has shape \(3,\) where"):
        load(broken(nano, tmp_path / "c", lambda w: w.update({name: mx.zeros(3)})))
    cut = tmp_path / "cut"
    shutil.copytree(nano, cut)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is truncated: tensor "):
        load(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        load(cut)


def test_tokenizer_and_index_must_fit(nano, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(nano, folder)
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(TokenizerError, match="--tokenizer"):
        load(folder)
    assert load(folder, tokenizer=NANO / "tokenizer.model").vocab == 4096
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../other.safetensors"}})
    )
    with pytest.raises(
        CheckpointError, match=r"points to .*; shards must be .safetensors files of this folder"
    ):
        load(folder)
    folder = again(nano, tmp_path / "quantized", bits=4)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization": {"bits": 4}}))
    with pytest.raises(ConfigError, match="has a quantization without group_size"):
        load(folder)


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": "bfloat16"}, {"dtype": "float16", "bits": 4, "group_size": 32}]
)
def test_the_size_of_loaded_weights_is_known_beforehand(nano: Path, settings: dict[str, Any]):
    engine = load(nano, **settings)
    assert loaded_bytes(read_headers(nano), ModelOptions(**settings)) == engine.nbytes


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        (None, {"repetition_penalty": 1.2}),  # Apple's own examples
        ({"bos_token_id": 1, "top_k": None}, {"repetition_penalty": 1.2}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}),
        (
            {"temperature": 0.6, "repetition_penalty": 1.1},
            {"repetition_penalty": 1.1},
        ),  # greedy, as Hugging Face has it
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 5,
                "top_p": 0.9,
                "min_p": 0.1,
                "max_length": 9,
            },
            {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        ),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "presence_penalty": 1.0,
                "frequency_penalty": 0.2,
            },
            {"temperature": 0.6, "presence_penalty": 1.0, "frequency_penalty": 0.2},
        ),
        ({"presence_penalty": 1.0}, {"presence_penalty": 1.0}),
    ],
)
def test_a_folder_says_how_its_model_chats(tmp_path, stated, wanted):
    folder = random_folder(tmp_path / "m")
    if stated is not None:
        (folder / "generation_config.json").write_text(json.dumps(stated))
    assert load(folder).chat_sampling == SamplingOptions(**wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json cannot be read as JSON"),
        ("[]", "generation_config.json must contain an object, not list"),
        ('{"do_sample": 1}', "generation_config.json: do_sample is 1; it must be true or false"),
        (
            '{"temperature": "hot"}',
            "generation_config.json: temperature is 'hot'; allowed is a number from 0.0 to 100.0",
        ),
        (
            '{"do_sample": true, "top_p": 2}',
            "generation_config.json: top_p is 2; allowed is a number from 0.0 to 1.0",
        ),
        (
            '{"repetition_penalty": 0}',
            "generation_config.json: repetition_penalty is 0; allowed is",
        ),
    ],
)
def test_a_damaged_generation_config_is_named(tmp_path, content, message):
    folder = random_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(content)
    for use in (lambda: load(folder), lambda: again(folder, tmp_path / "again")):
        with pytest.raises(ConfigError, match=message):
            use()
    assert not (tmp_path / "again").exists()
