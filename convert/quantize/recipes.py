"""Recipes: forms by role. Built-in ones by name, a user's own as a YAML file.

    default:          {bits: 4, group_size: 64}   # every matrix no other line speaks of
    token_embeddings: {bits: 6}                   # a role; group_size and mode as without a recipe
    ffn.proj_2:       {mode: nvfp4}
    attn.out_proj:    whole                       # stays in the weights' own type
    first:            {layers: 2, bits: 6}        # the first two layers, whatever the role
    layers.7.ffn.proj_1: {bits: 8}                # one matrix

The most particular line wins: one matrix, then first and last layers, then the role, then the
default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources.yaml_files import read_yaml
from openelm_mlx.errors import ConfigError, OptionError
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
WHOLE = "whole"


@dataclass(frozen=True)
class Recipe:
    """Forms by role, for the layers at both ends, and for single matrices; None leaves a matrix
    whole.
    """

    default: QuantSpec | None = None
    roles: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    ends: Mapping[str, tuple[int, QuantSpec | None]] = field(
        default_factory=dict
    )  # first, last -> layers, form
    single: Mapping[str, QuantSpec | None] = field(
        default_factory=dict
    )  # layers.3.ffn.proj_2 -> form

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, QuantSpec | None]:
        """The form of every matrix of a model. Raises `OptionError` for a matrix the model does not
        have.
        """
        stems = matrices(shapes)
        short = {stem.removeprefix("transformer."): stem for stem in stems}
        if unknown := [name for name in self.single if name not in short]:
            raise OptionError(
                f"the recipe speaks of {unknown[0]}, which this model does not have{hint(unknown[0], short)}"
            )
        layers = 1 + max((number_of(name) for name in short), default=-1)
        return {stem: self.form(name, layers) for name, stem in short.items()}

    def form(self, name: str, layers: int) -> QuantSpec | None:
        """The form of one matrix, by the most particular entry."""
        if name in self.single:
            return self.single[name]
        number = number_of(name)
        for end, (count, form) in self.ends.items():
            if number >= 0 and (number < count if end == "first" else number >= layers - count):
                return form
        return self.roles.get(role(name), self.default)


BUILT_IN: dict[
    str, Recipe
] = {  # what measuring OpenELM Tiny chose by role: more for embeddings and first layer
    "mixed-2-4": Recipe(
        QuantSpec(2, 128),
        {
            "token_embeddings": QuantSpec(4, 128),
            "attn.qkv_proj": QuantSpec(3, 128),
            "ffn.proj_2": QuantSpec(3, 128),
        },
        {"first": (1, QuantSpec(3, 64))},
    ),
    "mixed-3-4": Recipe(
        QuantSpec(3, 128),
        {"token_embeddings": QuantSpec(4, 128)},
        {"first": (1, QuantSpec(4, 128))},
    ),
    "mixed-3-5": Recipe(
        QuantSpec(3, 128),
        {
            "token_embeddings": QuantSpec(5, 128),
            "attn.qkv_proj": QuantSpec(4, 128),
            "ffn.proj_2": QuantSpec(4, 128),
        },
        {"first": (1, QuantSpec(5, 128))},
    ),
    "mixed-4-5": Recipe(
        QuantSpec(4, 128),
        {"token_embeddings": QuantSpec(5, 128)},
        {"first": (1, QuantSpec(5, 128))},
    ),
    "mixed-5-6": Recipe(
        QuantSpec(5, 128),
        {"token_embeddings": QuantSpec(6, 128)},
        {"first": (1, QuantSpec(6, 128))},
    ),
}


def role(name: str) -> str:
    """layers.3.ffn.proj_2 -> ffn.proj_2"""
    return re.sub(r"^(transformer\.)?(layers\.\d+\.)?", "", name)


def number_of(name: str) -> int:
    """The layer of layers.3.ffn.proj_2; -1 for what belongs to none."""
    found = re.match(r"(?:transformer\.)?layers\.(\d{1,4})\.", name)
    return int(found[1]) if found else -1


def hint(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = get_close_matches(str(word), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def find_recipe(name: str) -> Recipe:
    """A built-in recipe, or the YAML file of that path. Raises `OptionError` or `ConfigError`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in (".yaml", ".yml") or os.path.isfile(path):
        return read_recipe(path)
    raise OptionError(
        f"recipe is {name!r}; known: {', '.join(BUILT_IN)}, or the path of a .yaml file{hint(name, BUILT_IN)}"
    )


def read_recipe(path: Path) -> Recipe:
    """A user's YAML. Raises `ConfigError` naming the file and the line's key."""
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(
            f"{path} is no recipe: it must map default, {', '.join(ROLES)}, first or last to a form"
        )
    kinds: dict[str, dict[str, Any]] = {"roles": {}, "ends": {}, "single": {}}
    default: QuantSpec | None = None
    for key, value in raw.items():
        where = f"{path}: {key}"
        if key == "default":
            default = read_form(where, value)
        elif key in ROLES:
            kinds["roles"][key] = read_form(where, value)
        elif key in ENDS:
            kinds["ends"][key] = read_end(where, value)
        elif isinstance(key, str) and number_of(key) >= 0 and role(key) in ROLES:
            kinds["single"][key.removeprefix("transformer.")] = read_form(where, value)
        else:
            known = ("default", *ROLES, *ENDS)
            raise ConfigError(
                f"{path} has the key {key!r}; known: {', '.join(known)}, layers.N.ROLE{hint(key, known)}"
            )
    return Recipe(default, **kinds)


def read_end(where: str, value: Any) -> tuple[int, QuantSpec | None]:
    if not isinstance(value, dict):
        return 1, read_form(where, value)
    count = value.get("layers", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{where} has layers {count!r}; it must be a whole number from 1 up")
    return count, read_form(where, {key: entry for key, entry in value.items() if key != "layers"})


def read_form(where: str, value: Any) -> QuantSpec | None:
    if value == WHOLE:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} is {value!r}; it must be {WHOLE}, a number of bits, or settings {', '.join(SETTINGS)}"
        )
    if unknown := [key for key in value if key not in SETTINGS]:
        raise ConfigError(
            f"{where} has the setting {unknown[0]!r}; known: {', '.join(SETTINGS)}{hint(unknown[0], SETTINGS)}"
        )
    try:
        form = make_spec(value.get("bits"), value.get("group_size"), value.get("mode"))
    except (OptionError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if form is None:
        raise ConfigError(
            f"{where} is empty; it must be {WHOLE}, a number of bits, or settings {', '.join(SETTINGS)}"
        )
    return form
