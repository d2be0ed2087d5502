"""The only place that imports MLX, after the settings that MLX reads when it starts.

Everything that computes takes `mx` and `nn` from here, not from `mlx`, so no order of imports
bypasses the settings. Only this module finds out what kind of device this is. Functions without
side effects choose the settings, so every choice is tested on systems without either.

BLAS: MLX's Linux wheel links the reference BLAS; an OpenBLAS of the system takes its place.

Metal: MLX commits a command buffer after a number of kernels, or of elements in the arrays that
they touch: 40 to 50 of either by size of chip, where MLX_MAX_MB_PER_BUFFER counts 2**20 elements of
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
import platform
import re
import shutil
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openelm_mlx.errors import OptionError

if TYPE_CHECKING:
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    import mlx.utils as utils

__all__ = ["mx", "nn", "optimizers", "utils"]  # of MLX; the rest is this module's own

DEFAULT = "auto"
NAMES = ("libopenblas.so.0", "libopenblas.so")
LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000"}  # as in mlxcel's pull 360
LIMIT_NAMES = (*LIMITS, "MLX_MAX_MB_PER_BUFFER")  # all that MLX reads
GENERATIONS = range(1, 5)  # M1 to M4
WIRED_SINCE = 15  # macOS: before it mx.set_wired_limit has no effect


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
    if int(match[1]) not in GENERATIONS:
        known = "no others were measured on this chip"
        if int(match[1]) == 5:
            known = "others gained nothing on an M5 Max (lablup/mlxcel pull 358)"
        return MetalSettings(reason=f"MLX's own limits stay on {chip}: {known}")
    if own := [name for name in LIMIT_NAMES if name in environ]:
        return MetalSettings(reason=f"you have set {', '.join(own)}")
    why = f"faster decoding on an M1 Ultra (lablup/mlxcel pull 360); this is {chip}"
    return MetalSettings(dict(LIMITS), why)


def wired_limit(recommended_bytes: int | None, system_version: str) -> int | None:
    """Return the bytes that may stay wired: all that Metal recommends.

    macOS does not page wired weights out between tokens. None if nothing can be wired: without
    Metal, or on a macOS before 15 (mlx-lm's `wired_limit` has the same rule).
    """
    major = re.match(r"\d+", system_version or "")
    if not recommended_bytes or major is None or int(major[0]) < WIRED_SINCE:
        return None
    return recommended_bytes


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


blas, buffer_settings = load_blas(), set_buffer_limits()

import mlx.core as mx  # noqa: E402 - the two settings above take effect only before this import


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: importing them takes time, and not all need them
        return import_module(f"mlx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kind() -> Literal["metal", "cuda", "cpu"]:
    """Return what computes: the GPU of a Mac, one of NVIDIA's, or the processor."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "cpu"


def set_wired_limit() -> int | None:
    """Let the weights stay wired and return the limit in bytes, None if there is none.

    This was not tested on Metal.
    """
    if kind() != "metal":
        return None
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    limit = wired_limit(recommended, platform.mac_ver()[0])
    if limit is not None:
        mx.set_wired_limit(limit)
    return limit


def recommended_bytes() -> int:
    """Return how much memory MLX should use at most: what Metal recommends, or MLX's own limit."""
    if kind() == "metal":
        return int(mx.device_info()["max_recommended_working_set_size"])
    limit = mx.set_memory_limit(1 << 62)  # only setting one tells which was set
    mx.set_memory_limit(limit)
    return limit


def facts() -> dict[str, Any]:
    """Return plain facts about this machine; what is unknown is None."""
    macos = platform.mac_ver()[0]
    device: Mapping[str, Any] = mx.device_info() if kind() == "metal" else {}
    buffers = [f"{name}={os.environ[name]}" for name in LIMIT_NAMES if name in os.environ]
    return {
        "openelm_mlx": installed("openelm-mlx"),
        "mlx": installed("mlx"),
        "mlx_lm": installed("mlx-lm"),
        "python": platform.python_version(),
        "system": platform.system(),
        "system_version": macos or platform.release(),
        "machine": platform.machine(),
        "chip": device.get("device_name") or cpu_name(),
        "processor": sysctl("hw.model") or processor_of(cpuinfo()),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "backend": kind(),
        "wired_limit_bytes": wired_limit(device.get("max_recommended_working_set_size"), macos),
        "command_buffers": " ".join(buffers) or "MLX's own",
        "command_buffers_reason": buffer_settings.reason,
        "blas": str(blas.path or "MLX's own"),
        "blas_reason": blas.reason,
        "cxx_compiler": shutil.which("g++"),  # the one that MLX calls
        "load_average": os.getloadavg()[0],
    }


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # imports much: not at each start

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpuinfo() -> str:
    """Return Linux's description of the processor; it is empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """Return the processor's name if the system tells it."""
    lines = [line.partition(":") for line in cpuinfo().splitlines()]
    names = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    return names[0] if names else platform.processor()


def processor_of(cpuinfo: str) -> str | None:
    """Return what tells processors of one name apart: `AuthenticAMD family 25 model 17 ...`."""
    lines = [line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines()]
    first = {name.strip(): value.strip() for name, _, value in lines}
    words = {"vendor_id": "", "cpu family": "family ", "model": "model ", "stepping": "stepping "}
    return " ".join(text + first[key] for key, text in words.items() if key in first) or None
