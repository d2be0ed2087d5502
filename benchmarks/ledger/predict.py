"""Tokens a second that a chip should reach, for those who do not own it: a model, marked as one,
never a measurement.

    seconds a token = kernels x latency + bytes / (bandwidth x efficiency)

- kernels: counted on the graph of one token of this engine (ledger.py)
- latency: 2.5 us. A chain of 3,200 tiny dependent kernels took 7.7 to 8.8 ms on an M3 Ultra
  (https://github.com/ml-explore/mlx/issues/4521). It is taken for every chip, though an M1 Ultra
  seems to need more (KNOWN_ERRORS)
- bytes: every weight once, keys and values of the context (roofline.py)
- bandwidth: nominal (chips.py)
- efficiency: the share of nominal bandwidth that decoding reaches on Metal, by tier of chip: the median over the rows of
  one table of llama.cpp's, which has nothing of this engine in it (EVIDENCE)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.hardware.chips import Chip, find
from openelm_mlx.benchmarks.hardware.roofline import bytes_per_token
from openelm_mlx.errors import BenchmarkError, ConfigError
from openelm_mlx.model.config import OpenELMConfig

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
ASSUMED = (
    "predicted, not measured: kernels x 2.5 us + bytes / (nominal bandwidth x efficiency)",
    "kernels counted on the graph; 2.5 us each as on an M3 Ultra (ml-explore/mlx issue 4521), taken for every chip",
    "efficiency by tier of chip, from llama.cpp's table for Llama 7B in F16 (ggml-org/llama.cpp discussion 4167)",
    "batch of one, greedy, no speculation; kernels and memory traffic do not overlap; the host keeps up; no throttling",
)

# The formula against rates of other MLX engines, with the kernels and bytes of the models they ran:
# https://github.com/lablup/mlxcel/tree/main/benchmarks pylm_m1ultra_2026-09-06.csv and
# pylm_m5max_2026-09-06.csv (mlx-lm 0.31.3), metal_m1ultra_2026-09-08.csv (mlxcel 0.7.0-beta.1);
# https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/BENCHMARKS.md and .../mlx-lm/pull/1569;
# https://github.com/waybarrios/vllm-mlx/issues/531.
KNOWN_ERRORS = (
    "this engine has not been measured on any chip of the table; rates of other MLX engines are public",
    "against 33 of those the formula is off by a median of 13 %: -20 to +4 % on M3 to M5, -10 to +97 % "
    "on an M1 Ultra, small 4-bit models worst (sources: benchmarks/ledger/predict.py)",
    "OpenELM 1.1b-instruct in 4 bits, M1 Ultra: mlxcel reached 279 tokens/s "
    "(https://github.com/lablup/mlxcel/tree/main/benchmarks); predicted for this engine are 464",
)


@dataclass(frozen=True)
class Prediction:
    """A figure of the model, with what it is made of."""

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
    """Expected decode rate of this engine on a chip. `quantization` is config.json's, in mlx-lm's
    form.

    Raises `BenchmarkError` for a chip, dtype or quantization it does not know.
    """
    chip = find(chip) if isinstance(chip, str) else chip
    parts = bytes_per_token(config, dtype, quantization, context)
    kernels = kernels_per_token(config, dtype, frozen(quantization), context)
    share = efficiency(chip.tier)
    seconds = kernels * LATENCY + sum(parts.values()) / (chip.bandwidth * share)
    return Prediction(chip, 1 / seconds, kernels, parts, share)


def efficiency(tier: str) -> float:
    """Median over EVIDENCE of bytes a second reached over nominal, for chips of this tier."""
    shares = [
        rate * LLAMA_7B_F16 / find(short, cores).bandwidth
        for (short, cores), rate in EVIDENCE.items()
        if find(short, cores).tier == tier
    ]
    if not shares:
        raise BenchmarkError(f"no evidence for chips of tier {tier!r}")
    return statistics.median(shares)


def frozen(quantization: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """A quantization as a key of a cache."""
    if not quantization:
        return None
    return tuple(
        (k, frozen(v) if isinstance(v, Mapping) else v)
        for k, v in sorted(quantization.items(), key=str)
    )


@lru_cache(maxsize=64)
def kernels_per_token(
    config: OpenELMConfig, dtype: str, quantization: tuple[Any, ...] | None, context: int
) -> int:
    """Counted on the graph of one token. MLX is needed for this, a GPU is not."""
    from openelm_mlx.benchmarks.ledger.count import ledger
    from openelm_mlx.benchmarks.ledger.trace import Form, trace_ours

    form = Form(
        dtype,
        None
        if quantization is None
        else {k: dict(v) if isinstance(v, tuple) else v for k, v in quantization},
    )
    return ledger(trace_ours(config, form, context)).kernels


@dataclass(frozen=True)
class Error:
    """Where the model can be checked: a measured result on a chip of the table."""

    chip: Chip
    model: str
    dtype: str
    bits: int | None
    measured: float
    predicted: float

    @property
    def relative(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def errors(results: Iterable[Path]) -> list[Error]:
    """The model against every plain decode rate of this engine that was measured on a chip of the
    table.

    Files that are no results, and machines that are not in the table, are passed over.
    """
    from openelm_mlx.benchmarks.results.document import load

    found = []
    for path in results:
        try:
            document = load(path)
            chip = find(str(document.machine.get("chip", "")), document.machine.get("gpu_cores"))
        except BenchmarkError:
            continue
        for row in document.rows:
            case, metric = row.case, row.metrics.get("decode_tokens_per_second")
            plain = (
                case.engine == "openelm-mlx"
                and case.batch_size == 1
                and case.cache == "plain"
                and not case.speculation
            )
            if metric is None or not plain:
                continue
            try:
                config = OpenELMConfig.from_name(case.model.removeprefix("random "))
            except ConfigError:
                continue
            quantization = None if case.bits is None else {"bits": case.bits, "group_size": 64}
            context = case.prompt_tokens + case.generation_tokens // 2
            expected = predict(chip, config, case.dtype, quantization, context).tokens_per_second
            found.append(Error(chip, case.model, case.dtype, case.bits, metric.median, expected))
    return found
