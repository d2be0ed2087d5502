"""Damaged files: whatever is read, the answer is a model or an error of this project that names the
file; and what is loaded can be converted, and the other way round.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
from adapter_folders import mlx_lm_folder, peft_folder
from formats import TINY, changed, everything, tokenizer_file
from fuzzing import (
    FUZZ,
    LONG,
    SCRATCH,
    TOKENS,
    assert_read_alike,
    assert_survival,
    damage,
    damaged,
    damaged_folder,
    json_values,
    made,
    scratch,
    tiny_folder,
)
from golden_set import GOLDEN, NANO
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx import load
from openelm_mlx.convert.opening import corenet_section
from openelm_mlx.convert.sources.corenet_adapters import (
    LoraOptions,
    corenet_adapter,
    has_adapters,
)
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.model.config import expected_tensors

__all__ = ["scratch"]  # a fixture
TABLE, HEAD = "transformer.token_embeddings", "lm_head"


@given(damage(), st.sampled_from([600, -400, 1 << 30]))
@FUZZ
def test_pt(change, span):
    path = SCRATCH / "x.pt"
    path.write_bytes(damaged((GOLDEN / "gpt-test" / "checkpoint.pt").read_bytes(), change, span))
    with assert_survival(str(path), "tokenizer-64"):
        everything(path, tokenizer=tokenizer_file(SCRATCH, 64))


@given(damage())
@FUZZ
def test_pickle_of_a_pt(change):
    """The zip stays whole and its checksums right, so that the damage reaches the pickle reader."""
    import zipfile

    path = SCRATCH / "y.pt"
    source = GOLDEN / "gpt-test" / "checkpoint.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(
                info.filename,
                damaged(data, change, 1 << 30) if info.filename.endswith("data.pkl") else data,
            )
    with assert_survival(str(path), "tokenizer-64"):
        everything(path, tokenizer=tokenizer_file(SCRATCH, 64))


@given(damage(), st.sampled_from([16, 1200]))
@FUZZ
def test_safetensors(change, span):
    folder = damaged_folder("hf", tiny_folder(), "model.safetensors", change, span)
    assert_read_alike(folder)


@given(damage(), st.sampled_from([16, 3000]))
@FUZZ
def test_quantized_safetensors(change, span):
    folder = damaged_folder(
        "mlx", made("quantized", bits=4, group_size=32), "model.safetensors", change, span
    )
    assert_read_alike(folder)


@given(damage())
@FUZZ
def test_config_json(change):
    folder = damaged_folder(
        "config", made("quantized", bits=4, group_size=32), "config.json", change, 1 << 30
    )
    assert_read_alike(folder)


@given(damage(), st.sampled_from([40, 1400, 4000]))
@FUZZ
def test_gguf(change, span):
    path = SCRATCH / "x.gguf"
    path.write_bytes(
        damaged(made("tiny.gguf", target_format="gguf", bits=8).read_bytes(), change, span)
    )
    with assert_survival(str(path)):
        everything(path)


@given(damage())
@FUZZ
def test_yaml(change):
    path = SCRATCH / "c.yaml"
    path.write_bytes(damaged((GOLDEN / "dora" / "config.yaml").read_bytes(), change, 1 << 30))
    with assert_survival("c.yaml"):
        corenet_section(path)
    source = GOLDEN / "dora" / "checkpoint.pt"
    with assert_survival(str(path), str(source), "tokenizer-112"):
        everything(source, config=path, tokenizer=tokenizer_file(SCRATCH, 112))


@given(damage())
@FUZZ
def test_index_json(change):
    folder = SCRATCH / "sharded"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((tiny_folder() / name).read_bytes())
    shard = "model-00001-of-00001.safetensors"
    (folder / shard).write_bytes((tiny_folder() / "model.safetensors").read_bytes())
    index = json.dumps({"weight_map": dict.fromkeys(expected_tensors(TINY), shard)}).encode()
    (folder / "model.safetensors.index.json").write_bytes(damaged(index, change, 1 << 30))
    assert_read_alike(folder)


@given(damage(), st.sampled_from([mlx_lm_folder, peft_folder]), st.booleans())
@FUZZ
def test_adapter_folders(change, write, configuration):
    folder = write(SCRATCH / write.__name__, TINY, ("ffn.proj_2", "embedding"))
    file = next(folder.glob("*.json" if configuration else "*.safetensors"))
    file.write_bytes(damaged(file.read_bytes(), change, 1 << 30))
    assert_adapter_survives(folder)


SETTINGS = ["r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"]
SETTINGS += ["target_modules", "modules_to_save", "peft_type", "fan_in_fan_out", "num_layers"]
SETTINGS += ["lora_parameters", "fine_tune_type", "keys"]


@cache
def written(write):
    """An adapter, and its settings as they are written."""
    folder = write(SCRATCH / write.__name__, TINY, ("ffn.proj_2", "attn.qkv_proj"))
    return folder, json.loads((folder / "adapter_config.json").read_text())


@given(st.sampled_from(SETTINGS), json_values, st.sampled_from([mlx_lm_folder, peft_folder]))
@FUZZ
def test_any_setting_of_an_adapter(key, value, write):
    folder, raw = written(write)
    file = folder / "adapter_config.json"
    inner = raw.get("lora_parameters", {}) | {"scale" if key == "lora_alpha" else key: value}
    file.write_text(json.dumps(raw | {"lora_parameters": inner, key: value}))
    assert_adapter_survives(folder)


def assert_adapter_survives(folder):
    """Assert that it is merged, and applied beside the weights, or refused by name."""
    with assert_survival(folder.name):
        everything(tiny_folder(), adapter_folder=folder)
    with assert_survival(folder.name):
        mx.eval(load(tiny_folder(), adapter=folder).model(TOKENS))


@given(st.sampled_from(sorted(TINY.to_hf_dict()) + ["quantization"]), json_values)
@FUZZ
def test_any_value_under_any_key_of_a_config(key, value):
    folder = made("quantized", bits=4, group_size=32)
    raw = json.loads((folder / "config.json").read_text())
    target = SCRATCH / "valued"
    target.mkdir(exist_ok=True)
    for name in ("model.safetensors", "tokenizer.model"):
        (target / name).write_bytes((folder / name).read_bytes())
    (target / "config.json").write_text(json.dumps(raw | {key: value}))
    assert_read_alike(target)


@given(st.sampled_from(["dtype", "shape", "data_offsets", None]), json_values)
@FUZZ
def test_any_entry_in_a_safetensors_header(key, value):
    data = (tiny_folder() / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "transformer.layers.0.attn.out_proj.weight"
    header[name] = value if key is None else header[name] | {key: value}
    target = SCRATCH / "entry"
    target.mkdir(exist_ok=True)
    for side in ("config.json", "tokenizer.model"):
        (target / side).write_bytes((tiny_folder() / side).read_bytes())
    text = json.dumps(header).encode()
    (target / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + length :]
    )
    assert_read_alike(target)


def wrapped(arrays, name, other):
    return {["model.", "module._orig_mod."][len(other) % 2] + name: a for name, a in arrays.items()}


# what may be wrong, or only odd, with the tensors of a folder: functions of all, a name and another
CHANGES = {
    "drop": lambda arrays, name, other: {n: a for n, a in arrays.items() if n != name},
    "copy": lambda arrays, name, other: arrays | {name: arrays[other]},
    "head": lambda arrays, name, other: arrays | {name.replace(TABLE, HEAD): arrays[name]},
    "corenet": lambda arrays, name, other: {
        n.removeprefix("transformer."): a for n, a in arrays.items()
    },
    "wrap": wrapped,
    "insert": lambda arrays, name, other: {
        n.replace(".attn.", "._orig_mod.attn."): a for n, a in arrays.items()
    },
    "buffer": lambda arrays, name, other: arrays | {f"{name}.inv_freq": arrays[other]},
    "type": lambda arrays, name, other: arrays | {name: arrays[name].astype(mx.bfloat16)},
    "whole": lambda arrays, name, other: arrays | {name: arrays[name].astype(mx.uint32)},
    "double": lambda arrays, name, other: arrays | {name: arrays[name] * 2},
    "odd": lambda arrays, name, other: arrays | {name: arrays[name] * float("inf")},
    "turn": lambda arrays, name, other: arrays | {name: arrays[name].T},
    "flat": lambda arrays, name, other: arrays | {name: arrays[name].reshape(-1)},
}


places = st.integers(0, 99)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), places, places), max_size=4),
    st.booleans(),
    st.sampled_from([None, True, False]),
)
@settings(FUZZ, max_examples=int(LONG or 30))
def test_any_tensors(changes, quantized, tied):
    original = made("quantized", bits=4, group_size=32) if quantized else tiny_folder()
    folder = damaged_folder("tensors", original, "", None, 0)

    def change(arrays):
        for kind, first, second in changes:
            names = sorted(arrays)
            if names:
                picked = (names[number % len(names)] for number in (first, second))
                arrays = CHANGES[kind](arrays, *picked)
        return arrays

    changed(folder, change, share_input_output_layers=tied)
    assert_read_alike(folder)


def test_adapters_survive_damage_to_their_list():
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    source = TorchCheckpoint(GOLDEN / "dora" / "checkpoint.pt")
    names = list(source.tensors)
    for name in names:
        info = source.tensors.pop(name)
        if has_adapters(source):
            with assert_survival(str(source.path)):
                corenet_adapter(source, LoraOptions(alpha=16.0))
        source.tensors[name] = info


def test_flipped_weights_are_noticed(tmp_path):
    """A byte changed among the weights of a .pt: the checksum of its record tells."""
    data = bytearray((NANO / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(
        OpenELMError,
        match="x.pt: record '.*/data/.*' does not match its checksum: the file is damaged",
    ):
        everything(tmp_path / "x.pt", tokenizer=NANO / "tokenizer.model")
