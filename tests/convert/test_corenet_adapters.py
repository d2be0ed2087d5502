"""LoRA and DoRA inside CoreNet's checkpoints give the logits of the reference when merged, when
kept apart, and when applied beside the base.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from formats import mlx_lm_logits, our_logits, tokenizer_file
from golden_set import GOLDEN, NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.sources.corenet_adapters import LoraOptions, corenet_adapter
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.targets import folder
from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import read_adapter
from openelm_mlx.errors import ConfigError, ConversionError, OptionError
from openelm_mlx.model.adapters import adapted
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.model.fingerprint import fingerprint, same_base

FIXTURES = ("lora", "lora-rs", "dora")


def run(name, tmp_path, target="m", **fields):
    return convert(
        ConvertOptions(
            **{
                "source": GOLDEN / name / "checkpoint.pt",
                "target": tmp_path / target,
                "tokenizer": tokenizer_file(tmp_path, 112),
                **fields,
            }
        )
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_merged_logits_equal_the_reference(name, tmp_path):
    golden = np.load(GOLDEN / name / "golden.npz")
    run(name, tmp_path)
    assert not OpenELMConfig.from_file(tmp_path / "m" / "config.json").share_input_output_layers
    for logits in (our_logits, mlx_lm_logits):
        assert np.abs(logits(tmp_path / "m", golden["input_ids"]) - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", FIXTURES)
def test_adapters_kept_apart_give_the_same_logits_in_mlx_lm(name, tmp_path):
    golden = np.load(GOLDEN / name / "golden.npz")
    run(name, tmp_path, adapter="keep")
    applied = mlx_lm_logits(tmp_path / "m", golden["input_ids"], tmp_path / "m" / "adapter")
    assert np.abs(applied - golden["logits"]).max() < 1e-4
    base = mlx_lm_logits(tmp_path / "m", golden["input_ids"])
    assert np.abs(base - golden["logits"]).max() > 1e-2  # the folder itself holds the base
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["adapter"] == "kept beside its base"
    assert "--adapter PATH_OF_THIS_FOLDER/adapter" in (tmp_path / "m" / "README.md").read_text()


def test_a_kept_adapter_on_a_quantized_base(tmp_path, monkeypatch):
    golden = np.load(GOLDEN / "lora" / "golden.npz")
    run("lora", tmp_path, adapter="keep", bits=8, group_size=32)
    applied = mlx_lm_logits(tmp_path / "m", golden["input_ids"], tmp_path / "m" / "adapter")
    base = mlx_lm_logits(tmp_path / "m", golden["input_ids"])
    errors = [np.abs(logits - golden["logits"]).mean() for logits in (applied, base)]
    assert errors[0] < 0.1 * errors[1]
    monkeypatch.setattr(folder, "plan_quantization", None)  # it is refused before
    for asked in ({"bits": 8, "group_size": 32}, {"target_bpw": 6.0}):
        with pytest.raises(OptionError, match="no DoRA adapter to a quantized embedding; merge it"):
            run("dora", tmp_path, adapter="keep", target="n", **asked)
    assert not (tmp_path / "n").exists()


def test_strength_by_flag_instead_of_yaml(tmp_path):
    shutil.copy(GOLDEN / "lora-rs" / "checkpoint.pt", tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="strength is not in the tensors: .* --lora-alpha"):
        run("lora-rs", tmp_path, source=tmp_path / "x.pt")
    run("lora-rs", tmp_path, source=tmp_path / "x.pt", lora_alpha=8, rank_stabilised=True)
    golden = np.load(GOLDEN / "lora-rs" / "golden.npz")
    assert np.abs(our_logits(tmp_path / "m", golden["input_ids"]) - golden["logits"]).max() < 1e-4


def test_ranks_and_scales_that_differ_by_layer(tmp_path):
    """mlx-lm knows one rank and scale: padding and folding must not change what is computed."""
    text = (
        (GOLDEN / "lora" / "config.yaml").read_text().replace("lora_alpha: 16", "lora_alpha: 5", 1)
    )
    (tmp_path / "c.yaml").write_text(text)
    run("lora", tmp_path, config=tmp_path / "c.yaml")
    run("lora", tmp_path, config=tmp_path / "c.yaml", adapter="keep", target="kept")
    tokens = np.load(GOLDEN / "lora" / "golden.npz")["input_ids"]
    settings = json.loads((tmp_path / "kept" / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["scale"] == 1.0
    applied = mlx_lm_logits(tmp_path / "kept", tokens, tmp_path / "kept" / "adapter")
    assert np.abs(applied - our_logits(tmp_path / "m", tokens)).max() < 1e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("r: 8", "r: 9", "gives token_embeddings rank 9, but its tensors have rank 8"),
        ("lora_alpha: 16", "lora_alpha: .nan", "needs lora_alpha, r and use_rslora as numbers"),
        (
            "regex: .*token_embedding.*",
            "regex: (a+)+$",
            "the regex '.a\\+.\\+\\$' of model.lora.config is more than names",
        ),
        (
            "regex: .*token_embedding.*",
            "regex: nothing",
            "token_embeddings, whose strength is not in the tensors",
        ),
    ],
)
def test_a_yaml_that_does_not_fit(tmp_path, old, new, message):
    text = (GOLDEN / "lora" / "config.yaml").read_text().replace(old, new, 1)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((ConfigError, ConversionError), match=message):
        run("lora", tmp_path, config=tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {lora: {config: 3}}", "model.lora.config must be a list"),
        ("model: {lora: {config: [3]}}", "an entry of model.lora.config has no params"),
    ],
)
def test_a_yaml_of_other_form(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        corenet_adapter(
            TorchCheckpoint(GOLDEN / "lora" / "checkpoint.pt"),
            LoraOptions(yaml=tmp_path / "c.yaml"),
        )


class Altered(TorchCheckpoint):
    """The LoRA or DoRA fixture with a change to its list of tensors."""

    def __init__(self, change, name="lora"):
        super().__init__(GOLDEN / name / "checkpoint.pt")
        change(self.tensors)


Q = "transformer.layers.1.attn.qkv_proj."
M = "transformer.token_embeddings.lora_magnitude_vector.lora"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "lora",
            lambda t: t.pop(Q + "base_layer.weight"),
            rf"adapter of {Q[:-1]} lacks base_layer.weight",
        ),
        ("lora", lambda t: t.pop(Q + "lora_B.lora.weight"), rf"adapter of {Q[:-1]} lacks lora_B"),
        (
            "lora",
            lambda t: t.update({Q + "lora_A.other.weight": t[Q + "lora_A.lora.weight"]}),
            r"several adapters \(lora, other",
        ),
        (
            "lora",
            lambda t: t.update({Q + "lora_A.lora.weight": t["transformer.norm.weight"]}),
            r"has A of shape \(96,\) and B",
        ),
        (
            "dora",
            lambda t: t.update({Q + "lora_magnitude_vector.lora": t["transformer.norm.weight"]}),
            r"\(96,\) for 256 rows",
        ),
        (
            "dora",
            lambda t: t.update({M: t["transformer.norm.weight"]}),
            "is DoRA on an embedding, which CoreNet does not define",
        ),
    ],
)
def test_adapters_that_are_not_whole(name, change, message):
    with pytest.raises(ConversionError, match=message):
        corenet_adapter(Altered(change, name), LoraOptions(alpha=16.0))


def test_flags_for_adapters_without_an_adapter(tmp_path):
    with pytest.raises(OptionError, match="contains no adapter; leave out --adapter"):
        convert(
            ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "m", adapter="keep")
        )


def test_a_merge_in_half_precision_rounds_once(tmp_path):
    run("lora", tmp_path, dtype="bfloat16")
    written = mx.load(str(tmp_path / "m" / "model.safetensors"))
    source, model = GOLDEN / "lora" / "checkpoint.pt", tmp_path / "tokenizer.model"
    opened = open_model(ConvertOptions(source=source, target=tmp_path / "x", tokenizer=model))
    exact = opened.load("transformer.layers.1.attn.qkv_proj.weight")
    assert mx.array_equal(
        written["transformer.layers.1.attn.qkv_proj.weight"], exact.astype(mx.bfloat16)
    )


@pytest.mark.parametrize("form", ["mlx", "hf"])
def test_rows_that_pad_the_vocabulary_are_cut_from_the_adapter_too(form, tmp_path):
    (tmp_path / "smaller").mkdir()
    tokens, smaller = mx.array([[1, 7, 90, 3]]), tokenizer_file(tmp_path / "smaller", 100)
    run("dora", tmp_path, tokenizer=smaller)
    run("dora", tmp_path, "kept", tokenizer=smaller, adapter="keep", target_format=form)
    config = OpenELMConfig.from_file(tmp_path / "kept" / "config.json")
    model = OpenELM(config)
    model.load_weights(str(tmp_path / "kept" / "model.safetensors"))
    logits = adapted(model, read_adapter(tmp_path / "kept" / "adapter", config))(tokens)
    assert logits.shape == (1, 4, 100)
    assert np.abs(np.array(logits) - our_logits(tmp_path / "m", np.array(tokens))).max() < 1e-4


@pytest.mark.parametrize("name", FIXTURES)
def test_an_adapter_is_read_out_of_a_checkpoint(name, tmp_path):
    """Applied beside the base, it gives the reference's logits; it belongs to that base alone."""
    golden = np.load(GOLDEN / name / "golden.npz")
    run(name, tmp_path, adapter="keep", target_format="hf")
    config = OpenELMConfig.from_file(tmp_path / "m" / "config.json")
    model = OpenELM(config)
    model.load_weights(str(tmp_path / "m" / "model.safetensors"))
    for place in (GOLDEN / name, GOLDEN / name / "checkpoint.pt", tmp_path / "m" / "adapter"):
        adapter = read_adapter(place, config)
        logits = adapted(model, adapter)(mx.array(golden["input_ids"]))
        assert np.abs(np.array(logits) - golden["logits"]).max() < 1e-4
        assert same_base(adapter.base, fingerprint(config, parameters(model).get))
    with pytest.raises(ConversionError, match="contains an adapter already; leave out --adapter-f"):
        run(name, tmp_path, target="n", adapter_folder=tmp_path / "m" / "adapter")
    for other in (NANO, GOLDEN / name / "golden.npz", GOLDEN / name / "config.yaml"):
        with pytest.raises(ConversionError, match="is not an adapter: give a folder with adapter_"):
            read_adapter(other, config)
    with pytest.raises(ConversionError, match="nowhere does not exist: give a folder with"):
        read_adapter(tmp_path / "nowhere", config)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_kept_adapter_merges_to_what_merging_at_once_gives(name, tmp_path):
    run(name, tmp_path)
    run(name, tmp_path, adapter="keep", target="kept")
    convert(
        ConvertOptions(
            source=tmp_path / "kept",
            target=tmp_path / "fused",
            adapter_folder=tmp_path / "kept" / "adapter",
        )
    )
    at_once, later = (
        mx.load(str(tmp_path / folder / "model.safetensors")) for folder in ("m", "fused")
    )
    assert at_once.keys() == later.keys()
    for key, array in at_once.items():
        assert mx.allclose(array, later[key], atol=1e-6).item(), key
