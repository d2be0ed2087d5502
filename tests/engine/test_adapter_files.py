"""Adapter folders of PEFT and mlx-lm: read as their formulas say, written back without loss."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from adapter_folders import EMBEDDINGS, ROLES, mlx_lm_folder, peft_folder, stems
from formats import TINY

from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import read_adapter, write_adapter
from openelm_mlx.errors import CheckpointError, ConversionError, OpenELMError
from openelm_mlx.model.adapters import Adapter, LowRank
from openelm_mlx.model.config import expected_tensors

TWO = replace(TINY, num_transformer_layers=2)
UNTIED = replace(TWO, share_input_output_layers=False)
QKV = "transformer.layers.1.attn.qkv_proj"
RANKS = {QKV: 3, "transformer.layers.0.ffn.proj_2": 6}
KINDS = {
    "lora": {},
    "rs": {"use_rslora": True, "lora_alpha": 7, "r": 5},
    "dora": {"use_dora": True},
    "patterns": {
        "ranks": RANKS,
        "alpha_pattern": {"^transformer.layers.0.attn.qkv_proj": 3, r"\d.ffn.proj_1": 5},
    },
    "embedding": {"roles": ("embedding", "ffn.proj_1")},
    "half": {"dtype": mx.float16},
    "brain": {"dtype": mx.bfloat16, "use_dora": True},
    "sides": {"roles": ("embedding", "head", "ffn.proj_1"), "lora_alpha": 3.3},
    "columns": {"roles": ("embedding", "ffn.proj_1"), "use_dora": True},
}


def weights(config=UNTIED) -> dict[str, np.ndarray]:
    """Random matrices of a model, float32, by stem."""
    rng = np.random.default_rng(7)
    return {
        name.removesuffix(".weight"): rng.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2
    }


def merged(adapter: Adapter, matrices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of an adapted model; a head that is tied comes as `lm_head` if it differs."""
    whole = {"lm_head": matrices[EMBEDDINGS], **matrices}
    return {
        stem: np.array(adapter.parts[stem].merged(mx.array(whole[stem])))
        if stem in adapter.parts
        else whole[stem]
        for stem in whole
    }


def by_formula(folder, alpha_of, stabilised=False) -> dict[str, np.ndarray]:
    """Merge a PEFT folder into `weights()` in float64, by the papers' formulas."""
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    arrays = {k: np.array(v.astype(mx.float32), np.float64) for k, v in tensors.items()}
    result = {}
    for stem, w in weights().items():
        name = f"base_model.model.{stem}"
        if f"{name}.lora_embedding_A" in arrays:
            a, b = arrays[f"{name}.lora_embedding_A"], arrays[f"{name}.lora_embedding_B"]
            rank, update = len(a), (b @ a).T
        elif f"{name}.lora_A.weight" in arrays:
            a, b = arrays[f"{name}.lora_A.weight"], arrays[f"{name}.lora_B.weight"]
            rank, update = len(a), b @ a
        else:
            result[stem] = w
            continue
        new = w + alpha_of(stem) / (math.sqrt(rank) if stabilised else rank) * update
        if (m := arrays.get(f"{name}.lora_magnitude_vector")) is not None:
            rows = stem != EMBEDDINGS
            gain = m / np.linalg.norm(new, axis=int(rows))
            new *= gain[:, None] if rows else gain
        result[stem] = new
    return result


def alpha_in(kind):
    def alpha(stem):
        if kind == "patterns":
            ends = {"layers.0.attn.qkv_proj": 3, "ffn.proj_1": 5}
            return next((value for end, value in ends.items() if stem.endswith(end)), 8)
        return KINDS[kind].get("lora_alpha", 8)

    return alpha


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_means_what_the_papers_say(tmp_path, kind):
    folder = peft_folder(tmp_path / "a", UNTIED, **KINDS[kind])
    found = merged(read_adapter(folder, UNTIED), weights())
    expected = by_formula(folder, alpha_in(kind), kind == "rs")
    for stem, w in expected.items():
        assert np.abs(found[stem] - w).max() < 1e-6, stem
    assert max(np.abs(expected[s] - w).max() for s, w in weights().items()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_peft_to_peft_gives_equal_files(tmp_path, kind):
    folder = peft_folder(tmp_path / "a", UNTIED, **KINDS[kind])
    write_adapter(tmp_path / "b", read_adapter(folder, UNTIED), "peft", UNTIED, "base")
    one, other = (mx.load(str(tmp_path / n / "adapter_model.safetensors")) for n in "ab")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(array, other[name]) for name, array in one.items())
    assert {name: array.dtype for name, array in one.items()} == {
        name: array.dtype for name, array in other.items()
    }
    before, after = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab")
    assert after["base_model_name_or_path"] == "base"
    assert after["use_rslora"] == (kind == "rs")
    if kind != "patterns":
        assert repr(after["lora_alpha"]) == repr(before.get("lora_alpha"))
        assert after["r"] == before["r"]
        assert after["rank_pattern"] == after["alpha_pattern"] == {}
    else:
        assert after["rank_pattern"] == RANKS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "columns"])
def test_peft_to_mlx_lm_and_back_adapts_alike(tmp_path, kind):
    first = read_adapter(peft_folder(tmp_path / "a", UNTIED, **KINDS[kind]), UNTIED)
    write_adapter(tmp_path / "b", first, "mlx-lm", UNTIED)
    second = read_adapter(tmp_path / "b", UNTIED)
    write_adapter(tmp_path / "c", second, "peft", UNTIED)
    third = read_adapter(tmp_path / "c", UNTIED)
    expected = merged(first, weights())
    for adapter in (second, third):
        assert adapter.parts.keys() == first.parts.keys()
        for stem, w in merged(adapter, weights()).items():
            assert np.abs(w - expected[stem]).max() < 1e-6


def test_both_sides_of_a_tied_embedding_or_one(tmp_path):
    """PEFT adapts the input side of a tied embedding, mlx-lm both."""
    one = read_adapter(peft_folder(tmp_path / "p", TWO, ["embedding"]), TWO)
    both = read_adapter(mlx_lm_folder(tmp_path / "m", TWO, ["embedding"]), TWO)
    assert list(one.parts) == [EMBEDDINGS]
    assert both.parts["lm_head"] is both.parts[EMBEDDINGS]
    write_adapter(tmp_path / "m2", both, "mlx-lm", TWO)
    a, b = (mx.load(str(tmp_path / n / "adapters.safetensors")) for n in ("m", "m2"))
    assert all(mx.array_equal(array, b[name]) for name, array in a.items()) and len(a) == len(b)
    with pytest.raises(ConversionError, match="one side of a tied .* --adapter keep, which gives"):
        write_adapter(tmp_path / "x", one, "mlx-lm", TWO)
    with pytest.raises(ConversionError, match="PEFT adapts the input side only. Merge it, or"):
        write_adapter(tmp_path / "x", both, "peft", TWO)
    assert not (tmp_path / "x").exists()


def test_dora_of_an_embedding_is_of_rows_or_of_columns(tmp_path):
    peft = read_adapter(peft_folder(tmp_path / "p", TWO, ["embedding"], use_dora=True), TWO)
    part = replace(peft.parts[EMBEDDINGS], magnitude=mx.ones((64,)))
    theirs = replace(peft, parts={EMBEDDINGS: part, "lm_head": part})
    write_adapter(tmp_path / "m", theirs, "mlx-lm", TWO)
    assert read_adapter(tmp_path / "m", TWO).parts["lm_head"].magnitude.shape == (64,)
    with pytest.raises(ConversionError, match="lengths of columns, and in the form of mlx-lm they"):
        write_adapter(tmp_path / "x", peft, "mlx-lm", UNTIED)
    with pytest.raises(ConversionError, match="lengths of rows, and in the form of peft they are"):
        write_adapter(tmp_path / "x", replace(peft, parts={EMBEDDINGS: part}), "peft", TWO)
    with pytest.raises(CheckpointError, match="was made for another model"):
        read_adapter(tmp_path / "p", replace(TWO, vocab_size=60))


def test_padding_of_the_vocabulary_is_cut_and_added(tmp_path):
    """CoreNet pads the vocabulary, and a conversion cuts that: either may be adapted."""
    padded = replace(TWO, vocab_size=80)
    adapter = read_adapter(mlx_lm_folder(tmp_path / "a", padded, ["embedding"]), TWO)
    part = adapter.parts[EMBEDDINGS]
    assert part.b.shape == (64, 4) and adapter.parts["lm_head"] is part
    write_adapter(tmp_path / "b", adapter, "mlx-lm", TWO)
    back = read_adapter(tmp_path / "b", padded).parts[EMBEDDINGS].b
    assert mx.array_equal(back[:64], part.b) and not back[64:].any().item()
    with pytest.raises(CheckpointError, match="was made for another model"):
        read_adapter(tmp_path / "a", replace(TWO, vocab_size=400))


def changed(**settings):
    return lambda config, tensors: config.update(settings)


def renamed(old, new):
    def change(config, tensors):
        tensors.update({new: tensors.pop(old)} if new else {"": tensors.pop(old)})
        tensors.pop("", None)

    return change


NAME = f"base_model.model.{QKV}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(peft_type="LOHA"), "peft_type is 'LOHA'; of PEFT's adapters LORA is read"),
        (changed(bias="all"), "bias is 'all', but OpenELM has no biases; allowed: none"),
        (changed(modules_to_save=["lm_head"]), "modules_to_save is set, which is more than LoRA"),
        (changed(layer_replication=[[0, 1]]), "layer_replication is set, which is more than"),
        (changed(trainable_token_indices=[3]), "trainable_token_indices is set, which is more"),
        (changed(lora_bias=True), "lora_bias is set"),
        (changed(a_key_of_tomorrow={"x": 1}), "a_key_of_tomorrow is set"),
        (changed(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which may have changed the"),
        (changed(init_lora_weights="olora"), "is 'olora', which may have changed the base; save"),
        (changed(init_lora_weights="corda"), "init_lora_weights is 'corda'"),
        (changed(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
        (changed(init_lora_weights=[1]), r"init_lora_weights is \[1\]"),
        (changed(use_rslora="yes"), "use_rslora is 'yes'; it must be true or false"),
        (changed(r=5), "gives .* rank 5, but its tensors have rank 4"),
        (changed(r=0), "r has 0; a rank is a whole number above 0"),
        (changed(lora_alpha=None), "lora_alpha has None; an alpha is a number below 1e9"),
        (changed(lora_alpha=math.nan), "lora_alpha has nan; an alpha"),
        (changed(rank_pattern=[3]), "rank_pattern must be an object of at most 4096 names"),
        (changed(alpha_pattern={"x": "y"}), "alpha_pattern has 'y'; an alpha is a number"),
        (changed(alpha_pattern={"(a+)+": 1}), r"regex '\(a\+\)\+' of alpha_pattern is more than"),
        (changed(use_dora=True), "lacks lora_magnitude_vector"),
        (renamed(f"{NAME}.lora_B.weight", None), "adapter of '.*1.attn.qkv_proj' lacks lora_B"),
        (
            renamed(f"{NAME}.lora_B.weight", f"{NAME}.base_layer.weight"),
            "base_layer.weight', which is no part of LoRA or DoRA, .* save_embedding_layers=F",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_A": mx.ones((4, 32))}),
            "lora_A', which is no part of LoRA or DoRA, or a second one|lora_A.weight', which is",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_magnitude_vector": mx.ones((96,))}),
            "has, beside LoRA's, lora_magnitude_vector",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_A.weight": mx.ones((4,))}),
            r"lora_A of .*1.attn.qkv_proj' has shape \(4,\); it must be a matrix",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_A.weight": mx.full((4, 32), math.nan)}),
            "A of transformer.layers.1.attn.qkv_proj has NaN or infinite weights",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_A.weight": mx.ones((4, 32), mx.int32)}),
            "lora_A.weight is int32; allowed: float32, bfloat16, float16|allowed: float",
        ),
        (
            lambda c, t: t.update({f"{NAME}.lora_A.weight": mx.ones((4, 31))}),
            r"its transformer.layers.1.attn.qkv_proj adds \(96, 4\) times \(4, 31\)",
        ),
        (
            renamed(f"{NAME}.lora_B.weight", f"base_model.model.{QKV[:-9]}.k.lora_B.weight"),
            "lacks lora",
        ),
        (lambda c, t: t.clear(), "adapts nothing: its file has no tensors"),
        (lambda c, t: (c.clear(), c.update(r=4)), "has neither peft_type, as PEFT's has, nor"),
    ],
)
def test_folders_of_peft_that_are_refused(tmp_path, change, message):
    folder = peft_folder(tmp_path / "a", TWO, ["attn.qkv_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    mx.eval(tensors)
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    with pytest.raises(OpenELMError, match=message):
        read_adapter(folder, TWO)


def test_a_pickle_and_mixed_kinds_are_refused(tmp_path):
    folder = peft_folder(tmp_path / "a", TWO)
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(ConversionError, match="a pickle; load it with PEFT and save it again"):
        read_adapter(folder, TWO)
    lora = LowRank(mx.ones((1, 32)), mx.ones((32, 1)), 1.0)
    parts = {"transformer.layers.0.ffn.proj_2": lora, QKV: replace(lora, magnitude=mx.ones((32,)))}
    with pytest.raises(ConversionError, match="LoRA in some layers and DoRA in others"):
        write_adapter(tmp_path / "b", Adapter("x", parts), "peft", TWO)


@pytest.mark.needs("peft")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": list(ROLES)},
        {"target_modules": r".*layers\.1\.ffn\.proj_[12]", "fan_in_fan_out": True},
        {"target_modules": ["proj_1"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"target_modules": ["qkv_proj", "lm_head"], "use_rslora": True, "lora_alpha": 7, "r": 5},
        {"target_modules": ["qkv_proj", "proj_2", "lm_head"], "use_dora": True},
        {"target_modules": ["token_embeddings", "proj_1"]},
        {"target_modules": ["token_embeddings", "proj_1"], "use_dora": True},
        {
            "target_modules": ["qkv_proj", "proj_2"],
            "rank_pattern": {"layers.1.attn.qkv_proj": 3, "^transformer.layers.0.*proj_2": 2},
            "alpha_pattern": {"proj_2": 3},
        },
    ],
)
def test_peft_itself_merges_alike_and_loads_what_is_written(tmp_path, settings):
    from peft_models import merged_by_peft, saved_by_peft

    expected = saved_by_peft(tmp_path / "a", weights(), settings)
    adapter = read_adapter(tmp_path / "a", UNTIED)
    found = merged(adapter, weights())
    write_adapter(tmp_path / "b", adapter, "peft", UNTIED)
    again = merged_by_peft(tmp_path / "b", weights())
    for stem, w in expected.items():
        assert np.abs(found[stem] - w).max() < 1e-6, stem
        assert np.array_equal(again[stem], w), stem
    assert any(np.abs(w - expected[stem]).max() > 0.05 for stem, w in weights().items())


def test_stems_of_the_helper_are_those_of_the_model():
    assert {*stems(UNTIED), EMBEDDINGS, "lm_head"} == weights().keys()
