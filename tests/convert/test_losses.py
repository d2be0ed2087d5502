"""Losses: those measured are the losses of a real change, however small."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from formats import random_folder
from small import random_tokens, small_model

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import LazyWeights, exact_weights, logits, of_layer
from openelm_mlx.convert.quantize import losses as losses_module
from openelm_mlx.convert.quantize.losses import (
    interpolated,
    make_reference,
    measure,
    nearest,
    rounded_weights,
)
from openelm_mlx.convert.quantize.rounding import rounded
from openelm_mlx.device import mx
from openelm_mlx.evaluate.compare import kl_divergence
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
        make_reference(config, weights, tokens),
        shapes,
        nearest(F16),
        3.5,
        lambda *told: calls.append(told),
    )
    steps = 4 * (4 + 4 * (4 + 3 + 2))  # 2 to 5 bits: through all layers for the embeddings, through
    assert calls[-1][0] == calls[-1][1] == steps  # those from its own on for another matrix
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
        assert own[None] < 1e-6 and own[QuantSpec(4, 32)] <= own[QuantSpec(4, 64)] * 1.2
        assert all(shapes[name][1] % f.group_size == 0 for f in own if f is not None)


def plain_loss(config, exact, changed, tokens):
    """The loss as a whole model in memory gives it, in float64."""
    p, q = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (
            np.array(logits(config, weights, tokens)).astype(np.float64)
            for weights in (exact, changed)
        )
    )
    return (np.exp(p) * (p - q)).sum(-1).mean()


def test_small_losses_are_measured_and_not_rounding_noise():
    config, weights = small_model()
    tokens, stem = random_tokens(config), "transformer.layers.2.attn.out_proj"
    reference = make_reference(config, weights, tokens)
    changes = [{stem: QuantSpec(bits, 32)} for bits in (5, 6, 8)]
    found = reference.losses_of(changes, nearest(F16))
    for change, loss in zip(changes, found, strict=True):
        name = f"{stem}.weight"
        changed = weights | {name: rounded(weights[name], change[stem], mx.float16)}
        assert loss == pytest.approx(plain_loss(config, weights, changed, tokens), rel=0.01)
        assert loss == pytest.approx(reference.loss(changed), rel=1e-3)
    assert found[0] > 2 * found[1] > 8 * found[2] and found[2] < 1e-5


@pytest.mark.parametrize("name", ["tied-gqa4", "untied-mha"])
@pytest.mark.parametrize("within", [False, True], ids=["exact", "around a plan"])
def test_models_run_together_lose_what_each_loses_alone(name, within, monkeypatch):
    config, weights = small_model(name)
    tokens, shapes = random_tokens(config, rows=5), matrices(expected_tensors(config))
    specs, plan = (QuantSpec(2, 32), QuantSpec(3, 32)), dict.fromkeys(shapes, QuantSpec(4, 32))
    changes = [{stem: spec} for stem in list(shapes)[::5] + list(shapes)[-1:] for spec in specs]
    changes += [dict.fromkeys(shapes, spec) for spec in specs]
    changes += [dict.fromkeys(list(shapes)[6:], None), {}]
    reads = Counter()

    def read(name):
        reads[name] += 1
        return weights[name]

    reference = make_reference(config, LazyWeights(weights, read), tokens)
    assert set(reads.values()) == {1}
    width = sum(states.nbytes for states in reference.states)
    monkeypatch.setattr(losses_module, "STATES", 4 * width)  # four at once
    around = plan if within else None
    found = reference.losses_of(changes, nearest(F16), around)
    layers = Counter({name: n for name, n in reads.items() if name.endswith("attn_norm.weight")})
    assert 2 < max(layers.values()) <= 1 + -(-len(changes) // 4)  # once for each four
    for change, loss in zip(changes, found, strict=True):
        own = dict(rounded_weights(weights, plan, nearest(F16))) if within else dict(weights)
        for stem, spec in change.items():
            own[f"{stem}.weight"] = rounded(weights[f"{stem}.weight"], spec, mx.float16)
        expected = plain_loss(config, weights, own, tokens)
        assert loss == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_interpolation_passes_through_the_points_and_is_proportional_outside():
    points = [(0.1, 0.02), (0.4, 0.1), (1.6, 0.3)]
    assert all(math.isclose(interpolated(points, error), loss) for error, loss in points)
    assert math.isclose(interpolated(points, 0.05), 0.01) and math.isclose(
        interpolated(points, 3.2), 0.6
    )
    assert math.isclose(interpolated(points, 0.2), math.sqrt(0.02 * 0.1))


def test_lazy_weights_are_read_when_asked_for_and_equal_those_in_the_file(tmp_path):
    folder = random_folder(tmp_path / "source")
    opened = open_model(ConvertOptions(folder, tmp_path / "m"))
    lazy, stored = exact_weights(opened), mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(tmp_path / "away")
    assert set(lazy) == set(stored) and len(lazy) == len(stored) and "other" not in lazy
    with pytest.raises(KeyError):
        lazy["other"]
    (tmp_path / "away").rename(folder / "model.safetensors")
    assert all(mx.array_equal(lazy[name], array) for name, array in stored.items())
    own = of_layer(lazy, 0)
    assert own.keys() == {name for name in stored if ".layers.0." in name}
