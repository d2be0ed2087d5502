"""Classes of options: dataclasses whose fields have a help text and an allowed range.

Python, the command line and the benchmarks all build their options from such classes, so each
default, range and help text is written once. Nothing here needs MLX.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypeVar

from openelm_mlx.errors import OptionError

T = TypeVar("T")
UNFIT = object()
KINDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "Path": "a path in UTF-8",
    "tuple[str, ...]": "a text of at least one character, or a list of such texts",
    "tuple[int, ...]": "a whole number, or a list of such numbers",
    "tuple[tuple[int, float], ...]": "a dict of token ids to numbers, or texts ID=NUMBER,",
    "Callable[..., Any]": "a hashable function",
}


def check_fields(options: Any) -> None:
    """Check every field of a dataclass by annotation and metadata, and store it in that type.

    A number is converted if that loses nothing: one of numpy or MLX to Python's, 4.0 to 4 for an
    integer. Raises `OptionError` for the first field of another type, outside the inclusive
    ``metadata["range"]``, or not one of ``metadata["choices"]``. None is allowed if the
    annotation says so.
    """
    for item in fields(options):
        given = getattr(options, item.name)
        if given is item.default:  # the defaults are in the types of their annotations
            continue
        value = as_annotated(str(item.type), given)
        if value is UNFIT or not within(item, value):
            if "choices" in item.metadata and isinstance(given, tuple) and value is not UNFIT:
                given = next(entry for entry in value if entry not in item.metadata["choices"])
            raise OptionError(f"{item.name} is {shown(given)}; {allowed(item)}")
        object.__setattr__(options, item.name, value)


def as_annotated(annotation: str, given: Any) -> Any:
    """Return `given` in the type of `annotation`, or `UNFIT` if that would lose something."""
    kind, _, rest = annotation.partition(" | ")
    if given is None:
        return None if rest == "None" else UNFIT
    if kind == "Path":
        fits = isinstance(given, (str, os.PathLike)) and fit_path(given)
        return Path(os.path.expanduser(given)) if fits else UNFIT
    if kind == "str":
        return str(given) if isinstance(given, str) else UNFIT
    if kind == "Callable[..., Any]":
        return given if callable(given) and hashable(given) else UNFIT
    if kind == "tuple[tuple[int, float], ...]":
        return as_pairs(given)
    if kind.startswith("tuple["):
        parts = given if isinstance(given, (list, tuple)) else (given,)
        found = tuple(as_annotated(kind[len("tuple[") : -len(", ...]")], part) for part in parts)
        return UNFIT if UNFIT in found or "" in found else found
    scalar = getattr(given, "shape", None) == ()  # of numpy or MLX
    number = given.item() if scalar else given
    if kind == "bool" or isinstance(number, bool):
        return number if kind == "bool" and isinstance(number, bool) else UNFIT
    if not isinstance(number, (int, float)):
        return UNFIT
    if kind == "float":
        return float(number) if abs(number) <= sys.float_info.max else UNFIT  # so is NaN
    return int(number) if isinstance(number, int) or number.is_integer() else UNFIT


def as_pairs(given: Any) -> Any:
    """Return sorted pairs of token ids and numbers from a dict, pairs or texts ID=NUMBER.

    Of several numbers for one id the last counts. Return `UNFIT` for anything else.
    """
    items = [given] if isinstance(given, str) else given
    items = given.items() if isinstance(given, Mapping) else items
    pairs = {}
    try:
        for item in items:
            pair = item.split("=") if isinstance(item, str) else item
            token, number = (float(one) if isinstance(one, str) else one for one in pair)
            pairs[as_annotated("int", token)] = as_annotated("float", number)
    except (TypeError, ValueError):
        return UNFIT
    if UNFIT in pairs or UNFIT in pairs.values() or min(pairs, default=0) < 0:
        return UNFIT
    return tuple(sorted(pairs.items()))


def hashable(given: Any) -> bool:
    """Return whether a value can be a key."""
    try:
        hash(given)
    except TypeError:
        return False
    return True


def fit_path(given: str | os.PathLike[str]) -> bool:
    """Return whether MLX can open a file of this name: it takes names in UTF-8 only."""
    name = os.fspath(given)
    return isinstance(name, str) and name != "" and "\0" not in name and encodable(name)


def encodable(text: str) -> bool:
    """Return whether a text can be written in UTF-8: it is free of lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def in_utf8(name: str) -> str:
    """Return a name with question marks for what is not UTF-8, for files that have to be."""
    return name.encode("utf-8", "replace").decode("utf-8")


def within(item: Field[Any], value: Any) -> bool:
    """Return whether a value is one of a field's choices, or in its range."""
    if value is None:
        return True
    entries = value if isinstance(value, tuple) else (value,)
    if "choices" in item.metadata:
        return all(entry in item.metadata["choices"] for entry in entries)
    if "range" not in item.metadata:
        return True
    low, high = item.metadata["range"]
    numbers = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    return all(low <= number <= high for number in numbers)


def allowed(item: Field[Any]) -> str:
    """Return what a field may be, as in "allowed is a whole number from 1 to 16, or None"."""
    kind, _, rest = str(item.type).partition(" | ")
    none = ", or None" if rest == "None" else ""
    if "choices" in item.metadata:
        return f"allowed: {', '.join(map(str, item.metadata['choices']))}{none}"
    limits = ""
    if "range" in item.metadata:
        low, high = item.metadata["range"]
        limits = f" from {low} up" if high == math.inf else f" from {low} to {high}"
    return f"allowed is {item.metadata.get('kind', KINDS[kind])}{limits}{none}"


def shown(value: Any) -> str:
    """Return a value as errors quote it: in one line of at most 80 characters."""
    text = " ".join(repr(str(value) if isinstance(value, Path) else value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_unset(options: Any, name: str, why: str) -> None:
    """Raise `OptionError`, which says `why`, if the option `name` is not at its default."""
    value = getattr(options, name)
    if value != getattr(type(options), name):
        given = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        raise OptionError(f"{name} is {given}, but {why}")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Raise `OptionError` for anything but a whole number from `least` up."""
    if type(value) is not int or value < least:
        raise OptionError(f"{name} is {shown(value)}; allowed is a whole number from {least} up")


def explained(*options: type) -> Callable[[T], T]:
    """Decorate a function or class so that its docstring ends with all options and their meanings.

    The options are the fields of the classes `options`, or of the decorated dataclass; their texts
    come from the metadata of the fields. `help` and notebooks show them.
    """

    def explain(target: T) -> T:
        classes = options or ((target,) if is_dataclass(target) else ())
        items = [item for cls in classes for item in fields(cls) if "help" in item.metadata]
        lines = [line for item in items for line in explanation(item)]
        target.__doc__ = "\n".join([cleandoc(target.__doc__ or ""), "", "Options:", *lines])
        return target

    return explain


def explanation(item: Field[Any]) -> list[str]:
    """Return the lines of a docstring that explain one option."""
    default = "" if item.default is MISSING else f" = {item.default!r}"
    limits = "" if item.type == "bool" else f"; {allowed(item)}"
    text = textwrap.wrap(item.metadata["help"] + limits, 72)
    return [f"    {item.name}: {item.type}{default}", *(f"        {line}" for line in text)]


def option(
    default: Any, help: str, low: float | None = None, high: float = math.inf, **metadata: Any
) -> Any:
    """Return a field of a class of options, from `low` to `high`, with its help text."""
    limits = {} if low is None else {"range": (low, high)}
    return field(default=default, metadata={"help": help, **limits, **metadata})


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` was meant to be, if any.

    It is the only one that begins so, else the most similar.
    """
    from difflib import get_close_matches

    known = list(known)
    begun = [name for name in known if name.startswith(word)]
    near = begun if len(begun) == 1 else get_close_matches(word, known, 1)
    return near[0] if near else None
