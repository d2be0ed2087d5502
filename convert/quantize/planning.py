"""Step 3 of a conversion: the form of every matrix, measured or given, and what calibration learned
for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.allocate import Losses, choose, make_reference, measure, true_loss
from openelm_mlx.convert.quantize.calibrate import calibrate
from openelm_mlx.convert.quantize.calibration_text import row_length, sampled_tokens, text_tokens
from openelm_mlx.convert.quantize.recipes import find_recipe
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, ConversionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import MODES, Plan, QuantSpec, matrices

Progress = Callable[[int, int, str], None]
MEASURE_TOKENS = 2048  # on which every matrix is measured in every width
FLOAT32 = 4


@dataclass(frozen=True)
class Planned:
    """Forms by stem; tensor name -> arrays to write instead of rounding to nearest; what was measured on the way."""

    forms: Plan
    learned: Mapping[str, Mapping[str, mx.array]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


def plan_quantization(
    opened: OpenedModel, dtype: str, options: ConvertOptions, progress: Progress | None
) -> Planned:
    """Raises `OptionError` or `ConversionError` before any work for what cannot be, in particular
    what does not divide.
    """
    if options.target_bpw is None:
        forms = given_forms(opened, options)
        if options.calibrate is None or options.dry_run:
            return Planned(forms)
    given = given_tokens(opened, options)
    exact = exact_weights(opened)
    tokens = written_tokens(opened, exact, options, progress) if given is None else given
    measured: dict[str, Any] = {
        "calibration_tokens": tokens.size,
        "calibration_text": text_name(options),
    }
    if options.target_bpw is not None:
        shapes = expected_tensors(opened.trimmed)
        reference = make_reference(
            opened.trimmed, exact, tokens[: max(1, MEASURE_TOKENS // tokens.shape[1])]
        )
        losses = measure(reference, shapes, dtype, options.target_bpw, progress)
        forms = choose(losses, shapes, dtype, options.target_bpw)
        measured |= allocation_record(losses, forms, true_loss(reference, forms, dtype))
    if options.calibrate is None or options.dry_run:
        return Planned(forms, {}, measured)
    learned = calibrate(options.calibrate, opened.trimmed, exact, forms, tokens, dtype, progress)
    return Planned(forms, learned.arrays(dtype), measured | {"method": options.calibrate})


def given_forms(opened: OpenedModel, options: ConvertOptions) -> Plan:
    """The forms that flags or a recipe ask for. Unasked, the source's are kept."""
    shapes = expected_tensors(opened.trimmed)
    forms: dict[str, QuantSpec | None] = dict.fromkeys(matrices(shapes), options.form)
    if options.recipe is not None:
        forms = find_recipe(options.recipe).plan(shapes)
    elif not options.quantizes and options.keeps_forms:
        forms |= opened.source.forms
    check_divides(forms, shapes)
    return forms


def check_divides(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ConversionError` naming the first matrix whose rows do not divide into the groups
    planned for it.
    """
    stems = matrices(shapes)
    for stem, form in plan.items():
        if form is None or stems[stem][1] % form.group_size == 0:
            continue
        quantized = [stems[other][1] for other, taken in plan.items() if taken is not None]
        sizes = MODES[form.mode][1]
        fits = [
            str(size)
            for size in sorted(sizes, reverse=True)
            if all(width % size == 0 for width in quantized)
        ]
        remedy = (
            f"use --group-size {' or '.join(fits)}"
            if fits
            else "no group size fits: leave it unquantized"
        )
        raise ConversionError(
            f"{stem}.weight has rows of {stems[stem][1]} weights, no multiple of group size {form.group_size}; {remedy}"
        )


def exact_weights(opened: OpenedModel) -> dict[str, mx.array]:
    """The source's weights in float32. Raises `CheckpointError` for numbers that are none."""
    weights = {}
    for name, shape in expected_tensors(opened.trimmed).items():
        weights[name] = opened.source.load(name)[: shape[0]].astype(mx.float32)
        if not mx.isfinite(weights[name]).all().item():
            raise CheckpointError(
                f"{name} holds NaN or infinite weights; the checkpoint is damaged"
            )
    return weights


def given_tokens(opened: OpenedModel, options: ConvertOptions) -> mx.array | None:
    """Rows of token ids of the user's text, None where there is none."""
    if options.calibration_text is None:
        return None
    rows, length = calibration_shape(opened, options)
    return text_tokens(options.calibration_text, opened.tokenizer.processor.encode, length, rows)


def written_tokens(
    opened: OpenedModel,
    exact: Mapping[str, mx.array],
    options: ConvertOptions,
    progress: Progress | None,
) -> mx.array:
    """Rows of token ids that the exact model writes."""
    from openelm_mlx.model.decoder import OpenELM

    rows, length = calibration_shape(opened, options)
    model = OpenELM(opened.trimmed)
    model.load_weights(list(exact.items()))
    return sampled_tokens(
        model, opened.tokenizer.processor.encode, rows, length, progress, options.is_instruct
    )


def calibration_shape(opened: OpenedModel, options: ConvertOptions) -> tuple[int, int]:
    """Rows to calibrate on, and tokens in a row."""
    length = row_length(opened.trimmed)
    wanted = (
        MEASURE_TOKENS
        if options.calibrate is None or options.dry_run
        else options.calibration_tokens
    )
    return max(1, wanted // length), length


def text_name(options: ConvertOptions) -> str:
    return (
        "sampled from the model"
        if options.calibration_text is None
        else options.calibration_text.name
    )


def allocation_record(losses: Losses, forms: Plan, together: float) -> dict[str, Any]:
    """What the allocation saw, rounded for reading: losses of the chosen forms one by one, their
    sum, and all at once.
    """
    chosen = {stem: losses[stem][form] for stem, form in forms.items()}
    return {
        "loss_of_each": {stem: float(f"{loss:.3g}") for stem, loss in chosen.items()},
        "sum_of_losses": sum(chosen.values()),
        "loss_together": together,
    }


def memory_needed(config: OpenELMConfig, options: ConvertOptions) -> int:
    """Bytes a conversion holds at its peak, beside the interpreter: whole model or largest tensor,
    in float32.
    """
    sizes = [math.prod(shape) for shape in expected_tensors(config).values()]
    logits = 8 * row_length(config) * config.vocab_size * FLOAT32
    if options.calibrate == "distill":  # weights, their codes, gradients and two moments
        return FLOAT32 * 7 * sum(sizes) + 6 * logits
    if options.target_bpw is not None or options.calibrate is not None:
        return FLOAT32 * 3 * sum(sizes) + 6 * logits
    return FLOAT32 * (2 * sum(sizes) if options.verifies else 0) + FLOAT32 * 2 * max(sizes)
