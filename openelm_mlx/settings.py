"""The settings made before MLX starts, and the facts of an Apple chip that its name tells.

Functions without side effects choose the settings, so that every choice is tested on systems that
have neither OpenBLAS nor Metal. This module does not import MLX; device.py applies the settings and
then imports it.

BLAS: MLX's Linux wheel links the reference BLAS; an OpenBLAS of the system takes its place.

Metal: MLX commits a command buffer after a number of kernels, or of elements in the arrays that
they touch: 40 or 50 of either by size of chip, where MLX_MAX_MB_PER_BUFFER counts 2**20 elements of
any type and not bytes (mlx/backend/metal/device.cpp, `set_input_array`, `needs_commit`). Each
boundary costs GPU time, which is much of a small model's token. MLX reads both limits once, so they
govern prefill as well: there the elements bound how long a command buffer runs and how much memory
it holds, so only the number of kernels is changed. Others measured the following; this project has
not run on Metal:

- M1 Ultra: 11 to 13 % faster on Gemma 3n at 1000 operations; M1 to M4 get it there by default, M5
  does not: on an M5 Max it was flat or slower (https://github.com/lablup/mlxcel/pull/360, .../358)
- M3 Ultra: decoding 5 % (20k tokens of context) and 7.7 % (short) faster at 1000 operations and a
  limit of 400; no gain on a dense 27B model (https://github.com/ml-explore/mlx/issues/4521)
- A limit of 2000 was best for a large mixture of experts on an M1 Ultra, and smaller machines
  failed to start with it (vllm-project/vllm-metal 578, 637, 585)
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import NamedTuple

from openelm_mlx.errors import OptionError

DEFAULT = "auto"
NAMES = ("libopenblas.so.0", "libopenblas.so")
LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000"}  # as in mlxcel's pull 360
LIMIT_NAMES = (*LIMITS, "MLX_MAX_MB_PER_BUFFER")  # all that MLX reads
GENERATIONS = range(1, 5)  # M1 to M4


@dataclass(frozen=True)
class BlasChoice:
    path: str | None
    reason: str


def choose_blas(environ: Mapping[str, str], platform: str, names: tuple[str, ...]) -> BlasChoice:
    """Choose the BLAS that OPENELM_BLAS asks for: auto (the first of `names`), off, or a path."""
    wish = environ.get("OPENELM_BLAS") or DEFAULT
    if not platform.startswith("linux"):
        return BlasChoice(None, "only Linux needs another BLAS")
    if wish == "off":
        return BlasChoice(None, "OPENELM_BLAS is off")
    if wish != "auto":
        return BlasChoice(wish, "named by OPENELM_BLAS")
    if not names:
        return BlasChoice(None, "no OpenBLAS found; install libopenblas0-pthread")
    return BlasChoice(names[0], "found on this system")


_loaded: dict[str, BlasChoice] = {}  # by what was asked for, before MLX was imported


def load_blas(environ: Mapping[str, str] | None = None) -> BlasChoice:
    """Load the chosen library so that MLX finds it, and return what was loaded.

    Once mlx.core is imported nothing more is loaded, and the first call's choice is returned.
    Raises `OptionError` for a path that cannot be loaded.
    """
    environ = os.environ if environ is None else environ
    wish = environ.get("OPENELM_BLAS") or DEFAULT
    if wish in _loaded:
        return _loaded[wish]
    choice = choose_blas(environ, sys.platform, NAMES)
    if choice.path is None:
        return choice
    if "mlx.core" in sys.modules:
        return BlasChoice(None, "mlx was imported first, too late for another BLAS")
    # the system's loader searches; find_library would start a compiler at every start
    for name in NAMES if wish == "auto" else (choice.path,):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            _loaded[wish] = BlasChoice(name, choice.reason)
            return _loaded[wish]
        except OSError as error:
            problem = error
    if wish != "auto":
        remedy = "give auto, off, or the path of a libopenblas.so"
        raise OptionError(f"OPENELM_BLAS={choice.path} cannot be loaded ({problem}); {remedy}")
    _loaded[wish] = choose_blas(environ, sys.platform, ())
    return _loaded[wish]


@dataclass(frozen=True)
class MetalSettings:
    """Environment variables to set before MLX starts (perhaps none), and why."""

    values: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items()) or "MLX's own"


def buffer_limits(chip: str | None, environ: Mapping[str, str]) -> MetalSettings:
    """Choose limits of command buffers for a chip by its name; the user's own settings win.

    buffer_limits("Apple M2 Pro", {}).values   -> LIMITS
    buffer_limits("Apple M5", {}).values       -> {}
    """
    match = re.match(r"Apple M(\d+)\b", chip or "")
    if match is None:
        this = f"this is {chip or 'not an Apple chip'}"
        return MetalSettings(reason=f"only Apple's M1 to M4 gain by other limits; {this}")
    if own := [name for name in LIMIT_NAMES if name in environ]:
        return MetalSettings(reason=f"you have set {', '.join(own)}")
    if int(match[1]) not in GENERATIONS:
        known = "no others were measured on this chip"
        if int(match[1]) == 5:
            known = "others gained nothing on an M5 Max (lablup/mlxcel pull 358)"
        return MetalSettings(reason=f"MLX's own limits stay on {chip}: {known}")
    why = f"faster decoding on an M1 Ultra (lablup/mlxcel pull 360); this is {chip}"
    return MetalSettings(dict(LIMITS), why)


class Limits(NamedTuple):
    """The kernels and elements that a command buffer takes before MLX commits it."""

    operations: int
    elements: int  # of the arrays that its kernels read and write


def command_limits(chip: str | None, environ: Mapping[str, str]) -> Limits:
    """Return MLX's limits on an Apple chip: those of `environ`, or its own by size of chip.

    command_limits("Apple M2", {})       -> Limits(40, 40 << 20)
    command_limits("Apple M2 Max", {})   -> Limits(50, 50 << 20)
    """
    own = 50 if (chip or "").endswith(("Max", "Ultra")) else 40
    operations, elements = (
        int(text) if (text := environ.get(name, "")).isdecimal() else own for name in LIMIT_NAMES
    )
    return Limits(operations, elements << 20)


# llama.cpp reads prompts of LLaMA 7B (6.74e9 weights) at 107.8 tokens a second on the 7 cores of
# the slowest M1 (its discussion 4167, 4 bits). Later cores are faster.
CORE_FLOPS = 2 * 6.74e9 * 107.8 / 7
CORES = {"": 7, " Pro": 14, " Max": 24, " Ultra": 48}  # the fewest that a chip is sold with


def gpu_flops(chip: str | None) -> float | None:
    """Return the operations a second that the slowest GPU of a chip's name has at least.

    Assumed, not measured: that cores add up. None for other chips than Apple's M series.
    """
    match = re.fullmatch(r"Apple M\d+( Pro| Max| Ultra|)", chip or "")
    return None if match is None else CORES[match[1]] * CORE_FLOPS


def chip_name() -> str | None:
    """Return the processor's name on macOS ("Apple M2 Max"); None elsewhere."""
    return sysctl("machdep.cpu.brand_string")


def sysctl(key: str) -> str | None:
    """Return macOS's text for `key`, without starting a program; None elsewhere."""
    if sys.platform != "darwin":
        return None
    try:
        libc = ctypes.CDLL(None)
        name, size = key.encode(), ctypes.c_size_t(0)
        libc.sysctlbyname(name, None, ctypes.byref(size), None, ctypes.c_size_t(0))
        buffer = ctypes.create_string_buffer(size.value)
        failed = libc.sysctlbyname(name, buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
    except (OSError, AttributeError):
        return None
    return None if failed else buffer.value.decode(errors="replace") or None


_applied: MetalSettings | None = None


def set_buffer_limits(environ: MutableMapping[str, str] | None = None) -> MetalSettings:
    """Put this chip's limits into the environment, where MLX reads them when it starts.

    Later calls return the same choice.
    """
    global _applied
    if _applied is None:
        environ = os.environ if environ is None else environ
        choice = buffer_limits(chip_name(), environ)
        if choice.values and "mlx.core" in sys.modules:
            choice = MetalSettings(reason="mlx was imported first, too late for other limits")
        environ.update(choice.values)
        _applied = choice
    return _applied


def float32_products(backend: str, chip: str | None, environ: Mapping[str, str]) -> str:
    """Say in which precision MLX multiplies matrices of float32.

    The matrix units of Apple's M5 and later chips take TF32 unless told not to, from macOS 26.2 on
    (mlx/utils.h, `enable_tf32`; mlx/backend/metal/matmul.cpp and device.cpp, `is_nax_available`),
    and NVIDIA's do (mlx/backend/cuda/gemms/cublas_gemm.cpp).
    """
    generation = re.match(r"Apple M(\d+)\b", chip or "")
    units = backend == "cuda" or (generation is not None and int(generation[1]) >= 5)
    if not units or environ.get("MLX_ENABLE_TF32") == "0":
        return "float32"
    return "TF32, about 3 digits, where MLX uses matrix units (MLX_ENABLE_TF32=0: float32)"
