"""Measured allocation: the chosen plan is the best there is at its size."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from formats import tokenizer_file
from golden_set import GOLDEN
from small import random_tokens, small_model, true_loss

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.quantize.allocate import (
    best_plan,
    choose,
    largest_uniform,
    never_worse,
    plan_bytes,
)
from openelm_mlx.convert.quantize.losses import (
    fitted,
    make_reference,
    measure,
    nearest,
    rounded_weights,
)
from openelm_mlx.convert.verify import read_folder
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, OptionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec, all_specs, matrices

F16 = "float16"


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_is_the_best_of_all_plans(seed):
    random = np.random.default_rng(seed)
    specs = [QuantSpec(bits, group) for bits in (2, 3, 4, 6) for group in (32, 128)]
    shapes = {f"m{n}.weight": (int(random.integers(1, 9)) * 16, 256) for n in range(4)} | {
        "norm.weight": (256,)
    }
    losses = {
        f"m{n}": {
            spec: float(random.lognormal()) * 4.0**-spec.bits * spec.group_size**0.25
            for spec in specs
        }
        for n in range(4)
    }
    plan = choose(losses, shapes, F16, 3.9)
    budget = 3.9 / 8 * sum(math.prod(shape) for shape in shapes.values())
    assert plan_bytes(plan, shapes, F16) <= budget
    best = min(
        sum(losses[stem][spec] for stem, spec in zip(losses, taken, strict=True))
        for taken in itertools.product(specs, repeat=4)
        if plan_bytes(dict(zip(losses, taken, strict=True)), shapes, F16) <= budget
    )
    assert math.isclose(sum(losses[stem][spec] for stem, spec in plan.items()), best)
    with pytest.raises(
        OptionError, match=r"target_bpw is 2.0; the smallest this model can be is 2.\d{3}"
    ):
        choose(losses, shapes, F16, 2.0)


def test_a_plan_of_the_largest_model_is_chosen_within_its_size():
    shapes = expected_tensors(OpenELMConfig.from_name("3b"))
    specs = all_specs()
    losses = {
        stem: {spec: 4.0**-spec.bits * spec.group_size**0.25 * (1 + n % 7) for spec in specs}
        for n, stem in enumerate(matrices(shapes))
    }
    for target in (2.5, 4.5):
        size = plan_bytes(choose(losses, shapes, F16, target), shapes, F16)
        most = target / 8 * sum(math.prod(shape) for shape in shapes.values())
        assert most * 0.999 < size <= most


def test_a_folder_of_the_asked_size_loses_less_than_a_uniform_one(tmp_path):
    common = {
        "source": GOLDEN / "tied-gqa4" / "checkpoint.pt",
        "tokenizer": tokenizer_file(tmp_path),
        "dtype": F16,
    }
    convert(ConvertOptions(target=tmp_path / "uniform", bits=4, group_size=64, **common))
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a fox who lived in a forest with two birds " * 12)
    size = (tmp_path / "uniform" / "model.safetensors").stat().st_size
    uniform = mx.load(str(tmp_path / "uniform" / "model.safetensors"))
    bpw = 8 * sum(a.nbytes for a in uniform.values()) / 328768
    report = convert(
        ConvertOptions(target=tmp_path / "m", target_bpw=bpw, calibration_text=text, **common)
    )
    assert report.bits_per_weight <= bpw + 1e-9
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < size * 1.02  # headers differ
    config, weights = small_model()
    reference = make_reference(config, weights, random_tokens(config))
    uniform_plan = dict.fromkeys(report.plan, QuantSpec(4, 64))
    fits, plain = fitted(F16), nearest(F16)
    assert true_loss(reference, report.plan, fits) < true_loss(reference, uniform_plan, fits)
    assert true_loss(reference, uniform_plan, fits) < true_loss(reference, uniform_plan, plain)
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())["calibration"]
    assert record["sum_of_losses"] == pytest.approx(record["loss_together"], rel=0.5)
    assert set(record["loss_of_each"]) == set(report.plan)
    best = record["best_uniform"]
    assert record["loss_together"] < best["loss"] and not best["taken"]
    written = dict(rounded_weights(weights, report.plan, fits))
    for name, array in read_folder(tmp_path / "m")[1].items():
        assert mx.abs(array - written[name]).max().item() < 1e-5
    assert "| layer 2 |" in (tmp_path / "m" / "README.md").read_text()


def test_of_uniform_plans_those_are_compared_that_fit_and_the_better_plan_is_written():
    shapes = {"a.weight": (64, 256), "b.weight": (128, 256), "norm.weight": (256,)}
    every = largest_uniform(shapes, F16, 4.7)
    affine, block = [QuantSpec(3, 32), QuantSpec(4, 64), QuantSpec(4, 128)], ["mxfp4", "nvfp4"]
    assert {spec for spec in every if spec.mode == "affine"} == set(affine)
    assert sorted(spec.mode for spec in every if spec.mode != "affine") == block
    assert QuantSpec(4, 128) not in largest_uniform(shapes | {"c.weight": (8, 64)}, F16, 4.7)
    assert largest_uniform(shapes, F16, 2.0) == []
    plan = {"a": QuantSpec(3), "b": QuantSpec(5)}
    kept, record = never_worse(plan, 0.2, {QuantSpec(4): 0.3, QuantSpec(3): 0.4})
    assert kept == plan and record["best_uniform"]["loss"] == 0.3
    uniform, record = never_worse(plan, 0.2, {QuantSpec(4): 0.1, QuantSpec(3): 0.4})
    assert uniform == dict.fromkeys("ab", QuantSpec(4)) and record["best_uniform"]["taken"]
    assert never_worse(plan, 0.2, {}) == (plan, {})


def test_more_bits_lose_less_and_no_uniform_plan_loses_less_than_the_measured_one():
    config, weights = small_model()
    shapes, last = expected_tensors(config), math.inf
    reference = make_reference(config, weights, random_tokens(config, rows=3))
    losses = measure(reference, shapes, fitted(F16), 5.5, spread=3.0)
    for target in range(30, 86, 25):
        plan, found = best_plan(reference, losses, shapes, F16, target / 10)
        loss, uniform = true_loss(reference, plan, fitted(F16)), found["best_uniform"]
        assert loss == pytest.approx(min(found["loss_together"], uniform["loss"]))
        assert loss < 0.3 * last
        last = loss


def test_weights_that_are_not_numbers_are_refused_before_measuring(tmp_path):
    folder = tmp_path / "source"
    convert(
        ConvertOptions(
            GOLDEN / "tied-gqa4" / "checkpoint.pt", folder, tokenizer=tokenizer_file(tmp_path)
        )
    )
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors["transformer.norm.weight"][0] = mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match="transformer.norm.weight has NaN"):
        convert(ConvertOptions(folder, tmp_path / "m", dtype=F16, target_bpw=4.0))
    assert not (tmp_path / "m").exists()
