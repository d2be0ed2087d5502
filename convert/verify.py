"""Prove a conversion: the written folder or GGUF file, read back, against the source's own weights
in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.quantize.packing import restored
from openelm_mlx.convert.quantize.planning import exact_weights
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.staging import config_of
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.score import Model, compare
from openelm_mlx.files import read_json, read_text
from openelm_mlx.model.config import BOS, OpenELMConfig, expected_tensors
from openelm_mlx.quantization import read_plan

TEXT = "Once upon a time there was a little girl who lived in a house at the edge of a great forest with her mother."
ROW = 512  # tokens scored in one context, BOS included
BATCH = 4  # rows in one pass
NAMES = {"reference_perplexity": "perplexity_of_source"}  # in conversion.json


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
    """Return the losses of what was written to `path`, on batches of token ids or a short text of
    our own, under the names that conversion.json gives them.
    """
    batches = verification_text(opened) if batches is None else batches
    exact = dense_model(opened.trimmed, exact_weights(opened))
    written = read_folder(path) if path.is_dir() else read_gguf(path)
    found = asdict(compare(exact, dense_model(written.config, written.weights), batches))
    return {NAMES.get(name, name): value for name, value in found.items()}


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
    rows = [[BOS, *ids[start : start + length - 1]] for start in range(0, len(ids), length - 1)]
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
