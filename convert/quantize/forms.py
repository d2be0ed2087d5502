"""How one tensor is stored: `Form` (bits, group size, mode), and the plan that gives every matrix
its form.

Sizes follow MLX's packing (mlx.core.quantize): affine groups carry a scale and a bias in the
weights' own type, the block formats one 8-bit scale (OCP Microscaling Formats v1.0; NVFP4: 16
weights with an E4M3 scale).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openelm_mlx.errors import ConversionError, OptionError

MODES: dict[
    str, tuple[tuple[int, ...], tuple[int, ...]]
] = {  # mode -> its bits and its group sizes
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
BITS, GROUP_SIZES = MODES["affine"]
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, order=True)
class Form:
    """Bits of a weight, weights that share a scale, and MLX's quantization mode. Raises
    `OptionError`.
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"mode is {self.mode!r}; allowed: {', '.join(MODES)}")
        for name, allowed in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
                raise OptionError(
                    f"{name} is {value!r}; mode {self.mode} has {' or '.join(map(str, allowed))}"
                )

    def __str__(self) -> str:
        return (
            f"{self.bits} bits, groups of {self.group_size}" if self.mode == "affine" else self.mode
        )

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a matrix with its scales (and biases), its scales in `dtype` where the mode
        leaves it open.
        """
        side = 2 * ITEMSIZE[dtype] if self.mode == "affine" else 1
        return math.prod(shape) * self.bits // 8 + math.prod(shape) // self.group_size * side

    def as_config(self) -> dict[str, Any]:
        """mlx-lm's form of one entry of `quantization` in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


Plan = Mapping[
    str, Form | None
]  # tensor stem, e.g. transformer.layers.3.ffn.proj_2 -> its form; None stays whole


def make_form(bits: int | None, group_size: int | None, mode: str | None) -> Form | None:
    """The form three flags describe, None if none asks for quantization. Raises `OptionError`.

    make_form(4, None, None)        4 bits in groups of 64
    make_form(None, None, "nvfp4")  nvfp4, whose bits and groups are its own
    """
    if bits is None and mode is None:
        if group_size is not None:
            raise OptionError(
                f"group_size is {group_size}, but nothing is quantized; give --bits or --mode too"
            )
        return None
    if mode is not None and mode not in MODES:
        raise OptionError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    all_bits, groups = MODES[mode or "affine"]
    if len(all_bits) == 1:
        return Form(bits or all_bits[0], group_size or groups[0], mode or "affine")
    if bits is None:
        raise OptionError(f"mode {mode} needs --bits: {', '.join(map(str, all_bits))}")
    return Form(bits, 64 if group_size is None else group_size, mode or "affine")


def all_forms() -> tuple[Form, ...]:
    """Every form this project writes, the smallest first."""
    forms = [
        Form(b, g, mode) for mode, (bits, groups) in MODES.items() for b in bits for g in groups
    ]
    return tuple(sorted(forms, key=lambda form: form.nbytes((128, 128), "float16")))


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Stem -> shape of every tensor that can be quantized, in order."""
    return {
        name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2
    }


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


def config_entry(plan: Plan) -> dict[str, Any] | None:
    """`quantization` of config.json in mlx-lm's form: the commonest form, and every layer's own if
    they differ.

    Layers that stay whole have no entry: mlx-lm and this engine see that the file holds no scales
    for them.
    """
    forms = [form for form in plan.values() if form is not None]
    if not forms:
        return None
    entry = Counter(forms).most_common(1)[0][0].as_config()
    if len(set(forms)) == 1:
        return entry
    return entry | {stem: form.as_config() for stem, form in plan.items() if form is not None}


def read_plan(
    quantization: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], stored: set[str]
) -> Plan:
    """The plan behind a config.json's `quantization` and the names of the tensors stored; inverse
    of `config_entry`.
    """
    if not quantization:
        return dict.fromkeys(matrices(shapes))
    plan: dict[str, Form | None] = {}
    for stem in matrices(shapes):
        own = quantization.get(stem, quantization)
        whole = own is False or f"{stem}.scales" not in stored
        plan[stem] = (
            None if whole else Form(own["bits"], own["group_size"], own.get("mode", "affine"))
        )
    return plan
