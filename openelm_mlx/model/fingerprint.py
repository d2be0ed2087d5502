"""The fingerprint of a model's weights, which tells whether an adapter was made for them.

It is a sample: the first numbers of every tensor that is not quantized, in float32. So it costs
nothing, and the same model has it in any type: two samples agree where one number is the other,
rounded to a half type. Norms are never quantized, so that there is always something to compare.
Another seed, or training that went on, changes all of them.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable
from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.model.config import HEAD, OpenELMConfig, expected_tensors
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.quantization import stem_of

PREFIX = "openelm-1:"  # a fingerprint begins with its version
SAMPLE = 4  # numbers of each tensor
HALVES = (mx.float16, mx.bfloat16)


def fingerprint(config: OpenELMConfig, rows: Callable[[str], mx.array | None]) -> str:
    """Return the fingerprint of a model.

    `rows` returns the tensor of a name, or at least its first 4 rows, and None for a quantized
    one. The head does not count: an embedding may be tied to it, or stored twice.
    """
    samples = []
    for name, shape in expected_tensors(config).items():
        if name == f"{HEAD}.weight":
            continue
        count, tensor = min(SAMPLE, *shape), rows(name)
        if tensor is None:
            sample = mx.full((count,), math.nan)
        else:  # the diagonal, as the first row may be that of an unused token
            sample = mx.diag(tensor[:count, :count]) if tensor.ndim == 2 else tensor[:count]
        samples.append(sample.astype(mx.float32))
    numbers: Any = mx.concatenate(samples).tolist()
    packed = struct.pack(f"<{len(numbers)}f", *numbers)
    return PREFIX + base64.b64encode(packed).decode()


def fingerprint_of(model: OpenELM) -> str:
    """Return the fingerprint of a loaded model."""
    arrays = parameters(model)

    def plain(name: str) -> mx.array | None:
        return None if f"{stem_of(name)}.scales" in arrays else arrays[name]

    return fingerprint(model.args, plain)


def numbers_of(text: str) -> mx.array:
    """Return the sample behind a fingerprint. Raises `ValueError` if it is not one."""
    try:
        packed = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        packed = b""
    if not text.startswith(PREFIX) or not packed or len(packed) % 4:
        raise ValueError("it is not a fingerprint of this version")
    return mx.array(struct.unpack(f"<{len(packed) // 4}f", packed))


def same_base(one: str, other: str) -> bool:
    """Return whether two fingerprints may be those of one model, in whatever types.

    Raises `ValueError` if either is not a fingerprint.
    """
    x, y = numbers_of(one), numbers_of(other)
    if x.shape != y.shape:
        return False
    agree = (x == y) | mx.isnan(x) | mx.isnan(y)
    for half in HALVES:
        agree |= (x.astype(half) == y) | (y.astype(half) == x)
    (short_x, brain_x), (short_y, brain_y) = (
        [v == v.astype(half).astype(mx.float32) for half in HALVES] for v in (x, y)
    )
    # of one number, float16 and bfloat16 may lie at most bfloat16's step apart
    near = mx.abs(x - y) <= mx.maximum(mx.abs(x), mx.abs(y)) * 2**-7 + 2**-24
    agree |= near & ((short_x & brain_y) | (brain_x & short_y))
    return bool(agree.all().item())
