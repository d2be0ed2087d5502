"""The machine and the source that a result was measured with, and whether the machine was at rest.

What is read on macOS has not been tested there.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.hardware import nominal_bandwidth
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.results.compare import busy
from openelm_mlx.benchmarks.results.document import Document, Machine, Row

THERMAL_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")  # OSThermalNotification.h
SPREAD, DRIFT = 0.10, 0.10  # quartiles over the median; change over all trials
# bytes of a copy's source, well beyond the last-level caches of every chip in hardware.py (96 MB)
COPIED = 256 * 2**20
WARM_UP, TRIALS, ROW = 2, 7, 2**18


def machine() -> Machine:
    """Return facts of this machine; before a model is loaded, so that the load is not our own."""
    from openelm_mlx.device import facts
    from openelm_mlx.model.kernels.kernel import choice

    known = {item.name for item in fields(Machine)}
    found = {name: value for name, value in facts().items() if name in known}
    found["blas"] = loaded_blas() or "MLX's own"
    found["kernels"] = None
    if found["backend"] != "cpu":  # names alone: the reason against a kernel may name folders
        found["kernels"] = ", ".join(sorted(choice().names)) or "none"
    found["thermal_pressure"] = thermal_pressure()
    found["gpu_cores"] = cores = gpu_cores()
    found["nominal_bytes_per_second"] = nominal_bandwidth(found["chip"], cores)
    return Machine(**found)


def versions() -> dict[str, str]:
    from openelm_mlx.device import facts

    found = {name.replace("_", "-"): text for name, text in facts().items()}
    return {name: found[name] or "unknown" for name in ("openelm-mlx", "mlx", "python")}


def gpu_cores() -> int | None:
    """Return the GPU's cores, by which chips of one name differ; None if macOS does not tell."""
    command = ["ioreg", "-rc", "AGXAccelerator", "-d", "1"]
    return read_cores(output_of(command) or "") if sys.platform == "darwin" else None


def read_cores(output: str) -> int | None:
    """Read `"gpu-core-count" = 20` in macOS's registry of devices."""
    found = re.search(r'"gpu-core-count" = (\d+)', output)
    return int(found[1]) if found else None


def loaded_blas() -> str | None:
    """Return the file name of an OpenBLAS in this process: on Linux it replaces MLX's own."""
    lines = text_of(Path("/proc/self/maps")).splitlines()
    names = (line.rsplit("/", 1)[-1] for line in lines if "/" in line)
    # numpy brings a private copy under another name, which MLX does not see
    ours = (name for name in names if "scipy" not in name and "64_" not in name)
    return next((name for name in ours if name.startswith("libopenblas")), None)


def text_of(path: Path) -> str:
    """Return the text of a file that other systems do not have; it is then empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def output_of(command: Sequence[str]) -> str | None:
    """Return what a program prints, None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout `root`, and whether it has changes that are not committed.

    Both are None if it is not a git checkout.
    """
    if not (root / ".git").exists():
        return None, None
    found = output_of(["git", "-C", str(root), "rev-parse", "HEAD"])
    status = output_of(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return found, None if status is None else bool(status)


# --- how a result came about


def method(options: BenchmarkOptions, document: Document) -> Iterator[str]:
    """Say how the figures came about, in the document itself."""
    suite, facts = options.chosen(), document.machine
    if suite.soak:
        yield "figures are those of a fixed probe between random generations, all on one engine"
        return
    counted = f"{suite.trials_of_a_process} trials"
    if document.processes > 1:
        counted = f"{document.processes} processes with {counted} each"
    yield f"medians of {counted}; one warm-up run of each case comes first and is not counted"
    yield (
        "trials of all cases of a model take turns; tokens are greedy, the end of text is ignored, "
        "the prompt is part of a novel"
    )
    if any(point.speculation == "prompt-lookup" for point in options.points()):
        quotes = "which the prompt does from its 267th token on"
        yield f"prompt lookup pays where a text quotes itself, {quotes}"
    if facts.copy_bytes_per_second:
        copy = f"{facts.copy_bytes_per_second / 1e9:.1f} GB/s, read and written bytes counted"
        yield (
            f"the bound is what a copy reaches here ({copy}) over the bytes that a token must "
            "read; what reads faster than a copy exceeds 100 %"
        )
    if facts.read_bytes_per_second:
        read = f"{facts.read_bytes_per_second / 1e9:.1f} GB/s"
        yield f"reading alone, the largest of as many integers, reaches {read}"


# --- memory bandwidth


def bandwidth(
    size: int | None = None, trials: int = TRIALS, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Return the bytes a second that MLX copies (read and written ones count) and that it reads.

    It copies `size` bytes (COPIED) into memory that was written before, and reads as many.

    On a GPU one kernel fills the memory system. On the CPU backend a stream is a thread, so every
    core takes its share.
    """
    from openelm_mlx import device
    from openelm_mlx.device import mx

    gpu = device.kind() != "cpu"
    count = 1 if gpu else os.cpu_count() or 1
    streams = [mx.default_stream(mx.gpu) if gpu else mx.new_stream(mx.cpu) for _ in range(count)]
    rows = max((size or COPIED) // len(streams) // (4 * ROW), 1)
    sources = [mx.ones((rows, ROW), mx.int32) for _ in streams]
    # one row more, or no copy would be made
    targets = [mx.zeros((rows + 1, ROW), mx.int32) for _ in streams]
    mx.eval(sources, targets)

    def copy(number: int) -> Any:
        targets[number][:rows] = sources[number]  # in place, as nothing else has the target
        return targets[number]

    def rate(work: Callable[[int], Any], factor: int) -> float:
        rates = []
        for _ in range(WARM_UP + trials):
            start, done = clock(), []
            for number, stream in enumerate(streams):
                with mx.stream(stream):
                    done.append(work(number))
            mx.eval(done)
            rates.append(factor * sum(source.nbytes for source in sources) / (clock() - start))
        return statistics.median(rates[WARM_UP:])

    return rate(copy, 2), rate(lambda number: sources[number].max(), 1)


# --- whether the machine was at rest


def thermal_pressure() -> str | None:
    """Return macOS's own word for how far it throttles; None elsewhere."""
    if sys.platform != "darwin":
        return None
    return read_pressure(
        output_of(["notifyutil", "-g", "com.apple.system.thermalpressurelevel"]) or ""
    )


def read_pressure(output: str) -> str | None:
    """Read `com.apple.system.thermalpressurelevel 1` as "moderate"."""
    words = output.split()
    if not words or not words[-1].isdigit() or int(words[-1]) >= len(THERMAL_LEVELS):
        return None
    return THERMAL_LEVELS[int(words[-1])]


def throttle_count() -> int | None:
    """Return how often Linux has throttled this processor since boot; None if it is unknown."""
    cores = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [text_of(file).strip() for file in cores]
    return sum(map(int, counts)) if counts and all(map(str.isdigit, counts)) else None


def rest_notes(before: Machine, after: str | None, throttled: int | None) -> Iterator[str]:
    """Say what disturbed a run, from the facts before it and the thermal state after it."""
    if load := busy(before):
        yield f"the machine was busy before the run: {load}"
    for when, pressure in (("before", before.thermal_pressure), ("after", after)):
        if pressure not in (None, "nominal"):
            yield f"the machine was hot {when} the run: thermal pressure {pressure}"
    if throttled:
        yield f"the processor throttled {throttled} times during the run"


def with_trial_notes(document: Document) -> Document:
    """Add notes to each row about trials that make its rates doubtful."""
    rows = [replace(row, notes=(*row.notes, *trial_notes(row))) for row in document.rows]
    return replace(document, rows=tuple(rows))


def without_home(document: Document) -> Document:
    """Shorten the user's folder in notes, which may quote an error: results are shared."""
    home = os.path.expanduser("~").rstrip("/")

    def shorter(notes: Sequence[str]) -> tuple[str, ...]:
        return tuple(note.replace(f"{home}/", "~/") if home else note for note in notes)

    rows = tuple(replace(row, notes=shorter(row.notes)) for row in document.rows)
    return replace(document, rows=rows, notes=shorter(document.notes))


def trial_notes(row: Row) -> Iterator[str]:
    """Yield notes on trials that are far apart, or drift from the first to the last."""
    for name in ("prefill", "decode"):
        if (metric := row.metrics.get(f"{name}_tokens_per_second")) is None:
            continue
        if metric.spread > SPREAD:
            yield f"{name}: quartiles {metric.spread:.0%} apart"
        change, sure = drift(metric.values)
        if sure and abs(change) > DRIFT:
            yield f"{name}: {change:+.0%} from the first trial to the last"


def drift(values: Sequence[float]) -> tuple[float, bool]:
    """Return the change over all trials as a share of the median, and whether it is certain.

    It is certain if nearly every pair of trials agrees on the sign. The slope is that of Theil and
    Sen, the median over all pairs, which one outlier does not change.
    """
    if len(values) < 5:
        return 0.0, False
    pairs = [(b - a, j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i]
    slope = statistics.median(rise / run for rise, run in pairs)
    tau = sum((rise > 0) - (rise < 0) for rise, _ in pairs) / len(pairs)
    middle = statistics.median(values)
    return (slope * (len(values) - 1) / abs(middle) if middle else 0.0), abs(tau) >= 0.8
