"""Losses and gradients of a step, beside those of a model that NumPy computes in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from float64 import Var, gradients
from float64_model import Reference
from golden_set import GOLDEN
from small import random_adapter, small_model
from trained import adapted_modules, few_examples, golden_engine, method_of, trained_model

from openelm_mlx.convert.sources import infer_config
from openelm_mlx.convert.sources.corenet_adapters import BaseLayers
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx, utils
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune import forward
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.examples import Example
from openelm_mlx.finetune.options import METHODS, FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.finetune.trainable import continued, trainable
from openelm_mlx.model.adapters import Adapted
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig
from openelm_mlx.model.decoder import OpenELM, parameters

CONFIGS = ("tied-gqa4", "untied-mha", "noqknorm-gqa2", "noglu-gqa2", "gpt-test")
TOLERANCE = 1e-5  # relative to the largest element; float32 beside float64


def rows_of(found: list[Example]) -> Batch:
    """Return two rows: the first and the second example, and the third with padding."""
    return packed([found[:2], found[2:]], Shape(2, 12, 12, 4))


def reference_of(
    config: OpenELMConfig, weights: dict[str, Any], modules: dict[str, Adapted]
) -> tuple[Reference, dict[str, Var]]:
    """Return the model in float64, and what is trained, by the names of MLX's gradients."""
    plain = {name: Var(np.array(weight)) for name, weight in weights.items()}
    parts, trained = {}, {}
    for stem, module in modules.items():
        leaves = {leaf: Var(np.array(module[leaf])) for leaf in ("a", "b", "m") if leaf in module}
        trained |= {f"{stem}.{leaf}": one for leaf, one in leaves.items()}
        parts[stem] = leaves | {"scale": Var(module.scale)}
        if getattr(module, "tied", False):
            parts[HEAD] = parts[stem]
    return Reference(config, plain, parts), trained or plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_float64(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = golden_engine(name)
    weights = parameters(engine.model)
    options = method_of(method, z_loss=0.0 if method == "dora" else 0.01)
    model = trained_model(engine, options)
    reference, trained = reference_of(engine.config, weights, adapted_modules(model))
    found = few_examples(engine.config.vocab_size)
    expected = expected_of(reference, trained, found, options.z_loss)
    assert error_of(model, options, found, expected) <= TOLERANCE
    # attention and head in several parts, each layer computed again for its gradients
    monkeypatch.setattr(forward, "LEAST_BLOCK", 4)
    monkeypatch.setattr(forward, "CHUNK", 4 * engine.config.vocab_size)
    again = replace(options, gradient_checkpointing=True)
    assert error_of(model, again, found, expected) <= TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_a_tied_embedding_may_be_one_of_both_sides(dora: bool) -> None:
    """As mlx-lm's are: they can be trained further."""
    base = golden_engine("tied-gqa4")
    engine = base.load_adapter(random_adapter(base.model, 1, dora, tied=True))
    options = continued(engine, FinetuneOptions())
    model = trainable(engine, options)
    weights = parameters(base.model)
    reference, trained = reference_of(engine.config, weights, adapted_modules(model))
    found = few_examples(engine.config.vocab_size)
    expected = expected_of(reference, trained, found)
    assert error_of(model, options, found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["lora", "lora-rs", "dora"])
def test_an_adapter_of_corenets_is_trained_further(name: str) -> None:
    """The reference has the logits that CoreNet has with it."""
    path = GOLDEN / name / "checkpoint.pt"
    source = BaseLayers(TorchCheckpoint(path))
    shapes = {name: info.shape for name, info in source.tensors.items()}
    config = infer_config(shapes, {"vocab_size": 112, "max_context_length": 64})
    model = OpenELM(config)
    weights = {name: source.load(name) for name in shapes}
    model.load_weights(list(weights.items()))
    base = Engine(model, None, config, name, path)  # type: ignore[arg-type]
    engine = base.load_adapter(path)
    options = continued(engine, FinetuneOptions())
    assert (options.method, options.rank) == (name[:4], engine.adapter.parts[EMBEDDINGS].rank)
    trained_further = trainable(engine, options)
    reference, trained = reference_of(config, weights, adapted_modules(trained_further))
    file = np.load(GOLDEN / name / "golden.npz")
    tokens, logits = file["input_ids"][0, :8].tolist(), file["logits"][0, :8]
    found = reference.logits(tokens).value
    assert np.abs(found - logits).max() <= TOLERANCE * np.abs(logits).max()
    few = few_examples(112)
    expected = expected_of(reference, trained, few)
    assert error_of(trained_further, options, few, expected) <= TOLERANCE


def expected_of(
    reference: Reference, trained: dict[str, Var], found: list[Example], z_loss: float = 0.0
) -> tuple[float, dict[str, Any]]:
    """Return the sum of the losses of the trained tokens, and its gradients."""
    loss = Var(0.0)
    for example in found:
        losses = reference.losses(example.tokens.tolist(), z_loss)
        loss = loss + (losses * np.frombuffer(example.trained, np.uint8)[1:]).sum()
    return float(loss.value), gradients(loss, trained)


def error_of(
    model: OpenELM,
    options: FinetuneOptions,
    found: list[Example],
    expected: tuple[float, dict[str, Any]],
) -> float:
    """Return the largest error of a gradient, relative to the largest element of its array."""
    loss, slopes = expected
    (total, count, _), grads = Step(model, options).gradients(rows_of(found), mx.random.key(0))
    assert count.item() == 9
    assert total.item() == pytest.approx(loss, rel=TOLERANCE)
    flat: Any = dict(utils.tree_flatten(grads))
    named: Any = dict(utils.tree_flatten(model.trainable_parameters()))
    assert flat.keys() == slopes.keys() == named.keys()
    return max(
        float(np.abs(np.array(flat[name]) - gradient).max() / np.abs(gradient).max())
        for name, gradient in slopes.items()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_has_corenets_logits_and_the_slope_of_its_loss(name: str) -> None:
    config, weights = small_model(name)
    plain = {name: Var(np.array(weight)) for name, weight in weights.items()}
    file = np.load(GOLDEN / name / "golden.npz")
    tokens, logits = file["input_ids"][0, :8].tolist(), file["logits"][0, :8]
    found = Reference(config, plain).logits(tokens).value
    size = min(found.shape[1], logits.shape[1])  # CoreNet's may have rows of padding
    assert np.abs(found - logits)[:, :size].max() <= TOLERANCE * np.abs(logits).max()

    def loss(by: float) -> Var:
        moved = {name: Var(one.value + by * along[name]) for name, one in plain.items()}
        return Reference(config, moved).losses(tokens).sum()

    random = np.random.default_rng(1)
    along = {name: random.standard_normal(one.value.shape) for name, one in plain.items()}
    slope = (loss(1e-6).value - loss(-1e-6).value) / 2e-6
    found = gradients(Reference(config, plain).losses(tokens).sum(), plain)
    assert sum((found[name] * along[name]).sum() for name in plain) == pytest.approx(slope, 1e-6)
