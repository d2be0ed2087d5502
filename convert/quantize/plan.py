"""The plan of a conversion: it gives every matrix its spec, perhaps with learned weights.

A plan comes from options, from a recipe, or from measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import Weights, exact_weights
from openelm_mlx.convert.quantize.allocate import choose, measured_plan
from openelm_mlx.convert.quantize.calibrate import (
    GPTQ_ROWS,
    calibrate,
    calibrate_gptq,
    calibration_shape,
    given_tokens,
    measured_rows,
    written_tokens,
)
from openelm_mlx.convert.quantize.distill import distill
from openelm_mlx.convert.quantize.losses import make_reference
from openelm_mlx.convert.quantize.recipes import find_recipe
from openelm_mlx.convert.quantize.rounding import Learned
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import MODES, Plan, all_specs, matrices

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.convert.options import ConvertOptions, Progress
    from openelm_mlx.device import mx

Shapes = Mapping[str, tuple[int, ...]]
HELD_ROWS = 8  # of calibration text at most, on which methods are compared


@dataclass(frozen=True)
class Quantization:
    """The plan of a conversion, with what calibration learned and what was measured on the way."""

    plan: Plan
    learned: dict[str, dict[str, mx.array]] = field(default_factory=dict)
    """Tensor name -> arrays to write instead of rounding to nearest. Writing takes them out."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    fits: bool = False
    """True if the grids of affine matrices that are not in `learned` are fitted to the weights."""


def plan_quantization(
    opened: OpenedModel, dtype: str, options: ConvertOptions, progress: Progress | None
) -> Quantization:
    """Choose the plan that the options ask for, and calibrate it.

    A dry run reads no weights and returns what is known without them: an empty plan if it has to be
    measured. Raises `OptionError` or `ConversionError` before any work for what cannot be done.
    """
    plan: Plan = {}
    if options.target_bpw is None:
        plan = given_plan(opened, options)
        check_learnable(plan, options)
    else:
        check_size(opened.shapes, dtype, options.target_bpw)
    if not options.uses_text:
        return Quantization(plan)
    given = given_tokens(opened, options)
    count, length = calibration_shape(opened.trimmed, options) if given is None else given.shape
    if options.calibrate == "best" and count < 2:
        raise ConversionError(
            f"the calibration text has {length} tokens; --calibrate best compares on a part "
            f"that is not learned from, so give at least {2 * length}"
        )
    if options.dry_run:
        return Quantization(plan)
    exact = exact_weights(opened)
    tokens = written_tokens(opened, options, progress) if given is None else given
    text = options.calibration_text
    measured: dict[str, Any] = {
        "calibration_tokens": tokens.size,
        "calibration_text": "sampled from the model" if text is None else text.name,
    }
    if options.target_bpw is not None:
        rows = tokens[: measured_rows(tokens.shape[1])]
        given_to = opened.trimmed, exact, rows, dtype, options.target_bpw
        plan, found = measured_plan(*given_to, progress)
        measured |= found
    if options.calibrate is None:
        return Quantization(plan, {}, measured, fits=True)
    inputs = opened.trimmed, exact, plan, tokens, dtype, progress
    if options.calibrate == "best":
        learned, found = calibrate_best(*inputs)
        return Quantization(plan, learned.stored, measured | found)
    learned = calibrate(options.calibrate, *inputs)
    return Quantization(plan, learned.stored, measured | {"method": options.calibrate})


def check_learnable(plan: Plan, options: ConvertOptions) -> None:
    """Raise `OptionError` if calibration is asked for, and no matrix is in affine mode."""
    affine = any(spec is not None and spec.mode == "affine" for spec in plan.values())
    if options.calibrate is not None and not affine:
        chosen = f"--mode {options.mode}" if options.recipe is None else "--recipe"
        raise OptionError(
            f"--calibrate {options.calibrate} learns the rounding of affine matrices, and {chosen} "
            "has none; leave out one of them"
        )


def calibrate_best(
    config: OpenELMConfig,
    exact: Weights,
    plan: Plan,
    tokens: mx.array,
    dtype: str,
    progress: Progress | None = None,
) -> tuple[Learned, dict[str, Any]]:
    """Learn the rounding by both methods on all rows of tokens [rows, length] but the last eighth,
    eight at most. Return what loses less on these, and the record of it.
    """
    kept = min(HELD_ROWS, -(-len(tokens) // 8))
    rest, held = tokens[:-kept], tokens[-kept:]
    start = calibrate_gptq(config, exact, plan, rest[:GPTQ_ROWS], dtype, progress, keep_codes=True)
    found = {"gptq": start, "distill": distill(config, exact, start, rest, progress=progress)}
    reference = make_reference(config, exact, held)
    losses = {name: reference.loss(learned.weights(exact)) for name, learned in found.items()}
    method = min(losses, key=losses.__getitem__)
    return found[method], {"method": method, "losses": losses, "compared_tokens": held.size}


def given_plan(opened: OpenedModel, options: ConvertOptions) -> Plan:
    """Return the plan of the options or a recipe, by default the source's own."""
    shapes = opened.shapes
    plan: Plan = dict.fromkeys(matrices(shapes), options.spec)
    if options.recipe is not None:
        plan = find_recipe(options.recipe).plan(shapes)
    elif not options.quantizes and options.keeps_plan:
        plan = {**plan, **opened.source.plan}
    check_divides(
        plan, shapes, "--group-size" if options.recipe is None else "a recipe with groups of"
    )
    return plan


def check_size(shapes: Shapes, dtype: str, target_bpw: float) -> None:
    """Raise `OptionError` if even the smallest plan takes more bits per weight."""
    equal = {
        stem: {spec: 0.0 for spec in all_specs() if shape[1] % spec.group_size == 0} | {None: 0.0}
        for stem, shape in matrices(shapes).items()
    }
    choose(equal, shapes, dtype, target_bpw)


def check_divides(plan: Plan, shapes: Shapes, flag: str = "--group-size") -> None:
    """Raise `ConversionError` for the first matrix whose rows its groups do not divide."""
    columns = {stem: shape[1] for stem, shape in matrices(shapes).items()}
    for stem, spec in plan.items():
        if spec is None or columns[stem] % spec.group_size == 0:
            continue
        quantized = [columns[other] for other, taken in plan.items() if taken is not None]
        sizes = sorted(MODES[spec.mode][1], reverse=True)
        fits = [str(size) for size in sizes if all(count % size == 0 for count in quantized)]
        remedy = f"use {flag} {' or '.join(fits)}"
        if not fits:
            remedy = "no group size fits: leave it unquantized, by a recipe"
        raise ConversionError(
            f"{stem}.weight has rows of {columns[stem]} weights, which is not a multiple of group "
            f"size {spec.group_size}; {remedy}"
        )
