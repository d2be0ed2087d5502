"""Prove a conversion: the written folder or GGUF file, read back, against the source's own weights
in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openelm_mlx.config_files import read_json
from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.quantize.forms import read_plan
from openelm_mlx.convert.quantize.functional import log_probs
from openelm_mlx.convert.quantize.packing import restored
from openelm_mlx.convert.quantize.planning import exact_weights
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.staging import config_of
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import read_text
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

TEXT = "Once upon a time there was a little girl who lived in a house at the edge of a great forest with her mother."
ROW = 512  # tokens scored in one context, BOS included
BATCH = 4  # rows in one pass
Model = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Written:
    """What was written, read back: its own configuration, and the float32 weights that its stored
    tensors stand for.
    """

    config: OpenELMConfig
    weights: Mapping[str, mx.array]


def verification_text(opened: OpenedModel, text: Path | None = None) -> list[mx.array]:
    """Batches of token ids [rows, length] from a file, or from a short text of our own.

    Raises `OptionError` for a file that is no text, `ConversionError` for an empty one.
    """
    ids = opened.tokenizer.processor.encode(
        TEXT if text is None else read_text(text, "--verify-text")
    )
    batches = text_batches(ids, min(ROW, opened.trimmed.max_context_length))
    if not batches:
        raise ConversionError(f"{text} has no text to verify on")
    return batches


def verify(
    path: Path, opened: OpenedModel, batches: Iterable[mx.array] | None = None
) -> dict[str, float]:
    """Losses of what was written to `path` on batches of token ids, or on a short text of our own;
    see `compare`.
    """
    batches = verification_text(opened) if batches is None else batches
    exact = dense_model(opened.trimmed, exact_weights(opened))
    written = read_folder(path) if path.is_dir() else read_gguf(path)
    return compare(exact, dense_model(written.config, written.weights), batches)


def compare(exact: Model, ours: Model, batches: Iterable[mx.array]) -> dict[str, float]:
    """Two models on batches of token ids [rows, length]; both give logits [rows, length, vocab].

    KL divergence is of the exact distribution from ours, in nats, over every position; agreement is
    of the likeliest token; perplexity scores every token but the first of a row.
    """
    divergences, agree, difference, scores, counts = [], 0.0, 0.0, [0.0, 0.0], 0
    for tokens in batches:
        logits = [model(tokens).astype(mx.float32) for model in (exact, ours)]
        reference, other = (log_probs(x) for x in logits)
        divergences.append(np.array((mx.exp(reference) * (reference - other)).sum(axis=-1)).ravel())
        same: Any = (reference.argmax(-1) == other.argmax(-1)).sum().item()
        largest: Any = mx.abs(logits[0] - logits[1]).max().item()
        agree, difference = agree + same, max(difference, largest)
        for place, x in enumerate((reference, other)):
            score: Any = mx.take_along_axis(x[:, :-1], tokens[:, 1:, None], axis=-1).sum().item()
            scores[place] += score
        counts += tokens[:, 1:].size
    all_of = np.concatenate(divergences)
    return {
        "tokens": counts,
        "mean_kl_divergence": float(all_of.mean()),
        "p99_kl_divergence": float(np.quantile(all_of, 0.99)),
        "top_1_agreement": agree / all_of.size,
        "perplexity": math.exp(-scores[1] / counts),
        "perplexity_of_source": math.exp(-scores[0] / counts),
        "max_logit_difference": difference,
    }


def check_bound(
    losses: Mapping[str, float], max_kl: float | None, target_format: str = "mlx"
) -> None:
    """Raise `ConversionError` where the mean KL divergence is above the bound."""
    found = losses["mean_kl_divergence"]
    better = "take more bits, --target-bpw or --calibrate"
    if target_format != "mlx":  # the others have few forms or none, and lose nothing in float32
        better = "take --dtype float32, without --bits"
    if max_kl is not None and not found <= max_kl:
        raise ConversionError(
            f"the mean KL divergence is {found:.4g} nats, above --max-kl {max_kl:g}; nothing was written: {better}"
        )


def text_batches(ids: list[int], length: int) -> list[mx.array]:
    """All tokens in consecutive rows, each after BOS: full rows in batches, the shorter last one by
    itself.
    """
    rows = [[1, *ids[start : start + length - 1]] for start in range(0, len(ids), length - 1)]
    full = [row for row in rows if len(row) == length]
    batches = [full[start : start + BATCH] for start in range(0, len(full), BATCH)]
    batches += [[row] for row in rows[len(full) :]]
    return [mx.array(batch, dtype=mx.int32) for batch in batches]


def read_folder(folder: Path) -> Written:
    config = OpenELMConfig.from_file(config_of(folder))
    written: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        arrays: Any = mx.load(str(file))
        written |= arrays
    shapes = expected_tensors(config)
    plan = read_plan(read_json(config_of(folder)).get("quantization"), shapes, set(written))
    return Written(
        config,
        {name: restored(name, written, plan.get(name.removesuffix(".weight"))) for name in shapes},
    )


def read_gguf(path: Path) -> Written:
    file = GGUFFile(path)
    return Written(
        file.config, {name: file.load_exact(name) for name in expected_tensors(file.config)}
    )


def dense_model(config: OpenELMConfig, weights: Mapping[str, mx.array]) -> Model:
    from openelm_mlx.model.decoder import OpenELM

    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    return model
