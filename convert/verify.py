"""Proof of a conversion: what was written is read back and compared with the source in float32.

Both models go through their layers one after another, so that memory has the states of the text,
and of the weights one layer, or the heads of both models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import LazyWeights, Weights, exact_weights, last_states
from openelm_mlx.convert.quantize.losses import head_weights, logits_from
from openelm_mlx.convert.sources.folder import dequantized, load_place
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.targets import config_of
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.compare import Comparison, compare_logits, with_interval
from openelm_mlx.evaluate.perplexity import ROW, TEXT, text_batches
from openelm_mlx.evaluate.score import POSITIONS
from openelm_mlx.files import read_json, read_places, read_text
from openelm_mlx.model.checkpoint import PARTS, not_finite, unpacked
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import planned, quantization_of, stem_of

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.convert.options import Progress

MODELS = "the source", "what was written"
NAMES = {"reference_perplexity": "perplexity_of_source"}  # what conversion.json calls a figure


def verification_text(opened: OpenedModel, text: Path | None = None) -> list[mx.array]:
    """Return batches of token ids [rows, length] from a file, or from the text of this package.

    Raises `OptionError` for a file that is not text, `ConversionError` for an empty one.
    """
    content = read_text(TEXT if text is None else text, "--verify-text")
    ids = opened.tokenizer.processor.encode(content)
    batches = text_batches(ids, min(ROW, opened.trimmed.max_context_length))
    if not batches:
        raise ConversionError(f"{text} has no text to verify on")
    return batches


def verify(
    path: Path,
    opened: OpenedModel,
    batches: Iterable[mx.array] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the losses of the folder or GGUF file at `path` on batches of token ids, or on the
    text of this package, under the names that conversion.json gives them.

    Raises `ConversionError` if a model's numbers overflow, so that there is nothing to compare.
    """
    known = verification_text(opened) if batches is None else list(batches)
    written = read_folder(path) if path.is_dir() else read_gguf(path)
    models = (opened.trimmed, exact_weights(opened)), written
    steps = itertools.count(1)
    total = sum(config.num_transformer_layers for config, _ in models) + len(known)

    def tell(what: str) -> None:
        if progress is not None:
            progress(next(steps), total, f"verifying {what}")

    def tell_layer(number: int) -> None:
        tell(f"layer {number}")

    states = [last_states(*model, known, progress=tell_layer) for model in models]
    for model, own in zip(MODELS, states, strict=True):
        squares = [mx.square(x).sum(axis=-1) for x in own]  # as the last norm computes them
        check_numbers(model, not any(not_finite(x).item() for x in squares))
    exact, other = (pieces(*model, own) for model, own in zip(models, states, strict=True))

    def parts() -> Iterator[tuple[mx.array, Iterable[mx.array], Iterable[mx.array]]]:
        for part in zip(known, exact, other, strict=True):
            yield part
            tell("logits")

    return as_recorded(compare_logits(parts()))


def as_recorded(comparison: Comparison) -> dict[str, Any]:
    """Return the figures as conversion.json has them."""
    found = asdict(comparison)
    for model, name in zip(MODELS, ("reference_perplexity", "perplexity"), strict=True):
        check_numbers(model, math.isfinite(found[name]))
    intervals = found.pop("intervals_95").items()
    return {NAMES.get(name, name): value for name, value in found.items()} | {
        "intervals_95": {NAMES.get(name, name): list(ends) for name, ends in intervals}
    }


def check_numbers(model: str, are_finite: bool) -> None:
    if not are_finite:
        raise ConversionError(
            f"{model} computes numbers that overflow: these are no trained weights, and nothing "
            "can be verified; nothing was written: leave out --verify to convert them all the same"
        )


def pieces(
    config: OpenELMConfig, weights: Weights, states: Iterable[mx.array]
) -> Iterator[Iterator[mx.array]]:
    """Yield for each batch of last states its logits [positions, vocab], some at a time."""
    own = head_weights(config, weights)
    for x in states:
        yield (
            logits_from(config, own, x, start)
            for start in range(0, x.shape[0] * x.shape[1], POSITIONS)
        )


def check_bound(
    losses: Mapping[str, Any],
    max_kl: float | None,
    target_format: str = "mlx",
    quantized: bool = True,
) -> None:
    """Raise `ConversionError` if the mean KL divergence is above the bound."""
    found = losses["mean_kl_divergence"]
    remedy = "take more bits, --target-bpw or --calibrate"
    if not quantized:  # float32 loses nothing
        remedy = "take --dtype float32"
    elif target_format == "gguf":
        remedy = "take more bits (--gguf-type), or --dtype float32 without --bits and --gguf-type"
    if max_kl is not None and not found <= max_kl:
        raise ConversionError(
            f"the mean KL divergence over {losses['tokens']:,} tokens is "
            f"{with_interval(losses, 'mean_kl_divergence')} nats, above --max-kl {max_kl:g}; "
            f"nothing was written: {remedy}"
        )


def read_folder(folder: Path) -> tuple[OpenELMConfig, LazyWeights]:
    """Return a folder's configuration, and the float32 weights that its tensors stand for."""
    raw, places = read_json(config_of(folder)), read_places(folder)
    config = OpenELMConfig.from_hf_dict(raw)
    stored = {name: place.info for name, place in places.items()}
    specs = unpacked(stored, quantization_of(raw)).specs

    def read(name: str) -> mx.array:
        parts = (f"{stem_of(name)}.{part}" for part in PARTS)
        arrays = {part: load_place(places[part]) for part in parts if part in places}
        return dequantized(name, arrays, planned(specs, name))

    return config, LazyWeights(expected_tensors(config), read)


def read_gguf(path: Path) -> tuple[OpenELMConfig, LazyWeights]:
    """Return a GGUF file's configuration, and the float32 weights that its blocks stand for."""
    file = GGUFFile(path)
    return file.config, LazyWeights(expected_tensors(file.config), file.load_exact)
