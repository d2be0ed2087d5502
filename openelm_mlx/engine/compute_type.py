"""The type that a model is computed in, and why: by what is asked for, the device, and its record.

A GPU computes in 16 bits. A model that is stored in them keeps its type; float32 becomes bfloat16,
or float16 where a conversion has measured (convert/activations.py) that a factor of 16 remains
below float16's largest number. float16 is nearer to float32 (docs/converting.md has figures).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import OptionError
from openelm_mlx.files import read_own_json
from openelm_mlx.model.checkpoint import Headers
from openelm_mlx.model.config import RECORD, OpenELMConfig

LARGEST, MARGIN = 65504, 16  # of float16, and the factor that must remain below it


class Computed(NamedTuple):
    """A type by its name, and the reason for it in words."""

    dtype: str
    why: str


def compute_dtype(
    config: OpenELMConfig,
    stored: str,
    asked: str | None,
    kind: str,
    largest: float | None = None,
) -> Computed:
    """Return the type of the activations of a model whose norms are stored in `stored`.

    `kind` is `device.kind()`, and `largest` the largest activation if a conversion has measured
    it. Raises `OptionError` for a type that is not allowed, and for float16 if a model overflows.
    """
    if asked is not None and asked not in FLOATS:
        raise OptionError(f"dtype is {asked!r}; allowed: {', '.join(FLOATS)}")
    if asked == "float16" and config.overflows_float16:
        needs = "OpenELM-3B needs a wider range than float16 has"
        raise OptionError(f"{needs}; use bfloat16, or float32 to check")
    if asked is not None:
        return Computed(asked, "it was asked for")
    if kind == "cpu":
        return Computed("float32", "the CPU backend emulates half types")
    if config.overflows_float16 and stored != "bfloat16":
        return Computed("bfloat16", "a model of this size overflows float16")
    if stored != "float32":
        return Computed(stored, "the weights are stored in it")
    if largest is None:
        return Computed("bfloat16", "no conversion has measured the largest activation")
    measured = f"the largest activation measured is {largest:,.4g}"
    if largest > LARGEST:
        return Computed("bfloat16", f"{measured}, more than float16 has")
    room = f"{measured}, {LARGEST / largest:,.0f} times less"
    if largest * MARGIN > LARGEST:
        return Computed("bfloat16", f"{room} than float16's largest number; {MARGIN} is asked for")
    return Computed("float16", f"{room} than its largest number")


def largest_activation(folder: Path, headers: Headers) -> float | None:
    """Return what the conversion that wrote these weights has measured, None if nothing."""
    record = read_own_json(folder / RECORD)
    if record.get("bytes") != sum(place.info.nbytes for _, place in headers.places.values()):
        return None  # other weights have been put in the folder
    measured = record.get("activations")
    found = measured.get("largest") if isinstance(measured, dict) else None
    if not isinstance(found, float) or not math.isfinite(found) or found <= 0:
        return None
    return found
