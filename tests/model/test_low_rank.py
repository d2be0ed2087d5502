"""Adapters applied beside the weights: the same logits as those of the merged model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden_set import load_golden
from small import merged_model, random_adapter, random_model

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.errors import CheckpointError
from openelm_mlx.model.adapters import Adapter, LowRank, adapted
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.config import EMBEDDINGS, HEAD
from openelm_mlx.model.decoder import OpenELM, parameters

PARTS = ["a", "b", "m"]
KINDS = {
    "all": {},
    "dora": {"dora": True},
    "tied": {"tied": True},
    "tied dora": {"dora": True, "tied": True},
    "input side": {"only": EMBEDDINGS},
    "output side": {"only": HEAD, "dora": True},
    "layers": {"only": "layers"},
}


def distance(found: mx.array, wanted: mx.array) -> float:
    """Return the largest difference as a share of the largest logit."""
    return (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()


def test_merging_follows_the_formulas_of_lora_and_dora():
    draw = np.random.default_rng(0).standard_normal
    weight, a, b, lengths = draw((6, 4)), draw((2, 4)), draw((6, 2)), draw(6)
    sum_ = weight + 0.5 * b @ a
    dora = sum_ * (lengths / np.sqrt((sum_**2).sum(axis=1)))[:, None]
    arrays = [mx.array(part.astype(np.float32)) for part in (weight, a, b, lengths)]
    lora = LowRank(arrays[1], arrays[2], 0.5)
    assert lora.rank == 2
    assert np.allclose(lora.merged(arrays[0]), sum_, atol=1e-5)
    with_lengths = LowRank(arrays[1], arrays[2], 0.5, arrays[3])
    assert np.allclose(with_lengths.merged(arrays[0]), dora, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied-gqa4", "untied-mha", "noglu-gqa2", "noqknorm-gqa2"])
def test_logits_equal_those_of_the_merged_model(name, kind, tmp_path):
    model, tokens, golden = load_golden(name, tmp_path)
    adapter = random_adapter(model, seed=1, **KINDS[kind])
    ours, wanted = adapted(model, adapter), merged_model(model, adapter)(tokens)
    assert distance(mx.array(golden), wanted) > 1e-2
    assert distance(ours(tokens), wanted) < 1e-5
    assert np.abs(np.array(model(tokens)) - golden).max() < 1e-4  # the base is as it was
    cache = KVCache(model.args)
    ours.hidden(tokens[:, :-4], cache)
    start = mx.array([tokens.shape[1] - 4] * tokens.shape[0])
    step = step_caches(cache.arrays, start, cache.kind)
    assert distance(ours(tokens[:, -4:], step), wanted[:, -4:]) < 1e-5
    assert distance(ours.logits(ours.hidden(tokens, last=True)), wanted[:, -1]) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", [{"bits": 4, "group_size": 32}, {"mode": "mxfp8"}])
def test_a_quantized_base_stays_as_it_is(how, tied, dora):
    model = random_model(seed=1)
    if tied:
        arrays = {name: array for name, array in parameters(model).items() if HEAD not in name}
        model = OpenELM(replace(model.args, share_input_output_layers=True))
        model.load_weights(list(arrays.items()))
    nn.quantize(model, **({"bits": None, "group_size": None} | how))
    tokens = mx.array([[1, 5, 9, 30, 12, 7, 7, 3]])
    adapter = random_adapter(model, seed=2, dora=dora, tied=tied)
    ours = adapted(model, adapter)
    assert distance(ours(tokens), merged_model(model, adapter)(tokens)) < 1e-5
    kept = {id(array) for array in parameters(model).values()}
    new = {id(array) for array in parameters(ours).values()}
    assert kept <= new and all(
        path.endswith(tuple(f".{part}" for part in PARTS)) or id(array) in kept
        for path, array in parameters(ours).items()
    )


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_half_types_round_little_more_than_the_merged_model_in_that_type(dtype, dora):
    model, tokens = random_model(seed=1), mx.array([[1, 5, 9, 30, 12, 7, 7, 3]])
    model.set_dtype(dtype)
    adapter = random_adapter(model, seed=3, dora=dora)
    exact, half = merged_model(model, adapter), merged_model(model, adapter)
    half.set_dtype(dtype)
    wanted, ours = exact(tokens), adapted(model, adapter)
    assert ours(tokens).dtype == dtype
    rounded = distance(half(tokens).astype(mx.float32), wanted)
    assert distance(ours(tokens).astype(mx.float32), wanted) < 2 * rounded


@pytest.mark.parametrize("dora", [False, True])
def test_the_parts_are_trained_while_the_base_is_frozen(dora):
    model, tokens = random_model(seed=1), mx.array([[1, 5, 9, 30, 12, 7, 7, 3]])
    adapter = random_adapter(model, seed=1, dora=dora)
    ours = adapted(model, adapter)
    ours.freeze()
    ours.unfreeze(keys=PARTS, strict=False)
    assert dict(utils.tree_flatten(model.trainable_parameters())).keys() == parameters(model).keys()

    def loss(model, tokens):
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    before, gradients = nn.value_and_grad(ours, loss)(ours, tokens)
    found = dict(utils.tree_flatten(gradients))
    assert len(found) == (3 if dora else 2) * len(adapter.parts)
    old = dict(utils.tree_flatten(ours.trainable_parameters()))
    ours.update(utils.tree_unflatten([(p, old[p] - 0.05 * g) for p, g in found.items()]))
    parts = {path: one.low_rank for path, one in ours.named_modules() if hasattr(one, "low_rank")}
    assert loss(ours, tokens).item() < before.item()
    trained = merged_model(model, Adapter("trained", parts))
    assert distance(ours(tokens), trained(tokens)) < 1e-5


def test_an_adapter_of_another_model_is_refused():
    model = random_model(seed=1)
    part = LowRank(mx.zeros((2, 32)), mx.zeros((64, 2)), 1.0)
    with pytest.raises(CheckpointError) as error:
        adapted(model, Adapter("story", {HEAD: part}))
    assert str(error.value) == (
        "the adapter story was made for another model: its lm_head adds (64, 2) times (2, 32), "
        "to 64 x 64 here; give its own"
    )
    with pytest.raises(CheckpointError) as error:
        adapted(model, Adapter("story", {"transformer.layers.9.ffn.proj_1": part}))
    assert str(error.value) == (
        "the adapter story changes transformer.layers.9.ffn.proj_1, which this model lacks; give "
        "an adapter that was made for it"
    )
