"""A result document with something of everything. Its figures are made up: no machine ever measured
them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from openelm_mlx.benchmarks.results.document import (
    DECODE,
    Case,
    Document,
    Machine,
    Metric,
    Ratio,
    Row,
    completed,
)

CASE = Case("openelm-mlx", "openelm-tiny", "float32", 8, 9.02, 64, 64)
SLOWER = Metric.of([50, 51, 49, 50.5, 49.5], "tokens/s")
RATE = Metric.of([100, 104, 98, 101, 99], "tokens/s")
NASTY = "</title><img src=x onerror=alert(1)>$x^2$&'\""
MACHINE = {
    "chip": "Made-up chip",
    "cores": 2,
    "memory_bytes": 24 * 2**30,
    "system": "Linux",
    "system_version": "6.1",
    "backend": "cpu",
    "blas": "MLX's own",
    "load_average": 0.3,
    "copy_bytes_per_second": 12.5e9,
}


def metric(median: float, unit: str = "tokens/s", spread: float = 0.03) -> Metric:
    return Metric.of([median * (1 + spread * step) for step in (-1, -0.5, 0, 0.5, 1)], unit)


def row(
    model="openelm-tiny", bits=None, prompt=64, decode=100.0, engine="openelm-mlx", kl=None, **more
) -> Row:
    weight = more.pop("bits_per_weight", 32.0 if bits is None else bits + 0.5)
    prefill, spread = more.pop("prefill", 9 * decode), 0.03 if engine == "openelm-mlx" else 0.01
    agrees, notes = more.pop("agrees", None), more.pop("notes", ())
    metrics = {
        "decode_tokens_per_second": metric(decode, spread=spread),
        "prefill_tokens_per_second": metric(prefill, spread=spread),
        "time_to_first_token_seconds": metric(prompt / prefill, "s", spread),
        "peak_memory_bytes": metric(3.1e6 * weight, "bytes", 0.0),
    }
    if kl is not None:
        metrics["kl_mean"] = metric(kl, "nats", 0.0)
    read = None
    if engine == "openelm-mlx":
        read = {
            "embedding": 131e3 * weight,
            "attention": 160e3 * weight,
            "ffn": 620e3 * weight,
            "norms": 20e3,
        }
        read |= {"scales": 900e3 * 4 / 8 if bits else 0.0, "kv": 700.0 * prompt}
        if model != "openelm-tiny":
            read = {part: 150 * size for part, size in read.items()}
    case = Case(engine, model, "float32", bits, weight, prompt, 64, **more)
    return Row(case, metrics, read, agrees=agrees, notes=notes)


def small_document(**changes: Any) -> Document:
    """Return a row of ours, a peer's that is half as fast, and a peer's that was not timed."""
    memory = Metric.of([1.5e7] * 5, "bytes")
    rows = (
        Row(CASE, {DECODE: RATE, "peak_memory_bytes": memory}, {"embedding": 10.0, "kv": 5.5}),
        Row(replace(CASE, engine="mlx-lm"), {DECODE: SLOWER}, agrees=True),
        Row(
            replace(CASE, engine="torch"),
            agrees=False,
            parts_at=7,
            notes=("not timed: token 7 is 3, in openelm-mlx 4",),
        ),
    )
    plain = Document(
        "2026-01-01T00:00:00Z",
        "openelm benchmark --peers mlx-lm,torch",
        rows,
        "quick",
        machine=Machine(
            chip="A chip",
            cores=2,
            memory_bytes=16 * 2**30,
            system="Linux",
            backend="cpu",
            blas="MLX's own",
            copy_bytes_per_second=3100.0,
        ),
        versions={"mlx": "0.32.4"},
        notes=("a note",),
        ratios=(Ratio(DECODE, 0, 1),),
    )
    return replace(completed(plain), **changes)


def rich_document() -> Document:
    rows = [
        row(decode=210, kl=0.0),
        row(bits=8, decode=480, kl=2e-4),
        row(bits=4, decode=610, kl=3.1e-2),
        row(bits=3, decode=640, kl=2.2e-1, notes=("decode: quartiles 14 % of the median apart",)),
        *(row(bits=4, prompt=prompt, decode=610 - prompt / 4) for prompt in (256, 512, 960)),
        row(decode=150, prefill=2300, engine="mlx-lm", agrees=True),
        row(bits=4, decode=560, prefill=5500, engine="mlx-lm", agrees=True),
        Row(
            Case("torch", "openelm-tiny", "float32", 4, 4.5, 64, 64),
            agrees=False,
            parts_at=17,
            notes=("17: 5, ours 9",),
        ),
        row(bits=4, decode=2400, batch_size=8),
        row(bits=4, decode=590, cache="quantized 8-bit"),
        row(bits=4, decode=900, speculation="prompt-lookup"),
        row("1.1b", bits=4, decode=11, prompt=32, random_weights=True),
        row("1.1b", decode=2.4, prompt=32, random_weights=True),
    ]
    ratios = (
        Ratio(DECODE, 0, 7),
        Ratio(DECODE, 2, 8),
        Ratio("time_to_first_token_seconds", 0, 7),
        Ratio("prefill_tokens_per_second", 2, 8),
    )
    return completed(
        Document(
            "2026-01-02T03:04:05Z",
            "openelm benchmark --suite quick",
            tuple(rows),
            "quick",
            False,
            Machine(**MACHINE),
            {"openelm-mlx": "0.1.0", "mlx": "0.32.4", "python": "3.11"},
            notes=("the machine was busy",),
            ratios=ratios,
        )
    )


def startup_document() -> Document:
    """Two engines, each in new processes and warm."""
    seconds = {"openelm-mlx": (0.21, 0.011, 0.004), "mlx-lm": (1.4, 0.019, None)}
    rows = []
    for engine, (new, warm, reused) in seconds.items():
        case = Case(engine, "openelm-tiny", "float32", 8, 8.5, 64, 64)
        times = {"time_to_first_token_seconds": metric(warm, "s")}
        if reused:
            times["time_to_first_token_reused_seconds"] = metric(reused, "s")
        started = {"startup_seconds": metric(new, "s")}
        rows += [Row(case, times), Row(Case(*(*list(vars(case).values())[:6], 1)), started)]
    return Document(
        "2026-01-02T03:04:05Z",
        "openelm benchmark --suite startup",
        tuple(rows),
        "startup",
        machine=Machine(**MACHINE),
    )


def sparse_document() -> Document:
    """One row, no bandwidth, a hostile name."""
    case = Case("openelm-mlx", NASTY, "bfloat16", None, None, 8, 8)
    rows = (Row(case, {"decode_tokens_per_second": metric(3.0)}, notes=(NASTY,)),)
    return Document(
        "2026-01-02T03:04:05Z",
        f"openelm benchmark {NASTY}",
        rows,
        None,
        True,
        Machine(chip=NASTY),
        {},
        notes=(NASTY,),
    )
