"""What a step compiles, computes again, cuts into chunks or adds up is what the plain way gives."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from small import random_adapter, small_model

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.finetune import forward
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.forward import Training, token_losses
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.model.adapters import Adapted, adapted, dropout
from openelm_mlx.model.decoder import OpenELM

KEY = mx.random.key(7)
MODELS = ("tied-gqa4", "untied-mha", "noqknorm-gqa2", "noglu-gqa2")


def plain_model(name: str = "tied-gqa4") -> OpenELM:
    config, weights = small_model(name)
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def trainee(
    name: str = "tied-gqa4", dora: bool = False, seed: int = 1, dtype: mx.Dtype = mx.float32
) -> OpenELM:
    """Return a model whose projections have parts that are trained."""
    model = plain_model(name)
    model.set_dtype(dtype)
    model = adapted(model, random_adapter(model, seed, dora, only=".layers."), mx.float32)
    model.freeze()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.unfreeze(keys=["a", "b", "m"], recurse=False)
    mx.eval(model.parameters())
    return model


def batch_of(*rows: tuple[int, ...], vocab: int = 60, seed: int = 3) -> Batch:
    """Return a batch whose rows have segments of these lengths; the first token is not trained."""
    length = max(map(sum, rows))
    columns: list[list[list[int]]] = [[] for _ in range(3)]
    for row in rows:
        rest = length - sum(row)
        columns[0].append([n for n, size in enumerate(row, 1) for _ in range(size)] + [0] * rest)
        columns[1].append([at for size in row for at in range(size)] + [0] * rest)
        columns[2].append(
            [int(0 < at < size - 1) for size in row for at in range(size)] + [0] * rest
        )
    segments, positions, weights = map(mx.array, columns)
    tokens = mx.random.randint(3, vocab, segments.shape, key=mx.random.key(seed))
    targets = mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    weights = weights.astype(mx.float32)
    return Batch(tokens, segments, positions, targets, weights, segments, weights[0], read(weights))


def read(weights: mx.array) -> mx.array:
    """Return the places of the weights above 0, and some others."""
    return mx.argsort(-weights.reshape(-1))[: int(weights.sum().item()) + 5].astype(mx.int32)


def row_of(batch: Batch, row: int) -> Batch:
    parts = [part[row : row + 1] for part in batch]
    return Batch(*parts[:-1], read(parts[4]))


def leaves(tree) -> dict[str, mx.array]:
    return dict(utils.tree_flatten(tree))


def far(left, right) -> float:
    """Return the largest difference, relative to the largest element of its array."""
    one, other = leaves(left), leaves(right)
    assert one.keys() == other.keys()
    return max(
        (mx.abs(one[name] - other[name]).max() / mx.abs(other[name]).max()).item() for name in one
    )


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_inference_model(name):
    """Each segment by itself, by the other form of the model."""
    model, batch = trainee(name), batch_of((30, 17, 90), (70, 50))
    found = token_losses(model, batch)
    for row, start, end in ((0, 0, 30), (0, 30, 47), (0, 47, 137), (1, 0, 70), (1, 70, 120)):
        logits = model(batch.tokens[row : row + 1, start:end])[0]
        expected = nn.losses.cross_entropy(logits, batch.targets[row, start:end])
        expected = expected * batch.weights[row, start:end]
        assert far(found[row, start:end], expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_inference_model(name):
    """The gradient of every operation, with and without one of our own, in one segment."""
    model, batch = plain_model(name), batch_of((100,))

    def plain(model: OpenELM) -> mx.array:
        return (nn.losses.cross_entropy(model(batch.tokens), batch.targets) * batch.weights).sum()

    def own(model: OpenELM) -> mx.array:
        return (token_losses(model, batch, Training()) * batch.weights).sum()

    for one in (model, trainee(name), trainee(name, dora=True)):
        (loss, grads), (other, expected) = (nn.value_and_grad(one, f)(one) for f in (own, plain))
        assert far(grads, expected) < 1e-5 and far([loss], [other]) < 1e-6


def test_a_compiled_step_equals_an_eager_one():
    """A GPU is given a step as one graph. A processor traces it too, in a process that finds no C++
    compiler in PATH; with one it would build dozens of kernels.
    """
    environment = {**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [plain_model, trainee, partial(trainee, dora=True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_graph_of_a_step_can_be_made_for_a_gpu(make, checkpointing):
    """With its fused kernels, which are only built when they run."""
    own = Step(make(), FinetuneOptions(gradient_checkpointing=checkpointing, dropout=0.1))
    parameters, batch = own.model.trainable_parameters(), batch_of((9, 17), (25,))
    sums, grads = mx.compile(own._gradients)(parameters, batch, KEY, None)
    assert mx.compile(own._sums)(parameters, batch, None)[0].shape == ()
    state = own.optimizer.state
    updated, _, norm = mx.compile(own._update)(parameters, state, grads, sums[1], mx.array(1e-3))
    shapes = [
        {name: array.shape for name, array in utils.tree_flatten(tree)}
        for tree in (parameters, grads, updated)
    ]
    assert shapes[0] == shapes[1] == shapes[2] and norm.shape == ()


def compare(make: Callable[[], OpenELM], options: FinetuneOptions) -> None:
    """Take two steps that are compiled as a whole, and two that are not."""
    batch = batch_of((9, 17), (25,))
    one, other = (Step(make(), options) for _ in range(2))
    one._compiled = [mx.compile(part) for part in (one._gradients, one._update, one._sums)]
    for number in range(2):
        key = mx.random.key(number)
        (sums, grads), (plain, expected) = one.gradients(batch, key), other.gradients(batch, key)
        assert far(grads, expected) < 1e-5 and far([sums.total], [plain.total]) < 1e-6
        norms = [own.update(grads, sums.count, 1e-3) for own in (one, other)]
        assert far(norms[:1], norms[1:]) < 1e-5
        assert far(*(own.model.trainable_parameters() for own in (one, other))) < 1e-5
        assert far(*([own.evaluate(batch).total] for own in (one, other))) < 1e-6


def test_gradients_add_up():
    """Over two batches as over one that has the rows of both."""
    own, key = Step(trainee(), FinetuneOptions()), KEY
    both = batch_of((9, 17), (26,))
    first, second = (row_of(both, row) for row in range(2))
    sums, grads = own.gradients(second, key, own.gradients(first, key))
    expected, whole = own.gradients(both, key)
    assert far(grads, whole) < 1e-5
    assert far([sums.total], [expected.total]) < 1e-6 and sums.count.item() == expected.count.item()


@pytest.mark.parametrize("name", ["tied-gqa4", "untied-mha"])
@pytest.mark.parametrize("make", [plain_model, trainee])
def test_layers_and_chunks_are_computed_again(monkeypatch, name, make):
    """Gradients stay as they are, with dropout too; the head of `plain_model` is trained."""
    model, batch = make(name), batch_of((30, 17), (47,))
    kinds = [{"gradient_checkpointing": value} for value in (False, True)]
    steps = [Step(model, FinetuneOptions(dropout=0.2, z_loss=0.01, **kind)) for kind in kinds]
    parameters = model.trainable_parameters()
    sums, grads = steps[0].gradients(batch, KEY)
    monkeypatch.setattr(forward, "CHUNK", 20 * model.args.vocab_size)
    plain, expected = steps[1].gradients(batch, KEY)
    assert far(grads, expected) < 1e-5 and far([sums.total], [plain.total]) < 1e-6
    after = leaves(model.trainable_parameters())
    assert all(after[name] is array for name, array in leaves(parameters).items())


def test_layers_that_are_computed_again_take_less_memory():
    model, batch, peaks = trainee(), batch_of((100, 156), (256,)), []
    mx.eval(batch)
    for again in (False, True):
        own = Step(model, FinetuneOptions(gradient_checkpointing=again))
        gc.collect()  # what earlier tests have left would be freed now
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(own.gradients(batch, KEY))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.9 * peaks[0], peaks  # of few layers


def test_losses_round_as_in_an_evaluation():
    """So preferences have no margin before anything is learned."""
    model, targets = plain_model(), mx.arange(2000) % 60
    hidden = mx.random.normal((2000, model.args.model_dim), scale=3, key=KEY)
    evaluated = forward.head_losses(model, hidden, targets, None)
    for frozen in (False, True):  # the head: computed again for its gradients, or with them
        if frozen:
            model.freeze()
        assert mx.array_equal(forward.head_losses(model, hidden, targets, Training()), evaluated)


def test_z_loss_is_the_square_of_the_log_of_the_sum():
    for model in (trainee(), plain_model()):
        batch = batch_of((40,))

        def plain(model: OpenELM, batch: Batch = batch) -> mx.array:
            logits = model(batch.tokens)
            losses = nn.losses.cross_entropy(logits, batch.targets)
            return ((losses + 0.5 * mx.logsumexp(logits, axis=-1) ** 2) * batch.weights).sum()

        own = Step(model, FinetuneOptions(z_loss=0.5))
        sums, grads = own.gradients(batch, KEY)
        loss, expected = nn.value_and_grad(model, plain)(model)
        assert far(grads, expected) < 1e-5 and far([sums.total], [loss]) < 1e-6
        assert own.evaluate(batch).total.item() < sums.total.item()  # not in an evaluation


def test_dropout_leaves_out_inputs_of_the_low_rank_part():
    model, share = trainee(), 0.25
    module = model.layers[0].ffn.proj_1
    x = mx.random.normal((5, model.args.model_dim))
    parts = [part for part in model.modules() if type(part) is Adapted]
    with dropout(model, share, KEY):
        found, same, other = module(x), module(x), model.layers[1].ffn.proj_1._dropout
    place = next(at for at, part in enumerate(parts) if part is module)
    key = mx.random.split(KEY, len(parts))[place]
    mask = mx.random.uniform(shape=x.shape, key=key) < 1 - share
    low = module.scale * ((x * mask / (1 - share)) @ module.a.T) @ module.b.T
    assert 0.1 < 1 - mask.mean().item() < 0.4 and other[1].tolist() != key.tolist()
    assert far([found], [module.base(x) + low]) < 1e-6 and far([same], [found]) == 0
    assert far([module(x)], [module.base(x) + module.scale * (x @ module.a.T) @ module.b.T]) < 1e-6


def test_dropout_follows_from_the_key_and_evaluation_has_none():
    model, batch = trainee(), batch_of((20, 10))
    own = Step(model, FinetuneOptions(dropout=0.5))
    totals = [own.gradients(batch, mx.random.key(n))[0].total.item() for n in (1, 2, 1)]
    assert totals[0] == totals[2] != totals[1]
    without = Step(model, FinetuneOptions()).evaluate(batch).total.item()
    assert own.evaluate(batch).total.item() == without not in totals


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer):
    own = Step(trainee(), FinetuneOptions(optimizer=optimizer))
    batch = batch_of((20, 10))
    sums, grads = own.gradients(batch, KEY)
    own.update(grads, sums.count, 1e-3)
    sums, grads = own.gradients(batch, KEY)
    before = leaves([own.model.trainable_parameters(), own.optimizer.state])
    before = {name: array.tolist() for name, array in before.items()}
    grads["transformer"]["layers"][1]["ffn"]["proj_2"]["b"] *= float("nan")
    norm = own.update(grads, sums.count, 2e-3)
    assert not mx.isfinite(norm).item()
    after = leaves([own.model.trainable_parameters(), own.optimizer.state])
    assert before == {name: array.tolist() for name, array in after.items()}
    assert own.update(own.gradients(batch, KEY)[1], mx.array(0.0), 1e-3).item() > 0  # no division


if __name__ == "__main__":
    forward.CHUNK = 20 * 128  # several chunks
    compare(plain_model, FinetuneOptions())
    compare(trainee, FinetuneOptions(dropout=0.3))
    compare(partial(trainee, dora=True), FinetuneOptions(clip=0.0, gradient_checkpointing=True))


def test_the_norm_of_large_gradients_is_that_of_float64() -> None:
    """Most of their squares are much smaller than the sum."""
    layer = nn.Linear(256, 4096, bias=False)
    key, other = mx.random.split(KEY)
    rows = mx.exp(2 * mx.random.normal((4096, 1), key=other))
    grad = mx.random.normal((4096, 256), key=key) * rows
    options = FinetuneOptions(method="full", optimizer="sgd", clip=0.0)
    norm = Step(layer, options).update({"weight": grad}, mx.array(1.0), 0.0)  # type: ignore[arg-type]
    assert norm.item() == pytest.approx(np.linalg.norm(np.array(grad, np.float64)), rel=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_in_16_bits_keeps_its_type_and_gives_losses_in_float32(dora, monkeypatch):
    model, batch, seen = trainee(dora=dora, dtype=mx.bfloat16), batch_of((7, 5), (9,)), []
    compute = forward.layer_output

    def looked_at(*arguments):
        seen.append(compute(*arguments).dtype)
        return compute(*arguments)

    monkeypatch.setattr(forward, "layer_output", looked_at)
    sums, grads = Step(model, FinetuneOptions()).gradients(batch, KEY)
    assert {*seen} == {mx.bfloat16} and sums.total.dtype == mx.float32
    assert {grad.dtype for _, grad in utils.tree_flatten(grads)} == {mx.float32}
    same = Step(trainee(dora=dora), FinetuneOptions()).gradients(batch, KEY)[0]
    assert sums.total.item() == pytest.approx(same.total.item(), rel=0.01)
