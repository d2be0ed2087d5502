"""Predict tokens a second on chips that nobody here owns: a formula, never a measurement.

    python -m openelm_mlx.benchmarks.ledger.predict
    openelm benchmark --predict m3-max

    seconds a token = kernels x latency + bytes / (bandwidth x efficiency)

- kernels: counted on the graph of one token of this engine (count.py)
- bytes: every weight once, keys and values of the context (hardware.py)
- bandwidth: nominal (hardware.py)
- latency, efficiency and the band: from published rates of other MLX engines (speeds.py)

The command above prints these rates beside what the formula gives when it has not seen them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from openelm_mlx.benchmarks.hardware import CHIPS, Chip, bytes_per_token, find_chip
from openelm_mlx.benchmarks.ledger.published import RATES
from openelm_mlx.benchmarks.ledger.speeds import (
    LeftOut,
    Speed,
    learned,
    leave_out,
    speed_of,
    summary,
)
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, normal_name
from openelm_mlx.quantization import MLX_GROUP_SIZE

WEIGHTS: dict[str, dict[str, int] | None] = {
    "bfloat16": None,
    "8 bits": {"bits": 8, "group_size": MLX_GROUP_SIZE},
    "4 bits": {"bits": 4, "group_size": MLX_GROUP_SIZE},
}
ASSUMED = (
    "predicted, not measured: kernels x latency + bytes / (nominal bandwidth x efficiency)",
    "this engine's kernels, counted on its graph; latency and efficiency from published rates of "
    "other MLX engines (sources: benchmarks/ledger/published.py)",
    "a kernel of this engine's own is assumed to take as long as one of MLX's",
    "the rules of the band were fixed before those rates were compared "
    "(benchmarks/ledger/speeds.py)",
    "batch of one, greedy, no speculation; the host keeps up; no throttling",
)

FIGURES = ["predicted", "tokens_per_second", "low", "high", "kernels", "kernel_seconds"]
FIGURES += ["bytes_per_token", "memory_seconds"]


@dataclass(frozen=True)
class Prediction:
    """A figure of the formula, with its band and what it is made of."""

    chip: Chip
    speed: Speed
    kernels: int
    bytes_per_token: dict[str, float]
    assumed: tuple[str, ...] = ASSUMED
    predicted: bool = True  # wherever this goes, it goes with this mark

    @property
    def parts(self) -> tuple[float, float]:
        total = sum(self.bytes_per_token.values())
        return self.speed.seconds(self.kernels, total, self.chip.bandwidth)

    @property
    def kernel_seconds(self) -> float:
        return self.parts[0]

    @property
    def memory_seconds(self) -> float:
        return self.parts[1]

    @property
    def tokens_per_second(self) -> float:
        return 1 / sum(self.parts)

    @property
    def low(self) -> float:
        return self.tokens_per_second / self.speed.factor(*self.parts)

    @property
    def high(self) -> float:
        return self.tokens_per_second * self.speed.factor(*self.parts)


def predict(
    chip: Chip | str,
    config: OpenELMConfig,
    dtype: str = "bfloat16",
    quantization: Mapping[str, Any] | None = None,
    context: int = 64,
    documents: Sequence[Any] = (),
) -> Prediction:
    """Return the expected decode rate of this engine on a chip.

    `quantization` is config.json's, in mlx-lm's format. What the result `documents` say of the
    chip's speed is used. Raises `BenchmarkError` for a chip, dtype or quantization that is not
    known.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    parts = bytes_per_token(config, dtype, quantization, context)
    kernels = kernels_per_token(config, dtype, json.dumps(quantization), context)
    return Prediction(chip, learned(speed_of(chip), chip, documents), kernels, parts)


@lru_cache(maxsize=64)
def kernels_per_token(config: OpenELMConfig, dtype: str, quantization: str, context: int) -> int:
    """Count on the graph of one token; `quantization` is JSON. MLX is needed, a GPU is not."""
    from openelm_mlx.benchmarks.ledger.count import ledger
    from openelm_mlx.benchmarks.ledger.steps import WeightSpec, trace_ours

    spec = WeightSpec(dtype, json.loads(quantization))
    return ledger(trace_ours(config, spec, context)).kernels


@dataclass(frozen=True)
class Check:
    """A measured rate on a chip of the table, beside what is predicted for it."""

    chip: Chip
    model: str
    measured: float
    predicted: Prediction

    def __str__(self) -> str:
        expected = self.predicted
        return (
            f"checked on {self.chip.name}, {self.model}: measured {self.measured:.0f}, predicted "
            f"{expected.tokens_per_second:.0f} ({expected.low:.0f} to {expected.high:.0f})"
        )


def checks(documents: Iterable[Any]) -> list[Check]:
    """Set predictions against every plain decode rate of this engine in result documents.

    Machines that are not in the table of chips are passed over.
    """
    found = []
    for document in documents:
        with suppress(BenchmarkError):  # its chip is not in the table
            chip = find_chip(document.machine.chip or "", document.machine.gpu_cores)
            found += [check for row in document.rows for check in check_of(row, chip)]
    return found


def check_of(row: Any, chip: Chip) -> Iterator[Check]:
    """Yield the check of a row; none if it is not a plain rate of a published model."""
    case, metric = row.case, row.metrics.get("decode_tokens_per_second")
    plain = case.batch_size == 1 and case.cache == "plain" and not case.speculation
    size = normal_name(case.model)
    if metric is None or not plain or case.engine != "openelm-mlx" or size not in PUBLISHED:
        return
    quantization = None if case.bits is None else {"bits": case.bits, "group_size": MLX_GROUP_SIZE}
    context = case.prompt_tokens + case.generation_tokens // 2
    expected = predict(chip, OpenELMConfig.from_name(size), case.dtype, quantization, context)
    yield Check(chip, case.model, metric.median, expected)


def show(
    chip: str | Chip,
    sizes: Sequence[str] = (),
    documents: Iterable[Any] = (),
    as_json: bool = False,
) -> None:
    """Print the predictions for a chip, or the chips themselves for `list`.

    They are checked against result `documents`. Raises `BenchmarkError`, `ConfigError`.
    """
    if chip == "list":
        show_chips(as_json)
        return
    documents = list(documents)
    rows = predictions(chip, sizes, documents)
    first = rows[0][2]
    if as_json:
        listed = [
            {"model": size, "weights": weights} | {name: getattr(p, name) for name in FIGURES}
            for size, weights, p in rows
        ]
        facts = {"predicted": True, "chip": first.chip.name, "speed": asdict(first.speed)}
        facts |= {"assumed": ASSUMED, "known_errors": [summary(left_out())], "rows": listed}
        print(json.dumps(facts))
        return
    cells = [
        (
            size,
            weights,
            f"{p.tokens_per_second:.0f}",
            f"{p.low:.0f}-{p.high:.0f}",
            str(p.kernels),
            f"{1e3 * p.kernel_seconds:.2f}",
            f"{sum(p.bytes_per_token.values()) / 1e6:.0f}",
            f"{1e3 * p.memory_seconds:.2f}",
        )
        for size, weights, p in rows
    ]
    columns = ("model", "weights", "tokens/s", "band", "kernels", "their ms", "MB read", "their ms")
    draw(f"{first.chip}: predicted, not measured", columns, cells)
    checked = [str(check) for check in checks(documents)]
    if not checked:
        checked = ["this engine has not been measured on any chip of the table"]
    here = (
        f"{1e6 * first.speed.latency:.1f} us a kernel and {first.speed.efficiency:.0%} of nominal "
        f"bandwidth here, {first.speed.basis}; bandwidth from {first.chip.source}"
    )
    print("Decoding, one sequence, at 64 tokens of context.")
    for line in (*ASSUMED, here, *checked, summary(left_out())):
        print(f"- {line}")


def draw(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column of words and the others of figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 80
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def left_out() -> list[LeftOut]:
    return [leave_out(rate) for rate in RATES]


def show_left_out(as_json: bool = False) -> None:
    """Print published rates beside what the formula gives without that model on that chip."""
    found = left_out()
    if as_json:
        rows = [
            asdict(row.rate)
            | {"kernels": row.rate.kernels, "bytes_read": row.rate.bytes_read}
            | {"predicted": row.predicted, "factor": row.factor, "outside": row.outside}
            for row in found
        ]
        print(json.dumps({"rows": rows, "summary": summary(found)}))
        return
    cells = [
        (
            f"{row.rate.chip_name} {row.rate.model}",
            str(row.rate.bits),
            f"{row.rate.tokens_per_second:.0f}",
            f"{row.predicted:.0f}",
            f"{row.error:+.0%}",
            f"{row.predicted / row.factor:.0f}-{row.predicted * row.factor:.0f}",
            "out" * row.outside,  # of its band
        )
        for row in found
    ]
    columns = ("published rate", "bits", "measured", "formula", "off by", "band", "")
    draw("Published rates and the formula, left out model by model", columns, cells)
    print(f"- {summary(found)}")
    for source in dict.fromkeys(rate.source for rate in RATES):
        print(f"- measured by others: {source}")


def predictions(
    chip: str | Chip, sizes: Sequence[str] = (), documents: Sequence[Any] = ()
) -> list[tuple[str, str, Prediction]]:
    """Return (size, weights, prediction) for the published sizes, or those asked for.

    Raises `BenchmarkError`, `ConfigError`.
    """
    found = find_chip(chip) if isinstance(chip, str) else chip
    configs = {size: OpenELMConfig.from_name(size) for size in sizes or PUBLISHED}
    return [
        (size, weights, predict(found, config, "bfloat16", quantization, documents=documents))
        for size, config in configs.items()
        for weights, quantization in WEIGHTS.items()
    ]


def show_chips(as_json: bool) -> None:
    """Print the table of chips, each with the number of its source."""
    if as_json:
        print(json.dumps([{"short": chip.short, **asdict(chip)} for chip in CHIPS]))
        return
    sources = list(dict.fromkeys(chip.source for chip in CHIPS))
    sold = Counter(chip.short for chip in CHIPS)
    for chip in CHIPS:
        name = f"{chip.short}-{chip.gpu_cores[-1]}" if sold[chip.short] > 1 else chip.short
        cores, number = " or ".join(map(str, chip.gpu_cores)), sources.index(chip.source) + 1
        print(f"{name:<12}{cores:>9} GPU cores{chip.bandwidth_gb:>7g} GB/s  [{number}]")
    print()
    for number, source in enumerate(sources, start=1):
        print(f"[{number}] {source}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openelm_mlx.benchmarks.ledger.predict",
        description="Hold the formula of predictions against published rates of other engines.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    show_left_out(parser.parse_args(arguments).json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
