"""Recipes: specs by role, for the layers at both ends, and for single matrices.

Built-in recipes have a name, a user's own is a YAML file:

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

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import number_of
from openelm_mlx.errors import ConfigError, OptionError
from openelm_mlx.fields import nearest
from openelm_mlx.files import read_yaml
from openelm_mlx.quantization import QuantSpec, make_spec, matrices

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


@dataclass(frozen=True)
class Recipe:
    """Specs by role, for the layers at both ends, and for single matrices."""

    default: QuantSpec | None = None
    roles: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    ends: Mapping[str, tuple[int, QuantSpec | None]] = field(default_factory=dict)
    """first, last -> how many layers, and their spec"""
    single: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    """Such as layers.3.ffn.proj_2 -> its spec."""

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, QuantSpec | None]:
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


def built_in(bits: int) -> Recipe:
    """Return `bits` in groups of 128, and one bit more for the first layer."""
    return Recipe(QuantSpec(bits, 128), ends={"first": (1, QuantSpec(bits + 1, 128))})


# of all mixtures by role and first layer, the kind that lost less than uniform plans of the same
# bytes (interpolated) on both models it was measured on; what differs by role differs by model
BUILT_IN = {f"mixed-{bits}-{bits + 1}": built_in(bits) for bits in (3, 4, 5)}


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
