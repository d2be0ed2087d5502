"""The latency of a kernel on a chip, and the share of its bandwidth that decoding reaches there.

    seconds a token = kernels x latency + bytes / (bandwidth x efficiency)

Both are fitted to published rates (published.py) by least squares of predicted / measured - 1, chip
by chip, where three models or more were measured. Other chips get them by generation: on the
geometric line between the oldest and the newest fitted generation, and beyond it those of its end.

What `openelm doctor --full` has measured on a chip without a fit of its own replaces both: the
seconds of a kernel that waits for the one before it, and the bytes a second of a matrix in bfloat16
times a vector. Nobody has sent such a file yet.

A prediction has a band, from predicted / factor to predicted x factor. Its rules, and all constants
in them, were written down before any residual was computed, and nothing was changed afterwards:

- on a fitted chip, the 95 % interval of a new rate: factor - 1 = T x spread x sqrt(1 + leverage);
- on any other, three logarithms, squares added: T x the larger spread of the two fits; one
  generation more or less of latency, by the kernels' share of the time; and a factor of 1.25 in
  efficiency by the memory's share: tiers of chips lie as far from their mean in llama.cpp's rates
  of Llama 7B in F16 (0.65 to 0.90 of nominal, ggml-org/llama.cpp discussion 4167). The last is not
  needed where the efficiency was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from openelm_mlx.benchmarks.hardware import Chip, find_chip
from openelm_mlx.benchmarks.ledger.published import RATES, Rate
from openelm_mlx.errors import BenchmarkError

T = 2.2  # Student's, 95 %, for the 10 to 12 degrees of freedom of the fits
MODELS = 3  # that a chip needs for a fit of its own
TIERS = 1.25
LEAST = 1e-9  # what a file says below it, or far above what can be, was not measured


@dataclass(frozen=True)
class Speed:
    """A chip's seconds a kernel and its share of nominal bandwidth, with what the band needs."""

    latency: float
    efficiency: float
    spread: float  # standard deviation of predicted / measured - 1
    basis: str  # where the figures come from, in words
    squares: tuple[float, float, float] | None = None  # of a fit, sums of x x, x y, y y
    generation: float = 1.0  # the factor in latency that a generation makes, without a fit
    tiers: float = TIERS  # the factor by which the efficiency may be off, without a fit

    def seconds(self, kernels: int, bytes_read: float, bandwidth: float) -> tuple[float, float]:
        """Return the seconds of a token that kernels and memory take."""
        return kernels * self.latency, bytes_read / (bandwidth * self.efficiency)

    def factor(self, kernel_seconds: float, memory_seconds: float) -> float:
        """Return the factor of the band for a token that takes these seconds; see above."""
        launched = kernel_seconds / (kernel_seconds + memory_seconds)
        if self.squares is not None:
            xx, xy, yy = self.squares
            x, y = launched / self.latency, (1 - launched) * self.efficiency
            leverage = (yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy)
            return 1 + T * self.spread * math.sqrt(1 + leverage)
        generation, tiers = (
            launched * math.log(self.generation),
            (1 - launched) * math.log(self.tiers),
        )
        return math.exp(math.hypot(T * self.spread, generation, tiers))


def fit(rates: Sequence[Rate]) -> Speed:
    """Fit latency and efficiency to rates of one chip. Raises `BenchmarkError` below three."""
    models = {rate.model for rate in rates}
    if len(models) < MODELS:
        raise BenchmarkError(
            f"{len(models)} models were measured on one chip; a fit needs {MODELS}"
        )
    # predicted / measured of a row is x latency + y / efficiency
    rows = [
        (
            rate.kernels * rate.tokens_per_second,
            rate.bytes_read * rate.tokens_per_second / bandwidth,
        )
        for rate, bandwidth in ((rate, rate.chip.bandwidth) for rate in rates)
    ]
    xx, xy, yy = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    sx, sy = (sum(side) for side in zip(*rows, strict=True))
    latency, inverse = (
        (p * s - xy * o) / (xx * yy - xy**2) for p, s, o in ((yy, sx, sy), (xx, sy, sx))
    )
    left = sum((x * latency + y * inverse - 1) ** 2 for x, y in rows)
    basis = f"fitted to {len(rows)} published rates of {len(models)} models on {rates[0].chip.name}"
    return Speed(
        latency, 1 / inverse, math.sqrt(left / (len(rows) - 2)), basis, squares=(xx, xy, yy)
    )


def speed_of(chip: Chip, rates: Iterable[Rate] = RATES) -> Speed:
    """Return a chip's own fit, or what its generation has."""
    by_chip: dict[str, list[Rate]] = {}
    for rate in rates:
        by_chip.setdefault(rate.chip_name, []).append(rate)
    fits = {
        name: fit(rows)
        for name, rows in by_chip.items()
        if len({rate.model for rate in rows}) >= MODELS
    }
    if chip.short in fits:
        return fits[chip.short]
    ends = sorted((find_chip(name).generation, name) for name in fits)
    (first, old), (last, new) = ends[0], ends[-1]
    place = min(max((chip.generation - first) / (last - first), 0), 1)
    latency, efficiency = (
        getattr(fits[old], name) ** (1 - place) * getattr(fits[new], name) ** place
        for name in ("latency", "efficiency")
    )
    return Speed(
        latency,
        efficiency,
        max(fits[old].spread, fits[new].spread),
        f"by generation, from the fits of {find_chip(old).name} and {find_chip(new).name}",
        generation=(fits[old].latency / fits[new].latency) ** (1 / (last - first)),
    )


def learned(speed: Speed, chip: Chip, documents: Iterable[Any]) -> Speed:
    """Return the speed with what `openelm doctor --full` has found on this chip, by the median.

    Documents of other chips, of quick runs and of processors say nothing about it.
    """
    costs = [run.costs for document in documents if (run := full_run(document, chip)) is not None]
    latencies = [cost.dispatch_seconds or 0.0 for cost in costs]
    rates = [cost.gemv_bytes_per_second.get("bfloat16", 0.0) for cost in costs]
    latencies = [seconds for seconds in latencies if LEAST < seconds < 1]
    rates = [rate for rate in rates if LEAST < rate / chip.bandwidth < 2]
    if speed.squares is not None or not latencies or not rates:
        return speed
    basis = f"measured on {chip.name} by openelm doctor --full"
    share = median(rates) / chip.bandwidth
    return replace(speed, latency=median(latencies), efficiency=share, basis=basis, tiers=1.0)


def full_run(document: Any, chip: Chip) -> Any:
    """Return what `openelm doctor --full` says in a document of this chip's GPU, else None."""
    machine, run = document.machine, document.first_run
    if run is None or run.quick or machine.backend != "metal":
        return None
    try:
        return run if find_chip(machine.chip or "", machine.gpu_cores) == chip else None
    except BenchmarkError:
        return None


@dataclass(frozen=True)
class LeftOut:
    """A published rate, and what the formula gives without any rate of that model on that chip."""

    rate: Rate
    predicted: float
    factor: float
    fitted: bool  # the other models still give the chip a fit of its own

    @property
    def error(self) -> float:
        return self.predicted / self.rate.tokens_per_second - 1

    @property
    def outside(self) -> bool:
        return abs(math.log1p(self.error)) > math.log(self.factor)


def leave_out(rate: Rate, rates: Sequence[Rate] = RATES) -> LeftOut:
    """Predict a published rate from those of other models and other chips."""
    of_it = (rate.chip_name, rate.model)
    speed = speed_of(rate.chip, [row for row in rates if (row.chip_name, row.model) != of_it])
    parts = speed.seconds(rate.kernels, rate.bytes_read, rate.chip.bandwidth)
    return LeftOut(rate, 1 / sum(parts), speed.factor(*parts), speed.squares is not None)


def summary(found: Sequence[LeftOut]) -> str:
    """Say in one sentence how far the formula is off rates that it has not seen."""
    parts = []
    for fitted, chips in ((True, "chips with a fit"), (False, "others")):
        errors = [abs(row.error) for row in found if row.fitted is fitted]
        parts.append(f"{median(errors):.1%} on {chips} ({len(errors)}, at most {max(errors):.0%})")
    outside = sum(row.outside for row in found)
    return (
        f"left out model by model, published rates of other MLX engines are missed by a median of "
        f"{' and '.join(parts)}; outside the band: {outside} of {len(found)}"
    )
