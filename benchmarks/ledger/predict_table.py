"""`openelm benchmark --predict CHIP`: the table of predictions, always with the words "predicted,
not measured".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.hardware.chips import CHIPS, find
from openelm_mlx.benchmarks.ledger.predict import ASSUMED, KNOWN_ERRORS, Prediction, errors, predict
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig

FORMS: tuple[tuple[str, dict[str, int] | None], ...] = (
    ("bfloat16", None),
    ("8 bits", {"bits": 8, "group_size": 64}),
    ("4 bits", {"bits": 4, "group_size": 64}),
)


def predictions(
    chip: str, sizes: Sequence[str] = (), context: int = 64
) -> list[tuple[str, str, Prediction]]:
    """(size, form, prediction) for the published sizes, or those asked for. Raises
    `BenchmarkError`, `ConfigError`.
    """
    found = find(chip)
    return [
        (
            size,
            form,
            predict(found, OpenELMConfig.from_name(size), "bfloat16", quantization, context),
        )
        for size in sizes or PUBLISHED
        for form, quantization in FORMS
    ]


def show(
    chip: str, sizes: Sequence[str] = (), results: Path | None = None, as_json: bool = False
) -> None:
    """Print the table for a chip, or the chips themselves for `list`."""
    if chip == "list":
        show_chips(as_json)
        return
    rows = predictions(chip, sizes)
    checked = (
        errors(sorted(results.glob("*.json"))) if results is not None and results.is_dir() else []
    )
    if as_json:
        facts = {
            "predicted": True,
            "chip": rows[0][2].chip.name,
            "assumed": ASSUMED,
            "known_errors": KNOWN_ERRORS,
        }
        print(json.dumps({**facts, "rows": [as_dict(*row) for row in rows]}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80, highlight=False)
    first = rows[0][2]
    table = Table(title=f"{first.chip}: predicted, not measured", title_justify="left")
    table.add_column("model")
    for column in ("weights", "tokens/s", "kernels", "their ms", "MB read", "their ms"):
        table.add_column(column, justify="right")
    for size, form, p in rows:
        table.add_row(
            size,
            form,
            f"{p.tokens_per_second:.0f}",
            str(p.kernels),
            f"{1e3 * p.kernel_seconds:.2f}",
            f"{sum(p.bytes_per_token.values()) / 1e6:.0f}",
            f"{1e3 * p.memory_seconds:.2f}",
        )
    console.print(table)
    print("Decoding, one sequence, at 64 tokens of context.")
    for line in ASSUMED:
        print(f"- {line}")
    print(f"- efficiency here {first.efficiency:.2f}; bandwidth from {first.chip.source}")
    for error in checked:
        figures = f"measured {error.measured:.0f}, predicted {error.predicted:.0f} ({error.relative:+.0%})"
        print(f"- checked on {error.chip.name}, {error.model}: {figures}")
    for line in KNOWN_ERRORS[bool(checked) :]:  # the first says that nothing was checked
        print(f"- {line}")


def as_dict(size: str, form: str, p: Prediction) -> dict[str, Any]:
    return {
        "model": size,
        "weights": form,
        "predicted": True,
        "tokens_per_second": p.tokens_per_second,
        "kernels": p.kernels,
        "kernel_seconds": p.kernel_seconds,
        "bytes_per_token": p.bytes_per_token,
        "memory_seconds": p.memory_seconds,
        "efficiency": p.efficiency,
    }


def show_chips(as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "short": c.short,
                        "name": c.name,
                        "gpu_cores": c.gpu_cores,
                        "bandwidth_gb": c.bandwidth_gb,
                        "source": c.source,
                    }
                    for c in CHIPS
                ]
            )
        )
        return
    sources = list(dict.fromkeys(chip.source for chip in CHIPS))
    for chip in CHIPS:
        several = sum(other.short == chip.short for other in CHIPS) > 1
        name = f"{chip.short}-{chip.gpu_cores[-1]}" if several else chip.short
        cores = " or ".join(map(str, chip.gpu_cores))
        print(
            f"{name:<12}{cores:>9} GPU cores{chip.bandwidth_gb:>7g} GB/s  [{sources.index(chip.source) + 1}]"
        )
    print()
    for number, source in enumerate(sources, start=1):
        print(f"[{number}] {source}")
