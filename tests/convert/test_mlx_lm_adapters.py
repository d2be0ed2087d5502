"""Adapters as mlx-lm's own trainer lays them down: merged, they give mlx-lm's logits."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from formats import mlx_lm_logits, our_logits
from golden_set import NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError


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
            "the adapter of .*3.attn.qkv_proj. lacks lora_b",
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
