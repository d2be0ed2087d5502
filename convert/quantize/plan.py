"""The plan of a conversion: it gives every matrix its spec, perhaps with learned weights.

A plan comes from options, from a recipe, or from measuring. A recipe gives specs by role: built-in
ones have a name, a user's own is a YAML file:

    default:          {bits: 4, group_size: 64}   # every matrix that no other line names
    token_embeddings: {bits: 6}                   # a role; group_size and mode as without a recipe
    ffn.proj_2:       {mode: nvfp4}
    attn.out_proj:    unquantized
    first:            {layers: 2, bits: 6}        # the first two layers, whatever the role
    layers.7.ffn.proj_1: {bits: 8}                # one matrix

The most particular line wins: one matrix, then first and last layers, then the role, then the
default.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import Weights, exact_weights
from openelm_mlx.convert.quantize.allocate import choose
from openelm_mlx.convert.quantize.calibrate import (
    MEASURE_TOKENS,
    calibrate,
    given_tokens,
    row_length,
    written_tokens,
)
from openelm_mlx.convert.quantize.losses import make_reference, measure, true_loss
from openelm_mlx.convert.sources import number_of
from openelm_mlx.errors import ConfigError, ConversionError, OptionError
from openelm_mlx.fields import nearest
from openelm_mlx.files import read_yaml
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import MODES, Plan, QuantSpec, make_spec, matrices

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.convert.options import ConvertOptions, Progress
    from openelm_mlx.device import mx

Shapes = Mapping[str, tuple[int, ...]]
ROLES = (
    "token_embeddings",
    "attn.qkv_proj",
    "attn.out_proj",
    "ffn.proj_1",
    "ffn.proj_2",
    "lm_head",
)
ENDS = ("first", "last")
SETTINGS = ("bits", "group_size", "mode")
UNQUANTIZED = ("unquantized", "whole")  # the second is the word of older recipes
FLOAT32 = 4


@dataclass(frozen=True)
class Quantization:
    """The plan of a conversion, with what calibration learned and what was measured on the way."""

    plan: Plan
    learned: Mapping[str, Mapping[str, mx.array]] = field(default_factory=dict)
    """Tensor name -> arrays to write instead of rounding to nearest."""
    measured: Mapping[str, Any] = field(default_factory=dict)


def plan_quantization(
    opened: OpenedModel, dtype: str, options: ConvertOptions, progress: Progress | None
) -> Quantization:
    """Choose the plan that the options ask for, and calibrate it.

    Raises `OptionError` or `ConversionError` before any work for what cannot be done.
    """
    if options.target_bpw is None:
        plan = given_plan(opened, options)
        if options.calibrate is None or options.dry_run:
            return Quantization(plan)
    given = given_tokens(opened, options)
    exact = dict(exact_weights(opened))
    tokens = written_tokens(opened, exact, options, progress) if given is None else given
    text = options.calibration_text
    measured: dict[str, Any] = {
        "calibration_tokens": tokens.size,
        "calibration_text": "sampled from the model" if text is None else text.name,
    }
    if options.target_bpw is not None:
        plan, found = measured_plan(opened.trimmed, exact, tokens, dtype, options, progress)
        measured |= found
    if options.calibrate is None or options.dry_run:
        return Quantization(plan, {}, measured)
    learned = calibrate(options.calibrate, opened.trimmed, exact, plan, tokens, dtype, progress)
    return Quantization(plan, learned.arrays(dtype), measured | {"method": options.calibrate})


def given_plan(opened: OpenedModel, options: ConvertOptions) -> Plan:
    """Return the plan of the options or a recipe, by default the source's own."""
    shapes = opened.shapes
    plan: Plan = dict.fromkeys(matrices(shapes), options.spec)
    if options.recipe is not None:
        plan = find_recipe(options.recipe).plan(shapes)
    elif not options.quantizes and options.keeps_plan:
        plan = {**plan, **opened.source.plan}
    check_divides(plan, shapes)
    return plan


def check_divides(plan: Plan, shapes: Shapes) -> None:
    """Raise `ConversionError` for the first matrix whose rows its groups do not divide."""
    columns = {stem: shape[1] for stem, shape in matrices(shapes).items()}
    for stem, spec in plan.items():
        if spec is None or columns[stem] % spec.group_size == 0:
            continue
        quantized = [columns[other] for other, taken in plan.items() if taken is not None]
        sizes = sorted(MODES[spec.mode][1], reverse=True)
        fits = [str(size) for size in sizes if all(count % size == 0 for count in quantized)]
        remedy = f"use --group-size {' or '.join(fits)}"
        if not fits:
            remedy = "no group size fits: leave it unquantized"
        raise ConversionError(
            f"{stem}.weight has rows of {columns[stem]} weights, which is not a multiple of group "
            f"size {spec.group_size}; {remedy}"
        )


def measured_plan(
    config: OpenELMConfig,
    exact: Weights,
    tokens: mx.array,
    dtype: str,
    options: ConvertOptions,
    progress: Progress | None,
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of least loss at `target_bpw`, and its losses: of each matrix alone, their
    sum, and of all at once.
    """
    shapes, target = expected_tensors(config), options.target_bpw or 0.0
    rows = max(1, MEASURE_TOKENS // tokens.shape[1])
    reference = make_reference(config, exact, tokens[:rows], progress)
    losses = measure(reference, shapes, dtype, target, progress)
    plan = choose(losses, shapes, dtype, target)
    chosen = {stem: losses[stem][spec] for stem, spec in plan.items()}
    return plan, {
        "loss_of_each": {stem: float(f"{loss:.3g}") for stem, loss in chosen.items()},
        "sum_of_losses": sum(chosen.values()),
        "loss_together": true_loss(reference, plan, dtype),
    }


def memory_needed(config: OpenELMConfig, options: ConvertOptions) -> int:
    """Return the peak memory of a conversion in bytes, without the interpreter's."""
    sizes = [math.prod(shape) for shape in expected_tensors(config).values()]
    logits = 8 * row_length(config) * config.vocab_size * FLOAT32
    if options.calibrate == "distill":  # weights, their codes, gradients and two moments
        return FLOAT32 * 7 * sum(sizes) + 6 * logits
    if options.target_bpw is not None or options.calibrate is not None:
        return FLOAT32 * 3 * sum(sizes) + 6 * logits
    return FLOAT32 * (2 * sum(sizes) if options.verifies else 0) + FLOAT32 * 2 * max(sizes)


@dataclass(frozen=True)
class Recipe:
    """Specs by role, for the layers at both ends, and for single matrices."""

    default: QuantSpec | None = None
    roles: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    ends: Mapping[str, tuple[int, QuantSpec | None]] = field(default_factory=dict)
    """first, last -> how many layers, and their spec"""
    single: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    """Such as layers.3.ffn.proj_2 -> its spec."""

    def plan(self, shapes: Shapes) -> dict[str, QuantSpec | None]:
        """Return the plan for a model. Raises `OptionError` for a matrix that it does not have."""
        short = {stem.removeprefix("transformer."): stem for stem in matrices(shapes)}
        if unknown := [name for name in self.single if name not in short]:
            near = hint(unknown[0], short)
            raise OptionError(
                f"the recipe names {unknown[0]}, which this model does not have{near}"
            )
        layers = 1 + max((number_of(name) for name in short), default=-1)
        return {stem: self.spec(name, layers) for name, stem in short.items()}

    def spec(self, name: str, layers: int) -> QuantSpec | None:
        """Return the spec of one matrix, by the most specific entry."""
        if name in self.single:
            return self.single[name]
        number = number_of(name)
        for end, (count, spec) in self.ends.items():
            if number >= 0 and (number < count if end == "first" else number >= layers - count):
                return spec
        return self.roles.get(role(name), self.default)


def built_in(bits: int, embeddings: int, first: QuantSpec, others: int | None = None) -> Recipe:
    """Return a recipe in groups of 128; `others` are for attention's inputs and FFN's outputs."""
    roles = {"token_embeddings": QuantSpec(embeddings, 128)}
    if others is not None:
        roles |= dict.fromkeys(("attn.qkv_proj", "ffn.proj_2"), QuantSpec(others, 128))
    return Recipe(QuantSpec(bits, 128), roles, {"first": (1, first)})


BUILT_IN = {  # as measuring OpenELM Tiny chose by role: more for embeddings and the first layer
    "mixed-2-4": built_in(2, 4, QuantSpec(3, 64), others=3),
    "mixed-3-4": built_in(3, 4, QuantSpec(4, 128)),
    "mixed-3-5": built_in(3, 5, QuantSpec(5, 128), others=4),
    "mixed-4-5": built_in(4, 5, QuantSpec(5, 128)),
    "mixed-5-6": built_in(5, 6, QuantSpec(6, 128)),
}


def role(name: str) -> str:
    """Return the role of a matrix: ffn.proj_2 for layers.3.ffn.proj_2."""
    return re.sub(r"^(transformer\.)?(layers\.\d+\.)?", "", name)


def hint(word: Any, known: Iterable[str]) -> str:
    near = nearest(str(word), known)
    return f"; did you mean {near}?" if near else ""


def find_recipe(name: str) -> Recipe:
    """Return a built-in recipe, or that of a YAML file. Raises `OptionError` or `ConfigError`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in (".yaml", ".yml") or os.path.isfile(path):
        return read_recipe(path)
    raise OptionError(
        f"recipe is {name!r}; known: {', '.join(BUILT_IN)}, or the path of a .yaml file"
        + hint(name, BUILT_IN)
    )


def read_recipe(path: Path) -> Recipe:
    """Read a user's YAML. Raises `ConfigError` naming the file and the line's key."""
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(
            f"{path} is not a recipe: it must map default, {', '.join(ROLES)}, first or last to "
            "bits or settings"
        )
    kinds: dict[str, dict[str, Any]] = {"roles": {}, "ends": {}, "single": {}}
    default: QuantSpec | None = None
    for key, value in raw.items():
        where = f"{path}: {key}"
        if key == "default":
            default = read_spec(where, value)
        elif key in ROLES:
            kinds["roles"][key] = read_spec(where, value)
        elif key in ENDS:
            kinds["ends"][key] = read_end(where, value)
        elif isinstance(key, str) and number_of(key) >= 0 and role(key) in ROLES:
            kinds["single"][key.removeprefix("transformer.")] = read_spec(where, value)
        else:
            known = ("default", *ROLES, *ENDS)
            raise ConfigError(
                f"{path} has the key {key!r}; known: {', '.join(known)}, layers.N.ROLE"
                + hint(key, known)
            )
    return Recipe(default, **kinds)


def read_end(where: str, value: Any) -> tuple[int, QuantSpec | None]:
    if not isinstance(value, dict):
        return 1, read_spec(where, value)
    count = value.get("layers", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{where} has layers {count!r}; it must be a whole number from 1 up")
    return count, read_spec(where, {key: entry for key, entry in value.items() if key != "layers"})


def read_spec(where: str, value: Any) -> QuantSpec | None:
    allowed = f"it must be {UNQUANTIZED[0]}, a number of bits, or settings {', '.join(SETTINGS)}"
    if value in UNQUANTIZED:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; {allowed}")
    if unknown := [key for key in value if key not in SETTINGS]:
        known = ", ".join(SETTINGS) + hint(unknown[0], SETTINGS)
        raise ConfigError(f"{where} has the setting {unknown[0]!r}; known: {known}")
    try:
        spec = make_spec(value.get("bits"), value.get("group_size"), value.get("mode"))
    except (OptionError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if spec is None:
        raise ConfigError(f"{where} is empty; {allowed}")
    return spec
