"""Short names for the cases of a result document, as pictures and pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from openelm_mlx.benchmarks.results.document import METRICS, Case, Document, Row
from openelm_mlx.dtypes import DTYPES

OURS = "openelm-mlx"
T = TypeVar("T")


def unique(values: Iterable[T]) -> list[T]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def model_name(case: Case) -> str:
    return f"{case.model} (random weights)" if case.random_weights else case.model


def itemsize(case: Case) -> int:
    return DTYPES.get(case.dtype, DTYPES["float32"]).itemsize


def width(case: Case) -> str:
    """Of the weights: `4-bit`, `4.6 bits/weight` where they are mixed, else the type that
    everything is in.
    """
    if case.bits is not None:
        return f"{case.bits}-bit"
    if case.bits_per_weight is not None and case.bits_per_weight < 7.5 * itemsize(case):
        return f"{case.bits_per_weight:.3g} bits/weight"
    return case.dtype


def bits_of(case: Case) -> float:
    """Bits a weight takes, with its share of scales where that is known: what widths are sorted
    by.
    """
    return case.bits_per_weight or float(case.bits or 8 * itemsize(case))


def is_plain(case: Case) -> bool:
    """One sequence, the ordinary cache, no speculation."""
    return case.batch_size == 1 and case.cache == "plain" and case.speculation is None


def widths_by_size(rows: Iterable[Row]) -> list[str]:
    """The widths there are, widest weights first."""
    return unique(width(row.case) for row in sorted(rows, key=lambda row: -bits_of(row.case)))


def engines_ours_first(names: Iterable[str]) -> list[str]:
    return sorted(unique(names), key=lambda name: name != OURS)


def setting(case: Case, several_widths: bool = False, several_prompts: bool = False) -> str:
    """What sets a case apart from the plain run: `batch 16`, `quantized cache`, `prompt-lookup`;
    else `plain`.
    """
    parts = [f"batch {case.batch_size}"] if case.batch_size != 1 else []
    parts += [f"{case.cache} cache"] if case.cache != "plain" else []
    parts += [case.speculation] if case.speculation else []
    parts = parts or ["plain"]
    parts += [width(case)] if several_widths else []
    parts += [f"{case.prompt_tokens} prompt"] if several_prompts else []
    return ", ".join(parts)


def metric_name(metric: str) -> str:
    """`decode_tokens_per_second` -> `decode`, `peak_memory_bytes` -> `peak memory`."""
    for ending in ("_tokens_per_second", "_seconds", "_bytes"):
        metric = metric.removesuffix(ending)
    return metric.replace("_", " ")


def ratio_label(document: Document, number: int) -> str:
    """`decode, openelm-mlx / mlx-lm: 4-bit`; model and prompt too where the document's ratios
    differ in them.
    """
    ratio = document.ratios[number]
    one, other = document.rows[ratio.row].case, document.rows[ratio.against].case
    names = f"{one.engine} / {other.engine}"
    if one.engine == other.engine:
        names = f"{setting(one)} / {setting(other)}"
    cases = [document.rows[item.row].case for item in document.ratios]
    facts = [model_name(one)] if len({model_name(case) for case in cases}) > 1 else []
    facts += [width(one)]
    facts += (
        [f"{one.prompt_tokens} prompt"] if len({case.prompt_tokens for case in cases}) > 1 else []
    )
    return f"{metric_name(ratio.metric)}, {names}: {', '.join(facts)}"


def verdict(document: Document, number: int) -> str:
    """Whether the first side of a ratio is `better` or `worse`; `no difference` where the interval
    holds 1.
    """
    ratio = document.ratios[number]
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    more = METRICS[ratio.metric] in ("tokens/s", "tokens", "share")
    return "better" if (ratio.low > 1) == more else "worse"


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    if value == 0 or 0.001 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1e}"


def first_of_each_width(rows: Sequence[Row]) -> list[Row]:
    """One row a width: the first of them."""
    return list({width(row.case): row for row in reversed(rows)}.values())[::-1]
