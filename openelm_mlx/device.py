"""The one door to MLX: the settings that it reads when it starts are made before it is imported.

Whatever computes takes `mx` and `nn` from here, never from `mlx` itself, so that no order of
imports bypasses the settings. Nothing else asks what kind of device this is.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openelm_mlx.device_settings import LIMITS, load_blas, set_buffer_limits, wired_limit

blas, buffer_settings = load_blas(), set_buffer_limits()

import mlx.core as mx  # noqa: E402 - the two settings above take effect only before this import

if TYPE_CHECKING:
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    import mlx.utils as utils

__all__ = [
    "blas",
    "buffer_settings",
    "facts",
    "kind",
    "mx",
    "nn",
    "optimizers",
    "set_wired_limit",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name in (
        "nn",
        "optimizers",
        "utils",
    ):  # on first use: importing them takes time, and not all need them
        return import_module(f"mlx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def kind() -> Literal["metal", "cuda", "cpu"]:
    """Return what computes: the GPU of a Mac, one of NVIDIA's, or the processor."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "cpu"


def set_wired_limit() -> int | None:
    """Let the weights stay wired and return the limit in bytes, None where there is none.

    This was not tested on Metal.
    """
    if kind() != "metal":
        return None
    recommended = int(mx.device_info().get("max_recommended_working_set_size", 0))
    limit = wired_limit(recommended, platform.mac_ver()[0])
    if limit is not None:
        mx.set_wired_limit(limit)
    return limit


def facts() -> dict[str, Any]:
    """Return plain facts about this machine; what is unknown is None."""
    macos = platform.mac_ver()[0]
    device: Mapping[str, Any] = mx.device_info() if kind() == "metal" else {}
    buffers = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return {
        "openelm_mlx": installed("openelm-mlx"),
        "mlx": installed("mlx"),
        "mlx_lm": installed("mlx-lm"),
        "python": platform.python_version(),
        "system": platform.system(),
        "system_version": macos or platform.release(),
        "machine": platform.machine(),
        "chip": device.get("device_name") or cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": kind(),
        "wired_limit_bytes": wired_limit(device.get("max_recommended_working_set_size"), macos),
        "command_buffers": " ".join(buffers) or "MLX's own",
        "command_buffers_reason": buffer_settings.reason,
        "blas": str(blas.path or "MLX's own"),
        "blas_reason": blas.reason,
        "cxx_compiler": shutil.which("g++"),  # the one that MLX calls
        "load_average": os.getloadavg()[0],
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
