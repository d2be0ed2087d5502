"""Adapters of the embedding: the input side, in a folder that gives what was trained."""

from __future__ import annotations

import numpy as np
import pytest
from golden_set import GOLDEN
from small import random_tokens, small_model
from training import write_pairs

from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import read_adapter, write_adapter
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune import finetune
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.trainable import adapter_of, form_of, trainable
from openelm_mlx.model.adapters import adapted
from openelm_mlx.model.config import EMBEDDINGS
from openelm_mlx.model.decoder import OpenELM


def small_engine(tiny, name):
    config, weights = small_model(name)
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    return Engine(model, tiny.tokenizer, config, name, GOLDEN)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("name", "form"), [("tied-gqa4", "peft"), ("untied-mha", "mlx-lm")])
def test_a_folder_gives_the_embedding_that_was_trained(tiny, tmp_path, name, form, method):
    engine = small_engine(tiny, name)
    options = FinetuneOptions(method=method, rank=3, targets=("token_embeddings", "qkv_proj"))
    model = trainable(engine, options)
    tokens = random_tokens(engine.config, 2, 8)
    assert np.allclose(model(tokens), engine.model(tokens), atol=1e-5)
    embedding = model.transformer.token_embeddings
    assert "m" not in embedding  # LoRA beside DoRA, too
    assert 0.8 < mx.std(embedding.a).item() < 1.2
    embedding.b = mx.random.normal(embedding.b.shape, key=mx.random.key(1)) * 0.1
    trained = model(tokens)
    assert not np.allclose(trained, engine.model(tokens), atol=1e-2)

    adapter = adapter_of(model, "trained")
    assert form_of(adapter, engine.config) == form and EMBEDDINGS in adapter.parts
    write_adapter(tmp_path / "adapter", adapter, form, engine.config)
    again = adapted(engine.model, read_adapter(tmp_path / "adapter", engine.config))
    assert np.allclose(again(tokens), trained, rtol=1e-5, atol=1e-5)


def test_a_run_of_corenets_recipe_can_be_loaded(tiny, tmp_path):
    own = {"rank": 2, "length": 48, "batch": 1, "accumulate": 1, "steps": 1, "validation_share": 0}
    options = FinetuneOptions.of(tiny.config, recipe="corenet-dora", **own)
    report = finetune(tiny, write_pairs(tmp_path / "pairs.jsonl", 4), tmp_path / "out", options)
    assert report.notes == (
        "corenet-dora is for Apple's sizes; this model takes what it says for 270m.",
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()  # PEFT's name
    adapter = read_adapter(tmp_path / "out", tiny.config)
    assert len(adapter.parts) == 1 + 4 * tiny.config.num_transformer_layers
    tokens = random_tokens(tiny.config, 1, 8)
    away = mx.abs(adapted(tiny.model, adapter)(tokens) - tiny.model(tokens)).max().item()
    assert 0 < away < 1
