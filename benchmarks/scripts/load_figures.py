"""The figures of a run of `serve_load`: they follow from its trials, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.benchmarks.scripts.servers import ALONE, OURS, PEER

SCHEMA = "openelm-mlx serving 1"
Trials = dict[str, list[dict[str, Any]]]  # by part
Figures = dict[str, Any]


def figures(trials: Trials) -> Figures:
    """Return the figures by part; ratios are of paired trials, with their 95 % interval."""
    of_part = {"streams": streams, "first": first, "equal": equal, "shared": shared}
    of_part |= {"health": health, "start": start}
    return {part: of_part[part](found) for part, found in trials.items() if found}


def names(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (OURS, PEER, ALONE) if name in trials[0]]


def ratios(values: Mapping[str, Sequence[float]]) -> Figures:
    """Return the first side over each other one."""
    ours, *others = values
    several = len(values[ours]) > 1
    return {
        f"{ours} / {other}": paired_ratio([values[ours]], [values[other]])._asdict()
        for other in others
        if several
    }


def streams(trials: Sequence[Mapping[str, Any]]) -> Figures:
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for name in names(trials):
        sides = [trial[name] for trial in trials]
        rates[name] = [side["tokens"] / side["seconds"] for side in sides]
        costs[name] = [1e6 * side["processor_seconds"] / side["tokens"] for side in sides]
    return {
        "tokens_per_second": {name: median(values) for name, values in rates.items()},
        "tokens_per_second_ratios": ratios(rates),
        "processor_us_per_token": {name: median(values) for name, values in costs.items()},
        "processor_ratios": ratios(costs),
        "same_texts": sum(trial["same_texts"] for trial in trials),
    }


def first(trials: Sequence[Mapping[str, Any]]) -> Figures:
    times = {name: [1e3 * trial[name] for trial in trials] for name in names(trials)}
    found: Figures = {"milliseconds": {name: median(values) for name, values in times.items()}}
    over = {
        name: median(a - b for a, b in zip(times[name], times[ALONE], strict=True))
        for name in times
        if name != ALONE
    }
    return found | {f"milliseconds_over_{ALONE}": over}


def equal(trials: Sequence[Mapping[str, Any]]) -> Figures:
    """Return how much later the last of equal requests has text than the first, as a share."""
    spreads = {
        name: [max(trial[name]) / min(trial[name]) - 1 for trial in trials]
        for name in names(trials)
    }
    return {
        "median_spread": {name: median(values) for name, values in spreads.items()},
        "largest_spread": {name: max(values) for name, values in spreads.items()},
    }


def shared(trials: Sequence[Mapping[str, Any]]) -> Figures:
    return {"prefilled_of_shared": max(trial["shared"] - trial["cached"] for trial in trials)}


def health(trials: Sequence[Mapping[str, Any]]) -> Figures:
    times = {
        name: sorted(1e3 * value for trial in trials for value in trial[name])
        for name in names(trials)
    }
    return {
        f"p{share}_milliseconds": {
            name: values[math.ceil(share / 100 * len(values)) - 1] for name, values in times.items()
        }
        for share in (50, 99)
    }


def start(trials: Sequence[Mapping[str, Any]]) -> Figures:
    found: Figures = {}
    for unit in ("seconds", "processor_seconds"):
        times = {name: [trial[name][unit] for trial in trials] for name in names(trials)}
        found[f"median_{unit}"] = {name: median(values) for name, values in times.items()}
    return found


def lines(found: Figures) -> Iterator[str]:
    """Yield the figures as text."""
    for part, values in found.items():
        for name, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{side} {shown(one)}" for side, one in value.items())
            yield f"{part}: {name.replace('_', ' ')}: {value}"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['middle']:.3f} ({value['low']:.3f}-{value['high']:.3f})"
    return f"{value:,.4g}"
