"""LoRA and DoRA adapters, of CoreNet and of mlx-lm, give the logits of the reference when merged
and when kept apart.
"""

from __future__ import annotations

import hashlib
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
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError, OpenELMError, OptionError
from openelm_mlx.model.config import OpenELMConfig

FIXTURES = ("lora", "lora-rs", "dora")


def run(name, tmp_path, **fields):
    return convert(
        ConvertOptions(
            **{
                "source": GOLDEN / name / "checkpoint.pt",
                "target": tmp_path / "m",
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
    assert (
        "--adapter-path PATH_OF_THIS_FOLDER/adapter" in (tmp_path / "m" / "README.md").read_text()
    )


def test_a_kept_adapter_on_a_quantized_base(tmp_path):
    golden = np.load(GOLDEN / "lora" / "golden.npz")
    run("lora", tmp_path, adapter="keep", bits=8, group_size=32)
    applied = mlx_lm_logits(tmp_path / "m", golden["input_ids"], tmp_path / "m" / "adapter")
    base = mlx_lm_logits(tmp_path / "m", golden["input_ids"])
    errors = [np.abs(logits - golden["logits"]).mean() for logits in (applied, base)]
    assert errors[0] < 0.1 * errors[1]
    with pytest.raises(OptionError, match="no DoRA adapter to a quantized embedding; merge it"):
        run("dora", tmp_path, adapter="keep", bits=8, group_size=32, target=tmp_path / "n")
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
    run("lora", tmp_path, config=tmp_path / "c.yaml", adapter="keep", target=tmp_path / "kept")
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


# adapters in mlx-lm's own format


@pytest.mark.parametrize("name", FIXTURES)
def test_a_kept_adapter_merges_to_what_merging_at_once_gives(name, tmp_path):
    run(name, tmp_path)
    run(name, tmp_path, adapter="keep", target=tmp_path / "kept")
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The nano model with a LoRA and a DoRA adapter as mlx-lm's own trainer lays them down, weights
    random.
    """
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from openelm_mlx.device import utils

    folder = tmp_path_factory.mktemp("trained")
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=folder / "base"))
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=folder / "base8", bits=8))
    keys = ["attn.qkv_proj", "ffn.proj_1", "transformer.token_embeddings"]
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    for kind in ("lora", "dora"):
        model, _ = load(str(folder / "base"))
        model.freeze()
        linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
        weights = dict(utils.tree_flatten(model.trainable_parameters()))
        random = {
            k: v + 0.05 * mx.random.normal(v.shape, key=mx.random.key(len(k)))
            for k, v in weights.items()
        }
        (folder / kind).mkdir()
        mx.save_safetensors(str(folder / kind / "adapters.safetensors"), random)
        config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
        (folder / kind / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_mlx_lm_merged_equal_applied(tmp_path, trained, kind):
    tokens = np.load(NANO / "golden.npz")["input_ids"]
    applied = mlx_lm_logits(trained / "base", tokens, trained / kind)
    convert(
        ConvertOptions(
            source=trained / "base", target=tmp_path / "m", adapter_folder=trained / kind
        )
    )
    assert np.abs(our_logits(tmp_path / "m", tokens) - applied).max() < 1e-4
    assert np.abs(our_logits(trained / "base", tokens) - applied).max() > 0.1
    hashes = json.loads((tmp_path / "m" / "conversion.json").read_text())["source_sha256"]
    assert (
        hashes["adapters.safetensors"]
        == hashlib.sha256((trained / kind / "adapters.safetensors").read_bytes()).hexdigest()
    )
    # into CoreNet's file, and into a quantized base, whose other matrices stay packed
    convert(
        ConvertOptions(
            source=NANO / "checkpoint.pt", target=tmp_path / "pt", adapter_folder=trained / kind
        )
    )
    assert (tmp_path / "pt" / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()
    convert(
        ConvertOptions(
            source=trained / "base8", target=tmp_path / "q", adapter_folder=trained / kind
        )
    )
    written = mx.load(str(tmp_path / "q" / "model.safetensors"))
    assert "transformer.layers.3.attn.out_proj.scales" in written
    assert (
        "transformer.layers.3.attn.qkv_proj.scales" not in written
        and "transformer.token_embeddings.scales" not in written
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, t: c.update(fine_tune_type="full"),
            "fine_tune_type is full; only lora and dora are adapters here",
        ),
        (
            lambda c, t: c.update(lora_parameters={"rank": 4}),
            "has no number as lora_parameters.scale",
        ),
        (
            lambda c, t: t.update(
                {"model.x.lora_a": mx.zeros((8, 4)), "model.x.lora_b": mx.zeros((4, 8))}
            ),
            "changes model.x, which this model lacks; give an adapter",
        ),
        (
            lambda c, t: t.pop("transformer.layers.3.attn.qkv_proj.lora_b"),
            "the adapter of .*3.attn.qkv_proj lacks lora_b",
        ),
        (
            lambda c, t: t.update({"transformer.layers.3.attn.qkv_proj.lora_b": mx.zeros((4, 7))}),
            r"its .*3.attn.qkv_proj adds \(7, 4\) times \(4, 128\), to 256 x 128",
        ),
    ],
)
def test_adapters_of_mlx_lm_that_do_not_fit(tmp_path, trained, change, message):
    shutil.copytree(trained / "lora", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    change(config, tensors)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), tensors)
    with pytest.raises(OpenELMError, match=message):
        convert(
            ConvertOptions(
                source=trained / "base", target=tmp_path / "m", adapter_folder=tmp_path / "a"
            )
        )
    assert not (tmp_path / "m").exists()
