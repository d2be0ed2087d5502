"""Facts about this machine, for bug reports and results. What only a Mac tells is untested."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """Plain facts about this machine; what is unknown is None."""
    from openelm_mlx.blas import load_blas
    from openelm_mlx.hub import hub_cache
    from openelm_mlx.metal import LIMITS, set_buffer_limits, wired_limit
    from openelm_mlx.model_cache import conversions, conversions_folder

    blas, limits = load_blas(), set_buffer_limits()
    import mlx.core as mx

    metal, macos = mx.metal.is_available(), platform.mac_ver()[0]
    device: Mapping[str, Any] = mx.device_info() if metal else {}
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
        "backend": "metal" if metal else "cpu",
        "wired_limit_bytes": wired_limit(device.get("max_recommended_working_set_size"), macos),
        "command_buffers": " ".join(buffers) or "MLX's own",
        "command_buffers_reason": limits.reason,
        "blas": str(blas.path or "MLX's own"),
        "blas_reason": blas.reason,
        "cxx_compiler": shutil.which("g++"),  # the one that MLX calls
        "hub_cache": str(hub_cache()),
        "converted_cache": str(conversions_folder()),
        "converted_cache_bytes": sum(one.nbytes for one in conversions()),
        "free_disk_bytes": free_bytes(hub_cache()),
        "load_average": os.getloadavg()[0],
    }


def free_bytes(folder: Path) -> int:
    """Bytes free where `folder` is or would be made: a home may not exist."""
    place = next(above for above in (folder, *folder.parents) if os.path.exists(above))
    return shutil.disk_usage(place).free


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
