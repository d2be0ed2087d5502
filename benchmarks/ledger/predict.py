"""Predict tokens a second on chips that nobody here owns: a formula, never a measurement.

    seconds a token = kernels x latency + bytes / (bandwidth x efficiency)

- kernels: counted on the graph of one token of this engine (count.py)
- latency: 2.5 us. A chain of 3,200 tiny dependent kernels took 7.7 to 8.8 ms on an M3 Ultra
  (https://github.com/ml-explore/mlx/issues/4521). It is taken for every chip, though an M1 Ultra
  seems to need more (KNOWN_ERRORS)
- bytes: every weight once, keys and values of the context (hardware.py)
- bandwidth: nominal (hardware.py)
- efficiency: the share of nominal bandwidth that decoding reaches on Metal, by tier of chip: the
  median over the rows of a table of llama.cpp's, which has nothing of this engine in it (EVIDENCE)
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

from openelm_mlx.benchmarks.hardware import CHIPS, Chip, bytes_per_token, find_chip
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, normal_name
from openelm_mlx.quantization import MLX_GROUP_SIZE

LATENCY = 2.5e-6  # seconds a kernel; see above
LLAMA_7B_F16 = 12.55 * 2**30  # bytes of the model of EVIDENCE, as llama-bench prints it
# Llama 7B F16 text generation, tokens a second:
# https://github.com/ggml-org/llama.cpp/discussions/4167, its table as in
# https://gist.github.com/jakehemmerle/3203efa01ac455c2a8a26669eb465af2
EVIDENCE: dict[tuple[str, int], float] = {
    ("m1-pro", 14): 12.75,
    ("m1-max", 24): 22.55,
    ("m1-max", 32): 23.03,
    ("m1-ultra", 48): 33.92,
    ("m1-ultra", 64): 37.01,
    ("m2", 10): 6.72,
    ("m2-pro", 16): 12.47,
    ("m2-pro", 19): 13.06,
    ("m2-max", 30): 24.16,
    ("m2-max", 38): 24.65,
    ("m2-ultra", 60): 39.86,
    ("m2-ultra", 76): 41.02,
    ("m3-pro", 18): 9.89,
    ("m3-max", 30): 19.54,
    ("m3-max", 40): 25.09,
}
WEIGHTS: dict[str, dict[str, int] | None] = {
    "bfloat16": None,
    "8 bits": {"bits": 8, "group_size": MLX_GROUP_SIZE},
    "4 bits": {"bits": 4, "group_size": MLX_GROUP_SIZE},
}
ASSUMED = (
    "predicted, not measured: kernels x 2.5 us + bytes / (nominal bandwidth x efficiency)",
    "kernels counted on the graph; 2.5 us each as on an M3 Ultra (ml-explore/mlx issue 4521), "
    "taken for every chip",
    "efficiency by tier of chip, from llama.cpp's table for Llama 7B in F16 (ggml-org/llama.cpp "
    "discussion 4167)",
    "batch of one, greedy, no speculation; kernels and memory traffic do not overlap; the host "
    "keeps up; no throttling",
)

FIGURES = ["predicted", "tokens_per_second", "kernels", "kernel_seconds", "bytes_per_token"]
FIGURES += ["memory_seconds", "efficiency"]
# The formula against rates of other MLX engines, with the kernels and bytes of the models they ran:
# https://github.com/lablup/mlxcel/tree/main/benchmarks pylm_m1ultra_2026-09-06.csv and
# pylm_m5max_2026-09-06.csv (mlx-lm 0.31.3), metal_m1ultra_2026-09-08.csv (mlxcel 0.7.0-beta.1);
# https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/BENCHMARKS.md and .../mlx-lm/pull/1569;
# https://github.com/waybarrios/vllm-mlx/issues/531.
KNOWN_ERRORS = (
    "this engine has not been measured on any chip of the table; rates of other MLX engines are "
    "public",
    "against 33 of those the formula is off by a median of 13 %: -20 to +4 % on M3 to M5, -10 to "
    "+97 % on an M1 Ultra, small 4-bit models worst (sources: benchmarks/ledger/predict.py)",
    "OpenELM 1.1b-instruct in 4 bits, M1 Ultra: mlxcel reached 279 tokens/s "
    "(https://github.com/lablup/mlxcel/tree/main/benchmarks); predicted for this engine are 464",
)


@dataclass(frozen=True)
class Prediction:
    """A figure of the formula, with what it is made of."""

    chip: Chip
    tokens_per_second: float
    kernels: int
    bytes_per_token: dict[str, float]
    efficiency: float
    assumed: tuple[str, ...] = ASSUMED
    predicted: bool = True  # wherever this goes, it goes with this mark

    @property
    def kernel_seconds(self) -> float:
        return self.kernels * LATENCY

    @property
    def memory_seconds(self) -> float:
        return sum(self.bytes_per_token.values()) / (self.chip.bandwidth * self.efficiency)


def predict(
    chip: Chip | str,
    config: OpenELMConfig,
    dtype: str = "bfloat16",
    quantization: Mapping[str, Any] | None = None,
    context: int = 64,
) -> Prediction:
    """Return the expected decode rate of this engine on a chip.

    `quantization` is config.json's, in mlx-lm's format. Raises `BenchmarkError` for a chip, dtype
    or quantization that is not known.
    """
    chip = find_chip(chip) if isinstance(chip, str) else chip
    parts = bytes_per_token(config, dtype, quantization, context)
    kernels = kernels_per_token(config, dtype, json.dumps(quantization), context)
    share = efficiency(chip.tier)
    seconds = kernels * LATENCY + sum(parts.values()) / (chip.bandwidth * share)
    return Prediction(chip, 1 / seconds, kernels, parts, share)


def efficiency(tier: str) -> float:
    """Return the median over EVIDENCE of bytes a second reached over nominal, for this tier."""
    chips = {(short, cores): find_chip(short, cores) for short, cores in EVIDENCE}
    shares = [
        EVIDENCE[key] * LLAMA_7B_F16 / chip.bandwidth
        for key, chip in chips.items()
        if chip.tier == tier
    ]
    if not shares:
        raise BenchmarkError(f"no evidence for chips of tier {tier!r}")
    return median(shares)


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
    predicted: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


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
    yield Check(chip, case.model, metric.median, expected.tokens_per_second)


def show(
    chip: str, sizes: Sequence[str] = (), documents: Iterable[Any] = (), as_json: bool = False
) -> None:
    """Print the predictions for a chip, or the chips themselves for `list`.

    They are checked against result `documents`. Raises `BenchmarkError`, `ConfigError`.
    """
    if chip == "list":
        show_chips(as_json)
        return
    rows = predictions(chip, sizes)
    first = rows[0][2]
    if as_json:
        listed = [
            {"model": size, "weights": weights} | {name: getattr(p, name) for name in FIGURES}
            for size, weights, p in rows
        ]
        facts = {"predicted": True, "chip": first.chip.name, "assumed": ASSUMED}
        print(json.dumps({**facts, "known_errors": KNOWN_ERRORS, "rows": listed}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80, highlight=False)
    table = Table(title=f"{first.chip}: predicted, not measured", title_justify="left")
    table.add_column("model")
    for column in ("weights", "tokens/s", "kernels", "their ms", "MB read", "their ms"):
        table.add_column(column, justify="right")
    for size, weights, p in rows:
        launched = str(p.kernels), f"{1e3 * p.kernel_seconds:.2f}"
        read = f"{sum(p.bytes_per_token.values()) / 1e6:.0f}", f"{1e3 * p.memory_seconds:.2f}"
        table.add_row(size, weights, f"{p.tokens_per_second:.0f}", *launched, *read)
    console.print(table)
    checked = [
        f"checked on {check.chip.name}, {check.model}: "
        f"measured {check.measured:.0f}, predicted {check.predicted:.0f} ({check.error:+.0%})"
        for check in checks(documents)
    ]
    here = f"efficiency here {first.efficiency:.2f}; bandwidth from {first.chip.source}"
    known = KNOWN_ERRORS[bool(checked) :]  # the first says that nothing was checked
    print("Decoding, one sequence, at 64 tokens of context.")
    for line in (*ASSUMED, here, *checked, *known):
        print(f"- {line}")


def predictions(chip: str, sizes: Sequence[str] = ()) -> list[tuple[str, str, Prediction]]:
    """Return (size, weights, prediction) for the published sizes, or those asked for.

    Raises `BenchmarkError`, `ConfigError`.
    """
    found = find_chip(chip)
    configs = {size: OpenELMConfig.from_name(size) for size in sizes or PUBLISHED}
    return [
        (size, weights, predict(found, config, "bfloat16", quantization))
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
