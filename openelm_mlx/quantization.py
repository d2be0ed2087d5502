"""How tensors are quantized: the spec of one tensor, and the entries of a config.json for all.

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

from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import ConfigError, OptionError

MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # mode -> its bits and group sizes
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
BITS, GROUP_SIZES = MODES["affine"][0][1:], MODES["affine"][1]  # 1 bit is read, but not written
ALL_GROUP_SIZES = tuple(sorted({size for _, sizes in MODES.values() for size in sizes}))
MLX_BITS, MLX_GROUP_SIZE = 4, 64  # MLX's defaults in affine mode
KEYS = ("quantization", "quantization_config")  # of config.json; mlx-lm writes both


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How one tensor is quantized: bits of a weight, weights that share a scale, and MLX's mode.

    Raises `OptionError` for what MLX does not have.
    """

    bits: int
    group_size: int = MLX_GROUP_SIZE
    mode: str = "affine"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        for name, allowed in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                listed = " or ".join(map(str, allowed))
                raise OptionError(f"{name} is {value!r}; mode {self.mode} has {listed}")

    def __str__(self) -> str:
        if self.mode != "affine":
            return self.mode
        return f"{self.bits} bits, groups of {self.group_size}"

    @property
    def writable(self) -> bool:
        """True if this project writes tensors in this spec; it reads some that it does not."""
        return self.mode != "affine" or self.bits in BITS

    def weight_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a matrix without its scales."""
        return math.prod(shape) * self.bits // 8

    def scale_bytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Return the bytes of a matrix's scales and biases; those of affine mode are in `dtype`."""
        per_group = 2 * itemsize(dtype) if self.mode == "affine" else 1
        return math.prod(shape) // self.group_size * per_group

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Return the bytes of a matrix with its scales (and biases)."""
        return self.weight_bytes(shape) + self.scale_bytes(shape, dtype)

    def as_config(self) -> dict[str, Any]:
        """Return one entry of config.json's `quantization`; mx.quantize takes it as arguments."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


# tensor stem, e.g. transformer.layers.3.ffn.proj_2 -> its spec; None: it is not quantized
Plan = Mapping[str, QuantSpec | None]


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise OptionError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")


def make_spec(bits: int | None, group_size: int | None, mode: str | None) -> QuantSpec | None:
    """Return the spec that three options describe, None if nothing is to be quantized.

    make_spec(4, None, None)        4 bits in groups of 64
    make_spec(None, None, "nvfp4")  nvfp4, whose bits and groups are its own

    Raises `OptionError`.
    """
    if bits is None and mode is None:
        if group_size is None:
            return None
        given = f"group_size is {group_size}, but nothing is quantized"
        raise OptionError(f"{given}; give --bits or --mode too")
    mode = mode or "affine"
    check_mode(mode)
    if mode != "affine":
        (own_bits,), (own_size,) = MODES[mode]
        return QuantSpec(bits or own_bits, group_size or own_size, mode)
    if bits is None:
        raise OptionError(f"mode {mode} needs --bits: {', '.join(map(str, BITS))}")
    spec = QuantSpec(bits, MLX_GROUP_SIZE if group_size is None else group_size)
    if not spec.writable:
        raise OptionError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
    return spec


def all_specs() -> tuple[QuantSpec, ...]:
    """Return every spec that this project writes, the smallest first."""
    specs = [
        QuantSpec(bits, size, mode)
        for mode, (all_bits, sizes) in MODES.items()
        for bits in all_bits
        for size in sizes
    ]
    writable = (spec for spec in specs if spec.writable)
    return tuple(sorted(writable, key=lambda spec: spec.nbytes((128, 128), "float16")))


def stem_of(name: str) -> str:
    """Return the stem of a tensor, by which plans and config.json call it."""
    return name.removesuffix(".weight")


def planned(plan: Plan, name: str) -> QuantSpec | None:
    """Return the spec of the tensor `name`, None if it is not quantized."""
    return plan.get(stem_of(name))


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that can be quantized, by stem and in order."""
    return {stem_of(name): shape for name, shape in shapes.items() if len(shape) == 2}


def quantization_of(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of a config.json about quantization, None if there is none.

    Raises `ConfigError`.
    """
    stated = next((raw[key] for key in KEYS if raw.get(key)), None)
    if stated is not None and not isinstance(stated, Mapping):
        raise ConfigError(f"config.json has quantization {stated!r:.60}; it must be an object")
    if stated and (method := stated.get("quant_method")) is not None:
        what = f"config.json says that the weights are quantized by {method!r:.40}"
        raise ConfigError(f"{what}; only MLX's quantization is read: save them unquantized")
    return stated


def spec_of(quantization: Mapping[str, Any], stem: str) -> QuantSpec | None:
    """Return the spec that a config.json's `quantization` gives to the tensor `stem`.

    A tensor has its own entry, or false if it is not quantized, or else the common settings. As
    in mlx-lm an entry of its own takes nothing from the common settings: it is completed by MLX's
    defaults. Raises `ConfigError`.
    """
    own = quantization.get(stem, True)
    if own is False:
        return None
    entry = quantization if own is True else own
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json has quantization {own!r:.60} for {stem}; give an object")
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        allowed = ", ".join(MODES)
        raise ConfigError(f"config.json quantizes {stem} in mode {mode!r}; MLX has {allowed}")
    default = {"bits": MLX_BITS, "group_size": MLX_GROUP_SIZE}
    if mode != "affine":
        default = {name: own[0] for name, own in zip(default, MODES[mode], strict=True)}
    elif own is True and (missing := default.keys() - entry.keys()):
        lacking = " and ".join(sorted(missing))
        raise ConfigError(f"config.json has a quantization without {lacking}")
    bits, group_size = (entry.get(key, value) for key, value in default.items())
    try:
        return QuantSpec(bits, group_size, mode)
    except OptionError:
        what = f"{bits!r} bits in groups of {group_size!r}"
        problem = f"config.json quantizes {stem} to {what}"
        raise ConfigError(f"{problem}, which MLX does not have in mode {mode}") from None


def config_entry(plan: Plan) -> dict[str, Any] | None:
    """Return a config.json's `quantization` as mlx-lm has it: the commonest spec, and every
    tensor's own if they differ.

    Tensors that are not quantized do not have an entry: the file has no scales for them.
    """
    specs = [spec for spec in plan.values() if spec is not None]
    if not specs:
        return None
    entry = Counter(specs).most_common(1)[0][0].as_config()
    if len(set(specs)) == 1:
        return entry
    return entry | {stem: spec.as_config() for stem, spec in plan.items() if spec is not None}
