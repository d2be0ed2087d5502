"""Folders of adapters with random numbers, laid down as mlx-lm and PEFT lay them, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

EMBEDDINGS = "transformer.token_embeddings"
ROLES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")


def stems(config: OpenELMConfig, roles: Iterable[str] = ROLES) -> list[str]:
    """Return the stems of all layers' matrices in these roles; "embedding" and "head" are two."""
    named = {"embedding": EMBEDDINGS, "head": "lm_head"}
    layers = range(config.num_transformer_layers)
    return [
        stem
        for role in roles
        for stem in (
            [named[role]]
            if role in named
            else [f"transformer.layers.{number}.{role}" for number in layers]
        )
    ]


def peft_folder(
    folder: Path,
    config: OpenELMConfig,
    roles: Iterable[str] = ROLES,
    ranks: dict[str, int] | None = None,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    **settings: Any,
) -> Path:
    """Write an adapter as PEFT saves it, and return the folder.

    `settings` go into adapter_config.json: the rank `r` is 4 by default, but for `ranks` by stem;
    with `use_dora` there are magnitudes.
    """
    rng, ranks = np.random.default_rng(seed), ranks or {}
    tensors, shapes = {}, expected_tensors(config)
    for stem in stems(config, roles):
        rows, columns = shapes.get(f"{stem}.weight", shapes[f"{EMBEDDINGS}.weight"])
        rank, name = ranks.get(stem, settings.get("r", 4)), f"base_model.model.{stem}"
        if stem == EMBEDDINGS:
            sides = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
        else:
            sides = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        for leaf, shape in sides.items():
            tensors[f"{name}.{leaf}"] = rng.normal(0, 0.1, shape)
        if settings.get("use_dora"):
            length = columns if stem == EMBEDDINGS else rows
            tensors[f"{name}.lora_magnitude_vector"] = rng.uniform(0.5, 1.5, length)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(array.astype(np.float32)) for name, array in tensors.items()}
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays, {"format": "pt"})
    written = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(roles),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "apple/OpenELM-270M",
        "lora_dropout": 0.05,
        "rank_pattern": ranks,
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def mlx_lm_folder(
    folder: Path, config: OpenELMConfig, roles: Iterable[str] = ROLES, seed: int = 0
) -> Path:
    """Write a LoRA adapter of rank 4 and scale 2 as mlx-lm's trainer does; return the folder."""
    rng, shapes, tensors = np.random.default_rng(seed), expected_tensors(config), {}
    for stem in stems(config, roles):
        rows, columns = shapes[f"{stem}.weight"]
        first, last = (rows, columns) if stem == EMBEDDINGS else (columns, rows)
        tensors[f"{stem}.lora_a"] = rng.normal(0, 0.1, (first, 4))
        tensors[f"{stem}.lora_b"] = rng.normal(0, 0.1, (4, last))
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(array.astype(np.float32)) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": stems(config, roles)}
    settings = {
        "fine_tune_type": "lora",
        "num_layers": config.num_transformer_layers,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
