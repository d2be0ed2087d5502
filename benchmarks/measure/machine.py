"""What a result was measured on, and whether the machine was at rest. The macOS parts are untested
there.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.results.document import Metric

FACTS = (
    "chip",
    "machine",
    "cores",
    "memory_bytes",
    "system",
    "system_version",
    "backend",
    "blas",
    "load_average",
)
THERMAL_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")  # OSThermalNotification.h
BUSY, SPREAD, DRIFT = 0.5, 0.10, 0.10  # load a core; quartiles over median; change over all trials


def machine() -> dict[str, Any]:
    """Plain facts for the result document; call it before a model is loaded, so that the load is
    not our own.
    """
    from openelm_mlx.device import facts

    found = {name: value for name, value in facts().items() if name in FACTS}
    found["blas"] = loaded_blas() or "MLX's own"
    if (pressure := thermal_pressure()) is not None:
        found["thermal_pressure"] = pressure
    return found


def versions() -> dict[str, str]:
    from openelm_mlx.device import facts

    found = facts()
    return {
        "openelm-mlx": found["openelm_mlx"] or "unknown",
        "mlx": found["mlx"] or "unknown",
        "python": found["python"],
    }


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def loaded_blas() -> str | None:
    """The file name of an OpenBLAS in this process, which on Linux takes the place of MLX's own."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    names = (line.rsplit("/", 1)[-1] for line in lines if "/" in line)
    # numpy brings a private copy under another name, which MLX does not see
    return next(
        (
            name
            for name in names
            if name.startswith("libopenblas") and "scipy" not in name and "64_" not in name
        ),
        None,
    )


def thermal_pressure() -> str | None:
    """macOS's own word for how far it throttles, or None elsewhere."""
    if sys.platform != "darwin":
        return None
    command = ["notifyutil", "-g", "com.apple.system.thermalpressurelevel"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return read_pressure(output)


def read_pressure(output: str) -> str | None:
    """`com.apple.system.thermalpressurelevel 1` -> "moderate"."""
    words = output.split()
    if not words or not words[-1].isdigit() or int(words[-1]) >= len(THERMAL_LEVELS):
        return None
    return THERMAL_LEVELS[int(words[-1])]


def throttle_count() -> int | None:
    """How often Linux has slowed this processor for its heat since boot; None where it does not
    say.
    """
    try:
        files = list(
            Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        )
        return sum(int(file.read_text()) for file in files) if files else None
    except (OSError, ValueError):
        return None


def rest_notes(before: Mapping[str, Any], after: str | None, throttled: int | None) -> list[str]:
    """What the facts from before a run, macOS's word after it and Linux's count of throttlings say
    against it.
    """
    notes = []
    load, cores = before.get("load_average"), before.get("cores") or os.cpu_count() or 1
    if load is not None and load > BUSY * cores:
        notes.append(f"the machine was busy before the run: load {load:.1f} on {cores} cores")
    for when, pressure in (("before", before.get("thermal_pressure")), ("after", after)):
        if pressure not in (None, "nominal"):
            notes.append(f"the machine was hot {when} the run: thermal pressure {pressure}")
    if throttled:
        notes.append(f"the processor throttled {throttled} times during the run")
    return notes


def trial_notes(name: str, metric: Metric) -> list[str]:
    """What the trials themselves say against a figure: wide spread, or drift from the first to the
    last.
    """
    words = name.split("_")[0]
    notes = []
    if metric.spread > SPREAD:
        notes.append(f"{words}: quartiles {metric.spread:.0%} apart")
    change, sure = drift(metric.values)
    if sure and abs(change) > DRIFT:
        notes.append(f"{words}: {change:+.0%} from the first trial to the last")
    return notes


def drift(values: Sequence[float]) -> tuple[float, bool]:
    """Change over all trials as a share of the median, and whether nearly every pair of trials
    agrees on its sign.

    The slope is that of Theil and Sen (the median over all pairs), which one outlier does not move.
    """
    if len(values) < 5:
        return 0.0, False
    pairs = [
        (values[j] - values[i], j - i)
        for i in range(len(values))
        for j in range(i + 1, len(values))
    ]
    slope = statistics.median(rise / run for rise, run in pairs)
    tau = sum((rise > 0) - (rise < 0) for rise, _ in pairs) / len(pairs)
    middle = statistics.median(values)
    return (slope * (len(values) - 1) / abs(middle) if middle else 0.0), abs(tau) >= 0.8
