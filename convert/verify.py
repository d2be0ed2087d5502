"""Proof of a conversion: what was written is read back and compared with the source in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import exact_weights
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.targets import config_of
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.score import compare
from openelm_mlx.files import read_json, read_text
from openelm_mlx.model.config import BOS, OpenELMConfig, expected_tensors
from openelm_mlx.quantization import planned, quantization_of, read_plan

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.model.decoder import OpenELM

TEXT = (
    "Once upon a time there was a little girl who lived in a house at the edge of a great forest "
    "with her mother."
)
ROW = 512  # tokens scored in one context, BOS included
BATCH = 4  # rows in one pass
NAMES = {"reference_perplexity": "perplexity_of_source"}  # what conversion.json calls a figure


def verification_text(opened: OpenedModel, text: Path | None = None) -> list[mx.array]:
    """Return batches of token ids [rows, length] from a file, or from a short text of our own.

    Raises `OptionError` for a file that is not text, `ConversionError` for an empty one.
    """
    content = TEXT if text is None else read_text(text, "--verify-text")
    ids = opened.tokenizer.processor.encode(content)
    batches = text_batches(ids, min(ROW, opened.trimmed.max_context_length))
    if not batches:
        raise ConversionError(f"{text} has no text to verify on")
    return batches


def text_batches(ids: list[int], length: int) -> list[mx.array]:
    """Return all tokens in consecutive rows, each after BOS: full rows in batches, the shorter last
    one by itself.
    """
    step = length - 1
    rows = [[BOS, *ids[start : start + step]] for start in range(0, len(ids), step)]
    full = [row for row in rows if len(row) == length]
    batches = [full[start : start + BATCH] for start in range(0, len(full), BATCH)]
    batches += [[row] for row in rows[len(full) :]]
    return [mx.array(batch, dtype=mx.int32) for batch in batches]


def verify(
    path: Path, opened: OpenedModel, batches: Iterable[mx.array] | None = None
) -> dict[str, float]:
    """Return the losses of the folder or GGUF file at `path` on batches of token ids, or on a short
    text of our own, under the names that conversion.json gives them.
    """
    batches = verification_text(opened) if batches is None else batches
    exact = dense_model(opened.trimmed, exact_weights(opened))
    written = dense_model(*(read_folder(path) if path.is_dir() else read_gguf(path)))
    found = asdict(compare(exact, written, batches))
    return {NAMES.get(name, name): value for name, value in found.items()}


def check_bound(
    losses: Mapping[str, float], max_kl: float | None, target_format: str = "mlx"
) -> None:
    """Raise `ConversionError` if the mean KL divergence is above the bound."""
    found = losses["mean_kl_divergence"]
    remedy = "take more bits, --target-bpw or --calibrate"
    if target_format != "mlx":  # the others quantize little or not at all: float32 loses nothing
        remedy = "take --dtype float32, without --bits"
    if max_kl is not None and not found <= max_kl:
        raise ConversionError(
            f"the mean KL divergence is {found:.4g} nats, above --max-kl {max_kl:g}; nothing was "
            f"written: {remedy}"
        )


def read_folder(folder: Path) -> tuple[OpenELMConfig, dict[str, mx.array]]:
    """Return a folder's configuration, and the float32 weights that its tensors stand for."""
    config = OpenELMConfig.from_file(config_of(folder))
    stored: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        stored |= mx.load(str(file))  # type: ignore[arg-type]
    shapes = expected_tensors(config)
    plan = read_plan(quantization_of(read_json(config_of(folder))), shapes, stored)
    return config, {name: dequantized(name, stored, planned(plan, name)) for name in shapes}


def read_gguf(path: Path) -> tuple[OpenELMConfig, dict[str, mx.array]]:
    """Return a GGUF file's configuration, and the float32 weights that its blocks stand for."""
    file = GGUFFile(path)
    return file.config, {name: file.load_exact(name) for name in expected_tensors(file.config)}


def dense_model(config: OpenELMConfig, weights: Mapping[str, mx.array]) -> OpenELM:
    from openelm_mlx.model.decoder import OpenELM

    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    return model
