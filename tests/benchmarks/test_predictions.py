"""The formula of predictions, its fits and its band, held against published rates."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from openelm_mlx.benchmarks.hardware import find_chip
from openelm_mlx.benchmarks.ledger import steps
from openelm_mlx.benchmarks.ledger.count import ledger
from openelm_mlx.benchmarks.ledger.predict import main, predict
from openelm_mlx.benchmarks.ledger.published import OPENELM, RATES, SHAPES, Rate
from openelm_mlx.benchmarks.ledger.speeds import T, fit, learned, leave_out, speed_of
from openelm_mlx.benchmarks.ledger.steps import WeightSpec, trace_mlx_lm
from openelm_mlx.benchmarks.results.document import Document, Machine, save
from openelm_mlx.benchmarks.results.first_run import Costs, FirstRun
from openelm_mlx.cli import main as command
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.config import OpenELMConfig

FITTED = ("m1-ultra", "m5-max")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["smollm-135m", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_what_a_token_costs_elsewhere_is_counted_on_mlx_lms_own_classes(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger traces them as it traces mlx-lm's OpenELM, with two layers."""
    shape = replace(SHAPES[name], layers=2)
    kind = "qwen2" if shape.qkv_bias else "qwen3" if shape.qk_norm else "llama"
    module: Any = importlib.import_module(f"mlx_lm.models.{kind}")
    facts = {
        "model_type": kind,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.q_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
    }

    def model(_: OpenELMConfig, spec: WeightSpec) -> Any:
        made = module.Model(module.ModelArgs.from_dict(facts))
        spec.apply(made)
        return made

    caches = OpenELMConfig(
        num_transformer_layers=shape.layers,
        model_dim=shape.hidden,
        head_dim=shape.head_dim,
        num_query_heads=(shape.q_heads,) * shape.layers,
        num_kv_heads=(shape.kv_heads,) * shape.layers,
        ffn_dims=(shape.ffn,) * shape.layers,
        num_gqa_groups=shape.q_heads // shape.kv_heads,
    )
    monkeypatch.setattr(steps, "mlx_lm_model", model)
    monkeypatch.setattr(module, "swiglu", lambda gate, x: steps.fused(x, gate, x))
    form = None if bits == 16 else {"bits": bits, "group_size": 64}
    counted = ledger(trace_mlx_lm(caches, WeightSpec("bfloat16", form), 576))
    assert counted.kernels == shape.kernels(bits)
    assert counted.bytes_from_memory == shape.bytes_read(bits, 576)


def test_the_rate_of_openelm_has_the_cost_of_mlx_lms_openelm() -> None:
    (rate,) = (rate for rate in RATES if rate.model == OPENELM)
    form = {"bits": rate.bits, "group_size": 64}
    config = OpenELMConfig.from_name(OPENELM)
    counted = ledger(trace_mlx_lm(config, WeightSpec("bfloat16", form), rate.context))
    assert (counted.kernels, counted.bytes_from_memory) == (rate.kernels, rate.bytes_read)


def test_left_out_model_by_model_the_formula_holds() -> None:
    found = [leave_out(rate) for rate in RATES]
    assert len(found) == 34
    fitted = [row for row in found if row.fitted]
    assert {row.rate.chip_name for row in fitted} == set(FITTED) and len(fitted) == 27
    assert median(abs(row.error) for row in fitted) <= 0.08
    assert sum(row.outside for row in found) <= 2
    for row in found:
        inside = row.predicted / row.factor <= row.rate.tokens_per_second
        inside &= row.rate.tokens_per_second <= row.predicted * row.factor
        assert inside is not row.outside


@pytest.mark.parametrize("rate", RATES[::6], ids=lambda rate: f"{rate.chip_name} {rate.model}")
def test_a_model_that_is_left_out_has_no_say(rate: Rate) -> None:
    changed = [
        replace(row, tokens_per_second=row.tokens_per_second * 3)
        if (row.chip_name, row.model) == (rate.chip_name, rate.model)
        else row
        for row in RATES
    ]
    before, after = leave_out(rate), leave_out(rate, changed)
    assert (before.predicted, before.factor) == (after.predicted, after.factor)


@pytest.mark.parametrize("chip", FITTED)
def test_a_fit_and_its_band_are_those_of_least_squares(chip: str) -> None:
    """numpy solves the same problem, and the interval is that of a new observation."""
    rates = [rate for rate in RATES if rate.chip_name == chip]
    found, bandwidth = fit(rates), find_chip(chip).bandwidth
    rows = np.array(
        [
            (rate.kernels * rate.tokens_per_second, rate.bytes_read * rate.tokens_per_second)
            for rate in rates
        ]
    ) / (1, bandwidth)
    solved, residual, *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    assert (found.latency, 1 / found.efficiency) == pytest.approx(solved)
    spread = math.sqrt(residual[0] / (len(rows) - 2))
    assert found.spread == pytest.approx(spread)
    parts = found.seconds(400, 1e9, bandwidth)
    new = np.array([400, 1e9 / bandwidth]) / sum(parts)
    leverage = new @ np.linalg.inv(rows.T @ rows) @ new
    assert found.factor(*parts) == pytest.approx(1 + T * spread * math.sqrt(1 + leverage))


def test_rates_made_by_the_formula_give_its_constants_back() -> None:
    chip, bandwidth = "m2-max", find_chip("m2-max").bandwidth
    rates = []
    for model in list(SHAPES)[:5]:
        rate = Rate(chip, model, 4, 64, 1, "made up")
        seconds = rate.kernels * 3e-6 + rate.bytes_read / (bandwidth * 0.7)
        rates.append(replace(rate, tokens_per_second=1 / seconds))
    found = speed_of(find_chip(chip), [*RATES, *rates])
    assert (found.latency, found.efficiency) == pytest.approx((3e-6, 0.7))
    assert found.factor(*found.seconds(218, 150e6, bandwidth)) == pytest.approx(1)
    assert "fitted to 5 published rates of 5 models on Apple M2 Max" in found.basis
    with pytest.raises(BenchmarkError, match="2 models were measured on one chip; a fit needs 3"):
        fit(rates[:2])


def test_other_chips_have_what_their_generation_has() -> None:
    old, new = (speed_of(find_chip(name)) for name in FITTED)
    for name, end in (("m1", old), ("m1-max", old), ("m5", new), ("m6", new)):
        found = speed_of(find_chip(name))
        assert (found.latency, found.efficiency) == pytest.approx((end.latency, end.efficiency))
    middle = speed_of(find_chip("m3-max"))
    assert middle.latency == pytest.approx(math.sqrt(old.latency * new.latency))
    assert middle.generation**4 == pytest.approx(old.latency / new.latency)
    launched, read = middle.factor(1, 0), middle.factor(0, 1)
    noise = T * old.spread
    assert launched == pytest.approx(math.exp(math.hypot(noise, math.log(middle.generation))))
    assert read == pytest.approx(math.exp(math.hypot(noise, math.log(1.25))))
    assert "by generation, from the fits of Apple M1 Ultra and Apple M5 Max" in middle.basis


def test_the_command_prints_every_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count("m1-ultra") == 14 and "outside the band: 1 of 34" in shown
    assert all(rate.source in shown for rate in RATES)
    assert max(map(len, shown.split("- left out")[0].splitlines())) <= 80
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["tokens_per_second"] for row in rows] == [r.tokens_per_second for r in RATES]
    assert rows[0].items() >= asdict(RATES[0]).items()


def full_run(chip: str | None = "Apple M2 Max", **changes: Any) -> Document:
    """Return what `openelm doctor --full` would write: 4 us a kernel, half the bandwidth."""
    costs = {"dispatch_seconds": 4e-6, "gemv_bytes_per_second": {"bfloat16": 200e9}}
    settings: dict[str, Any] = {"quick": False, "backend": "metal", "costs": costs} | changes
    run = FirstRun("the CPU", "270m", quick=settings["quick"], costs=Costs(**settings["costs"]))
    machine = Machine(chip=chip, gpu_cores=38, backend=settings["backend"])
    return Document("2026-01-01T00:00:00+00:00", "test", (), machine=machine, first_run=run)


def test_a_chip_without_a_fit_has_what_doctor_measured_on_it() -> None:
    chip = find_chip("m2-max")
    before = speed_of(chip)
    found = learned(before, chip, [full_run(), full_run("Apple M2")])
    assert (found.latency, found.efficiency) == (4e-6, 0.5)
    assert found.basis == "measured on Apple M2 Max by openelm doctor --full"
    assert found.factor(0, 1) < before.factor(0, 1) and found.factor(1, 0) == before.factor(1, 0)
    config = OpenELMConfig.from_name("270m")
    predicted = predict(chip, config, documents=[full_run()])
    assert predicted.kernel_seconds == predicted.kernels * 4e-6
    for nothing in (
        full_run("AMD EPYC"),
        full_run(None),
        full_run(quick=True),
        full_run(backend="cpu"),
        full_run(costs={"dispatch_seconds": 4e-6}),
        replace(full_run(), first_run=None),
    ):
        assert learned(before, chip, [nothing]) == before
    fitted = speed_of(find_chip("m1-ultra"))
    assert learned(fitted, find_chip("m1-ultra"), [full_run("Apple M1 Ultra")]) == fitted


def test_the_file_of_a_full_run_names_its_chip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    save(full_run(), path)
    assert command(["benchmark", "270m", "--predict", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Apple M2 Max, 30 or 38 GPU cores, 400 GB/s: predicted, not measured" in shown
    assert "4.0 us a kernel and 50% of nominal bandwidth here, measured on" in shown
    save(full_run(None), tmp_path / "other.json")
    assert command(["benchmark", "--predict", str(tmp_path / "other.json")]) == 2
    assert "is not in the table; known" in capsys.readouterr().err
