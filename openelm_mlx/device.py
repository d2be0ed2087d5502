"""The only place that imports MLX, after the settings that MLX reads when it starts (settings.py).

Everything that computes takes `mx` and `nn` from here, not from `mlx`, so no order of imports
bypasses the settings. Only this module finds out what kind of device this is.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openelm_mlx.errors import MLXError
from openelm_mlx.settings import LIMIT_NAMES, load_blas, set_buffer_limits, sysctl

if TYPE_CHECKING:
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    import mlx.utils as utils

__all__ = ["mx", "nn", "optimizers", "utils"]  # of MLX; the rest is this module's own

WIRED_SINCE = 15  # macOS: before it mx.set_wired_limit has no effect

blas, buffer_settings = load_blas(), set_buffer_limits()

try:  # the two settings above take effect only before this import
    import mlx.core as mx
except ImportError as error:
    if not sys.platform.startswith("linux"):
        raise
    from openelm_mlx.mlx_wheels import wheels, why_not

    raise MLXError(why_not(error, wheels())) from error


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: importing them takes time, and not all need them
        return import_module(f"mlx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kind() -> Literal["metal", "cuda", "cpu"]:
    """Return what computes: the GPU of a Mac, one of NVIDIA's, or the processor."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "cpu"


def on_processor() -> bool:
    """Return whether MLX computes on the processor now: a user may have set it beside a GPU."""
    return bool(mx.default_device() == mx.cpu)


def wired_limit(recommended_bytes: int | None, system_version: str) -> int | None:
    """Return the most bytes that may be wired: all that Metal recommends.

    macOS does not page wired memory out. None if nothing can be wired: without Metal, or on a
    macOS before 15 (mlx-lm's `wired_limit` has the same rule).
    """
    major = re.match(r"\d+", system_version or "")
    if not recommended_bytes or major is None or int(major[0]) < WIRED_SINCE:
        return None
    return recommended_bytes


def most_wired() -> int | None:
    """Return `wired_limit` of this machine."""
    if kind() != "metal":
        return None
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    return wired_limit(recommended, platform.mac_ver()[0])


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
    device: Mapping[str, Any] = mx.device_info() if kind() != "cpu" else {}
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
        # an NVIDIA GPU's own; a Mac's GPU has the memory above
        "gpu_memory_bytes": device.get("total_memory"),
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
