"""Adapters that Hugging Face's PEFT itself makes, saves, loads and merges; it needs torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def skeleton(matrices: Mapping[str, np.ndarray]) -> Any:
    """Return a torch module with the matrices of a model under their names, which computes nothing:
    PEFT asks for no more.
    """
    import torch
    from torch import nn

    class Model(nn.Module):
        def prepare_inputs_for_generation(self) -> None:
            """PEFT wants this of a causal language model."""

    model = Model()
    for stem, matrix in matrices.items():
        rows, columns = matrix.shape
        kind = nn.Embedding if stem.endswith("embeddings") else nn.Linear
        leaf: Any = kind(rows, columns) if kind is nn.Embedding else kind(columns, rows, bias=False)
        leaf.weight.data = torch.from_numpy(matrix.copy())
        *above, last = stem.split(".")
        place: Any = model
        for name in above:
            if not hasattr(place, name):
                place.add_module(name, nn.Module())
            place = getattr(place, name)
        place.add_module(last, leaf)
    return model


def matrices_of(model: Any) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(".weight"): parameter.detach().numpy().copy()
        for name, parameter in model.named_parameters()
    }


def saved_by_peft(
    folder: Path, matrices: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Save an adapter with random numbers, and return the matrices that it is merged into."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, **settings})
        model = get_peft_model(skeleton(matrices), config)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
        model.save_pretrained(str(folder))
        return matrices_of(model.merge_and_unload())


def merged_by_peft(folder: Path, matrices: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the matrices that PEFT merges the adapter of a folder into; a warning is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(skeleton(matrices), str(folder))
    return matrices_of(model.merge_and_unload())
