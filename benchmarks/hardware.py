"""The limits of hardware: chips with their bandwidths, and the bytes that a token must read.

Nothing here measures or runs a model; everything follows from tables and configurations. A chip's
bandwidth, in GB/s of 10^9 bytes, is Apple's own figure of the page that is named beside it, but for
the M1; it was taken from public tables that cite these pages. Chips that Apple sells under one name
with two bandwidths are told apart by their GPU cores. Every weight is read once a token, whatever
the kernels: at batch size one no work is done twice. The ledger counts the same bytes on the graph,
and a test compares both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from openelm_mlx.dtypes import FLOATS, itemsize
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import spec_of

# --- chips

NEWS, SPECS = "https://www.apple.com/newsroom", "https://support.apple.com/en-us"
M1 = "https://en.wikipedia.org/wiki/Apple_M1 (Apple gives no figure)"
M1_PRO = (
    f"{NEWS}/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/"
)
M1_ULTRA = (
    f"{NEWS}/2022/03/apple-unveils-m1-ultra-the-worlds-most-powerful-chip-for-a-personal-computer/"
)
M2 = f"{NEWS}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"
M2_PRO = (
    f"{NEWS}/2023/01/"
    "apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/"
)
M2_ULTRA = f"{NEWS}/2023/06/apple-introduces-m2-ultra/"
M3, M3_PRO, M3_ULTRA = f"{SPECS}/117735", f"{SPECS}/117737", f"{SPECS}/122211"
M4, M4_PRO = f"{NEWS}/2024/10/apple-introduces-m4-pro-and-m4-max/", f"{SPECS}/121553"
M5, M5_PRO = f"{SPECS}/126320", f"{SPECS}/126318"
M6 = (
    f"{NEWS}/2026/08/apple-introduces-m6-and-m5-ultra-for-a-big-leap-in-performance-and-ai-compute/"
)


@dataclass(frozen=True)
class Chip:
    """A chip as sold, by the name that `sysctl machdep.cpu.brand_string` and MLX give it."""

    name: str
    gpu_cores: tuple[int, ...]  # what it is sold with, at this bandwidth
    bandwidth_gb: float  # nominal, GB/s
    source: str

    @property
    def short(self) -> str:
        """The name as the command line spells it: Apple M3 Max is m3-max."""
        return self.name.removeprefix("Apple ").lower().replace(" ", "-")

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gb * 1e9

    @property
    def generation(self) -> int:
        """The number of the generation: 3 of an M3 Max."""
        return int(self.short[1:].partition("-")[0])

    def __str__(self) -> str:
        cores = " or ".join(map(str, self.gpu_cores))
        return f"{self.name}, {cores} GPU cores, {self.bandwidth_gb:g} GB/s"


CHIPS = (
    Chip("Apple M1", (7, 8), 68.3, M1),
    Chip("Apple M1 Pro", (14, 16), 200, M1_PRO),
    Chip("Apple M1 Max", (24, 32), 400, M1_PRO),
    Chip("Apple M1 Ultra", (48, 64), 800, M1_ULTRA),
    Chip("Apple M2", (8, 10), 100, M2),
    Chip("Apple M2 Pro", (16, 19), 200, M2_PRO),
    Chip("Apple M2 Max", (30, 38), 400, M2_PRO),
    Chip("Apple M2 Ultra", (60, 76), 800, M2_ULTRA),
    Chip("Apple M3", (8, 10), 100, M3),
    Chip("Apple M3 Pro", (14, 18), 150, M3_PRO),
    Chip("Apple M3 Max", (30,), 300, M3_PRO),
    Chip("Apple M3 Max", (40,), 400, M3_PRO),
    Chip("Apple M3 Ultra", (60, 80), 819, M3_ULTRA),
    Chip("Apple M4", (8, 10), 120, M4),
    Chip("Apple M4 Pro", (16, 20), 273, M4_PRO),
    Chip("Apple M4 Max", (32,), 410, M4_PRO),
    Chip("Apple M4 Max", (40,), 546, M4_PRO),
    Chip("Apple M5", (8, 10), 153, M5),
    Chip("Apple M5 Pro", (16, 20), 307, M5_PRO),
    Chip("Apple M5 Max", (32,), 460, M5_PRO),
    Chip("Apple M5 Max", (40,), 614, M5_PRO),
    Chip("Apple M5 Ultra", (64, 80), 1200, M6),
    Chip("Apple M6", (12,), 170, M6),  # 153 with 16 GB of memory, which its name does not tell
)


def find_chip(name: str, gpu_cores: int | None = None) -> Chip:
    """Return a chip by MLX's name or the short one, `m3-max`, or with its GPU cores: `m3-max-30`.

    Without them it is the one with the most cores. Raises `BenchmarkError` with the nearest names.
    """
    short = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("apple-")
    if match := re.fullmatch(r"(m\d+(?:-[a-z]+)?)-(\d+)(?:-?cores?)?", short):
        short, gpu_cores = match[1], int(match[2])
    sold = [chip for chip in CHIPS if chip.short == short]
    if not sold:
        known = list(dict.fromkeys(chip.short for chip in CHIPS))
        near = get_close_matches(short, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise BenchmarkError(f"the chip {name!r} is not in the table; {hint}")
    fitting = [chip for chip in sold if gpu_cores is None or gpu_cores in chip.gpu_cores]
    if not fitting:
        counts = " or ".join(str(count) for chip in sold for count in chip.gpu_cores)
        what = f"{sold[0].name} with {gpu_cores} GPU cores is not in the table"
        raise BenchmarkError(f"{what}; it has {counts}")
    return fitting[-1]


def nominal_bandwidth(device_name: str | None, gpu_cores: int | None = None) -> float | None:
    """Return the bytes a second of the chip that MLX names; None if it is not in the table.

    If one name has two, it is that of the cores, or the largest if they are unknown.
    """
    for cores in (gpu_cores, None):
        with suppress(BenchmarkError):
            return find_chip(device_name or "", cores).bandwidth
    return None


# --- bytes of a token

PARTS = ("embedding", "attention", "ffn", "norms", "scales", "kv")


def part_of(tensor: str) -> str:
    """Return the part that a tensor belongs to. A head counts as embedding, as it may be tied."""
    if tensor.endswith((".scales", ".biases")):
        return "scales"
    if "token_embeddings" in tensor or "lm_head" in tensor:
        return "embedding"
    if "norm" in tensor:
        return "norms"
    return "attention" if ".attn." in tensor else "ffn"


def bytes_per_token(
    config: OpenELMConfig,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    context_tokens: int = 0,
    kv_bits: int | None = None,
) -> dict[str, float]:
    """Return the bytes read for a token that attends to `context_tokens` (itself too), by part.

    `dtype` is that of activations, norms, unquantized matrices, scales, and of keys and values
    unless `kv_bits` says otherwise. `quantization` is that of config.json. Raises `BenchmarkError`
    or `ConfigError` for what cannot be sized, `CacheError` for heads that `kv_bits` does not fit.

        quantized = {"bits": 4, "group_size": 64}
        bytes_per_token(OpenELMConfig.from_name("270m"), "bfloat16", quantized, 64)
    """
    if dtype not in FLOATS:
        raise BenchmarkError(f"dtype is {dtype!r}; allowed: {', '.join(FLOATS)}")
    if context_tokens < 0:
        raise BenchmarkError(f"context_tokens is {context_tokens}; it must be at least 0")
    parts = dict.fromkeys(PARTS, 0.0)
    tied = config.share_input_output_layers
    for tensor, shape in expected_tensors(config).items():
        stem = tensor.removesuffix(".weight")
        weights, scales = float(math.prod(shape) * itemsize(dtype)), 0.0
        spec = spec_of(quantization, stem) if quantization and len(shape) == 2 else None
        if spec is not None:
            if shape[1] % spec.group_size:
                what = f"{tensor} has rows of {shape[1]}"
                raise BenchmarkError(f"{what}, not a multiple of group_size {spec.group_size}")
            weights, scales = spec.weight_bytes(shape), spec.scale_bytes(shape, dtype)
        if "token_embeddings" in tensor:  # one row is looked up; a tied matrix is the head too
            weights, scales = (part / shape[0] + tied * part for part in (weights, scales))
        parts[part_of(tensor)] += weights
        parts["scales"] += scales
    kind = CacheKind.of(config, EngineOptions(kv_bits=kv_bits))
    parts["kv"] = float(kind.bytes_per_token(config, itemsize(dtype)) * context_tokens)
    return parts
