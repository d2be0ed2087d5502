"""Measured allocation: the loss of a spec is the true one, and the chosen plan is the best there is
at its size.
"""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from formats import tokenizer_file
from golden_set import GOLDEN
from small import random_tokens, small_model

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.quantize import logits
from openelm_mlx.convert.quantize.allocate import (
    choose,
    hull,
    interpolated,
    make_reference,
    measure,
    plan_bytes,
    true_loss,
)
from openelm_mlx.convert.quantize.rounding import rounded
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, OptionError
from openelm_mlx.evaluate.score import kl_divergence
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.quantization import QuantSpec, matrices

F16 = "float16"


@pytest.mark.parametrize(
    "name", ["tied-gqa4", "untied-mha", "noqknorm-gqa2", "noglu-gqa2", "gpt-test"]
)
def test_the_function_of_weights_is_the_engines_model(name):
    config, weights = small_model(name)
    tokens = random_tokens(config)
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    seen = {}
    ours = logits(config, weights, tokens, lambda stem, x: seen.update({stem: x.shape}))
    assert mx.abs(ours - model(tokens)).max().item() < 1e-4
    linear = {
        stem: shape
        for stem, shape in matrices(expected_tensors(config)).items()
        if "token_emb" not in stem
    }
    assert {stem: seen[stem][1] for stem in linear} == {
        stem: shape[1] for stem, shape in linear.items()
    }


def test_a_measured_loss_is_the_loss_of_that_one_change():
    config, weights = small_model()
    tokens, shapes = random_tokens(config), expected_tensors(config)
    calls = []
    losses = measure(
        make_reference(config, weights, tokens), shapes, F16, 3.5, lambda *told: calls.append(told)
    )
    assert calls[-1][0] == calls[-1][1] == len(calls) == 13 * 4  # 2, 3, 4 and 5 bits
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    exact = model(tokens)
    for stem in (
        "transformer.token_embeddings",
        "transformer.layers.1.ffn.proj_2",
        "transformer.layers.2.attn.qkv_proj",
    ):
        group = 64 if shapes[f"{stem}.weight"][1] % 64 == 0 else 32
        name, spec = f"{stem}.weight", QuantSpec(3, group)
        model.load_weights([(name, rounded(weights[name], spec, mx.float16))], strict=False)
        assert math.isclose(
            losses[stem][spec], kl_divergence(exact, model(tokens)).mean().item(), rel_tol=0.02
        )
        model.load_weights([(name, weights[name])], strict=False)
        own = losses[stem]
        assert own[QuantSpec(4, group)] < own[QuantSpec(3, group)] < own[QuantSpec(2, group)]
        assert own[None] == 0 and own[QuantSpec(4, 32)] <= own[QuantSpec(4, 64)] * 1.2
        assert all(shapes[name][1] % f.group_size == 0 for f in own if f is not None)


def test_small_losses_are_measured_and_not_rounding_noise():
    config, weights = small_model()
    reference = make_reference(config, weights, random_tokens(config))
    name = "transformer.layers.2.attn.out_proj.weight"
    found, exact = [], np.concatenate([np.array(x) for x in reference.logits]).astype(np.float64)
    for bits in (5, 6, 8):
        changed = weights | {name: rounded(weights[name], QuantSpec(bits, 32), mx.float16)}
        found.append(reference.loss(changed, start=2))
        other = [logits(config, changed, tokens) for tokens in reference.batches]
        p, q = (
            x - np.log(np.exp(x).sum(-1, keepdims=True))
            for x in (exact, np.concatenate([np.array(x) for x in other]).astype(np.float64))
        )
        assert found[-1] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=0.01)
    assert found[0] > 2 * found[1] > 8 * found[2] and found[2] < 1e-5


def test_interpolation_passes_through_the_points_and_is_proportional_outside():
    points = [(0.1, 0.02), (0.4, 0.1), (1.6, 0.3)]
    assert all(math.isclose(interpolated(points, error), loss) for error, loss in points)
    assert math.isclose(interpolated(points, 0.05), 0.01) and math.isclose(
        interpolated(points, 3.2), 0.6
    )
    assert math.isclose(interpolated(points, 0.2), math.sqrt(0.02 * 0.1))


def test_the_hull_keeps_the_steps_of_falling_gain():
    points = [(10, 1.0, None), (20, 0.9, None), (30, 0.2, None), (40, 0.3, None), (50, 0.1, None)]
    assert [size for size, *_ in hull(points)] == [10, 30, 50]


@pytest.mark.parametrize("seed", [0, 4, 7, 10, 16])  # of these all but the first need exchanges
def test_the_plan_is_nearly_the_best_of_all_plans(seed):
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
    assert sum(losses[stem][spec] for stem, spec in plan.items()) <= 1.05 * best
    for one, other in itertools.permutations(plan, 2):  # no exchange of bytes is better
        for pair in itertools.product(specs, repeat=2):
            changed = plan | dict(zip((one, other), pair, strict=True))
            gain = sum(
                losses[stem][plan[stem]] - losses[stem][spec] for stem, spec in changed.items()
            )
            assert gain < 1e-9 or plan_bytes(changed, shapes, F16) > budget
    with pytest.raises(
        OptionError, match=r"target_bpw is 2.0; the smallest this model can be is 2.\d{3}"
    ):
        choose(losses, shapes, F16, 2.0)


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
    dry = convert(
        ConvertOptions(
            target=tmp_path / "m", target_bpw=bpw, calibration_text=text, dry_run=True, **common
        )
    )
    assert not (tmp_path / "m").exists() and dry.memory_bytes > 4 * 328768
    report = convert(
        ConvertOptions(target=tmp_path / "m", target_bpw=bpw, calibration_text=text, **common)
    )
    assert report.plan == dry.plan and report.bits_per_weight <= bpw + 1e-9
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < size * 1.02  # headers differ
    config, weights = small_model()
    reference = make_reference(config, weights, random_tokens(config))
    assert true_loss(reference, report.plan, F16) < true_loss(
        reference, dict.fromkeys(report.plan, QuantSpec(4, 64)), F16
    )
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["calibration"]["sum_of_losses"] == pytest.approx(
        record["calibration"]["loss_together"], rel=0.5
    )
    assert set(record["calibration"]["loss_of_each"]) == set(report.plan)
    assert "| layer 2 |" in (tmp_path / "m" / "README.md").read_text()


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
