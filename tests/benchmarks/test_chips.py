"""The table of chips, and what is predicted from it."""

from __future__ import annotations

import json

import pytest

from openelm_mlx.benchmarks.hardware import (
    CHIPS,
    bytes_per_token,
    find_chip,
    nominal_bandwidth,
)
from openelm_mlx.benchmarks.ledger.predict import checks, predict, predictions, show
from openelm_mlx.benchmarks.ledger.speeds import speed_of
from openelm_mlx.benchmarks.results.document import Case, Document, Machine, Metric, Row
from openelm_mlx.errors import BenchmarkError, ConfigError
from openelm_mlx.model.config import OpenELMConfig

M270 = OpenELMConfig.from_name("270m")


@pytest.mark.parametrize(
    ("name", "cores", "bandwidth"),
    [
        ("Apple M1", (7, 8), 68.3e9),
        ("m2-ultra", (60, 76), 800e9),
        ("Apple M3 Max", (40,), 400e9),
        ("M3 Max", (40,), 400e9),
        ("m3-max-30", (30,), 300e9),
        ("m3_max 30-core", (30,), 300e9),
        ("m4-max-32", (32,), 410e9),
        ("m5-pro", (16, 20), 307e9),
        ("m5-8", (8, 10), 153e9),
        ("Apple M5 Ultra", (64, 80), 1200e9),
        ("m6", (12,), 170e9),
    ],
)
def test_lookup(name: str, cores: tuple[int, ...], bandwidth: float) -> None:
    chip = find_chip(name)
    assert set(chip.gpu_cores) <= set(cores) and chip.bandwidth == bandwidth
    assert nominal_bandwidth(name) == bandwidth


def test_gpu_cores_tell_chips_of_one_name_apart() -> None:
    assert (
        find_chip("Apple M4 Max", 32).bandwidth_gb == 410
        and find_chip("Apple M4 Max", 40).bandwidth_gb == 546
    )
    assert nominal_bandwidth("Apple M4 Max") == nominal_bandwidth("Apple M4 Max", 99) == 546e9
    assert nominal_bandwidth("Apple M4 Max", 32) == 410e9
    with pytest.raises(
        BenchmarkError, match="Apple M6 with 10 GPU cores is not in the table; it has 12"
    ):
        find_chip("m6-10")
    with pytest.raises(
        BenchmarkError, match="Apple M4 Max with 36 GPU cores is not in the table; it has 32 or 40"
    ):
        find_chip("m4-max", 36)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m3-mx", "the chip 'm3-mx' is not in the table; did you mean m3-max"),
        ("Apple M9 Max", "did you mean"),
        ("AMD EPYC", "known: m1, m1-pro"),
        ("", "known: m1"),
    ],
)
def test_what_is_not_in_the_table_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        find_chip(name)
    assert nominal_bandwidth(name) is None


def test_table_is_whole() -> None:
    assert {chip.short for chip in CHIPS} >= {
        f"m{generation}{tier}" for generation in range(1, 6) for tier in ("", "-pro", "-max")
    }
    assert all(chip.name.startswith(f"Apple M{chip.generation}") for chip in CHIPS)
    assert all(
        len(chip.source) > 20 and chip.gpu_cores == tuple(sorted(chip.gpu_cores)) for chip in CHIPS
    )
    assert all(find_chip(chip.name, chip.gpu_cores[0]) is chip for chip in CHIPS)
    assert all(find_chip(f"{chip.short}-{chip.gpu_cores[-1]}") is chip for chip in CHIPS)


def test_prediction_is_the_sum_of_its_parts() -> None:
    found = predict("m3-max", M270, "bfloat16", {"bits": 4, "group_size": 64}, 128)
    assert found.bytes_per_token == bytes_per_token(
        M270, "bfloat16", {"bits": 4, "group_size": 64}, 128
    )
    speed = speed_of(find_chip("m3-max"))
    seconds = found.kernels * speed.latency
    seconds += sum(found.bytes_per_token.values()) / (400e9 * speed.efficiency)
    assert found.tokens_per_second == pytest.approx(1 / seconds)
    assert found.kernel_seconds + found.memory_seconds == pytest.approx(seconds)
    factor = speed.factor(found.kernel_seconds, found.memory_seconds)
    assert 1.1 < factor < 1.5
    assert (found.low * factor, found.high / factor) == pytest.approx((1 / seconds,) * 2)
    assert found.tokens_per_second < found.chip.bandwidth / sum(found.bytes_per_token.values())
    assert found.predicted and "predicted, not measured" in found.assumed[0]


def test_faster_memory_fewer_bits_and_shorter_context_are_faster() -> None:
    rates = [
        predict("m1", M270).tokens_per_second,
        predict("m1-pro", M270).tokens_per_second,
        predict("m1-pro", M270, quantization={"bits": 4, "group_size": 64}).tokens_per_second,
    ]
    assert rates == sorted(rates)
    assert predict("m1", M270, context=2048).tokens_per_second < rates[0]


def measured_on(chip: str, rate: float, **case: object) -> Document:
    settings = {
        "engine": "openelm-mlx",
        "model": "270m",
        "dtype": "bfloat16",
        "bits": None,
        "bits_per_weight": 16.0,
        "prompt_tokens": 32,
        "generation_tokens": 64,
    } | case
    row = Row(Case(**settings), {"decode_tokens_per_second": Metric.of([rate] * 5, "tokens/s")})  # type: ignore[arg-type]
    return Document("2026-01-01T00:00:00+00:00", "test", (row,), machine=Machine(chip=chip))


def test_predictions_are_checked_against_what_was_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = predict("m2-max", M270, context=64).tokens_per_second
    show("m2-max", ["270m"])
    assert "this engine has not been measured on any chip" in capsys.readouterr().out
    documents = [
        measured_on("Apple M2 Max", expected / 1.25),
        measured_on("AMD EPYC", 10),
        measured_on("Apple M2 Max", 10, engine="mlx-lm"),
        measured_on("Apple M2 Max", 10, batch_size=4),
        measured_on("Apple M2 Max", 10, model="somebody's own"),
    ]
    (found,) = checks(documents)
    assert found.predicted.tokens_per_second == pytest.approx(1.25 * found.measured)
    assert found.chip.name == "Apple M2 Max"
    show("m3-max", ["270m"], documents)
    shown = capsys.readouterr().out
    assert "checked on Apple M2 Max, 270m: measured" in shown
    assert "has not been measured" not in shown


def test_table_says_that_it_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    show("m3-max", ["270m", "3b"])
    shown = capsys.readouterr().out
    assert "predicted, not measured" in shown and "4 bits" in shown
    assert "benchmarks/ledger/published.py" in shown and "band" in shown
    assert max(map(len, shown.partition("Decoding, one")[0].splitlines())) <= 80
    show("m3-max", ["270m", "3b"], as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["predicted"] is True
        and len(facts["rows"]) == 6
        and all(row["predicted"] for row in facts["rows"])
        and all(row["low"] < row["tokens_per_second"] < row["high"] for row in facts["rows"])
    )
    show("list")
    chips, sources = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert len(chips) == len(CHIPS) and len(sources) == len(
        {chip.source for chip in CHIPS}
    )  # each is named once
    for line, chip in zip(chips, CHIPS, strict=True):
        assert f"[{line.split('[')[1]} {chip.source}" in sources
    show("list", as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == len(CHIPS)


def test_unknown_sizes_and_chips_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a published OpenELM size"):
        predictions("m3-max", ["7b"])
    with pytest.raises(BenchmarkError, match="did you mean"):
        predictions("m3-maxx")
