"""Preference tuning: the published losses, against a reference that is the model as it was."""

from __future__ import annotations

import json
import math
from array import array

import numpy as np
import pytest
from float64 import Var, gradients
from float64_model import Reference
from golden_set import GOLDEN
from small import random_adapter, small_model
from training import curve, options, small_engine

from openelm_mlx.device import mx, utils
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune import finetune
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.examples import Example, Pair
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.preference import between, loss_of, note, preference_loss
from openelm_mlx.finetune.step import Step, cross_entropy
from openelm_mlx.finetune.trainable import trainable
from openelm_mlx.model.adapters import Adapted, adapted
from openelm_mlx.model.decoder import OpenELM

PROMPT, KEY = [1, 7, 20, 31, 9], mx.random.key(7)
ANSWERS = [([5, 17, 2], [40, 2]), ([33, 2], [8, 9, 10, 44, 2]), ([6, 2], [50, 2]), ([9, 9, 2], [2])]


def pair_of(*answers: list[int]) -> Pair:
    sides = [array("i", [*PROMPT, *answer]) for answer in answers]
    marks = [bytes(len(PROMPT)) + b"\1" * len(answer) for answer in answers]
    return Pair(*(Example(*side, "") for side in zip(sides, marks, strict=True)))


PAIRS = [pair_of(*answers) for answers in ANSWERS]


def batch_of(pairs: list[Pair]) -> Batch:
    """Return two rows of pairs, with room for more sequences than there are."""
    rows = [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]
    return packed(rows, Shape(2, 44, 40, 2 * len(pairs) + 4))


@pytest.fixture
def engine(tiny):
    config, weights = small_model("tied-gqa4")
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return Engine(model, tiny.tokenizer, config, "small", GOLDEN)


def changed(engine: Engine) -> OpenELM:
    """Return the model with an adapter of projections that has learned something, to train on."""
    model = adapted(engine.model, random_adapter(engine.model, 1, only=".ffn."), mx.float32)
    model.freeze()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.unfreeze(keys=["a", "b"], recurse=False)
    return model


def published(kind: str, h: Var, beta: float) -> Var:
    """Return the loss of one pair, and how it depends on h."""
    x = float(h.value)
    if kind == "sigmoid":
        return h.each(np.log1p(np.exp(-beta * x)), -beta / (1 + np.exp(beta * x)))
    if kind == "hinge":
        return h.each(max(0.0, 1 - beta * x), -beta * (beta * x < 1))
    return h.each((x - 1 / (2 * beta)) ** 2, 2 * (x - 1 / (2 * beta)))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_losses_and_gradients_are_the_published_ones(engine, kind):
    model, beta = changed(engine), 0.7
    step = Step(model, FinetuneOptions(), preference_loss(engine.model, kind, beta))
    sums, grads = step.gradients(batch_of(PAIRS), KEY)

    weights = {name: Var(np.array(array)) for name, array in parameters_of(engine).items()}
    adapter = random_adapter(engine.model, 1, only=".ffn.")
    parts = {
        stem: {"a": Var(np.array(one.a)), "b": Var(np.array(one.b)), "scale": Var(one.scale)}
        for stem, one in adapter.parts.items()
    }
    policy = Reference(engine.config, weights, parts)
    reference = Reference(engine.config, weights)
    hs = []
    for pair in PAIRS:
        sides = [
            (reference.losses(one.tokens) - policy.losses(one.tokens))[len(PROMPT) - 1 :].sum()
            for one in pair
        ]
        hs.append(sides[0] - sides[1])
    margins = beta * np.array([float(h.value) for h in hs])
    assert (margins > 1).any() and (margins < 1).any()  # hinge has a slope, and none
    total = sum((published(kind, h, beta) for h in hs), Var(0.0))
    assert sums.total.item() == pytest.approx(float(total.value), rel=1e-5)
    assert sums.count.item() == len(PAIRS)
    assert sums.extra["reward_margin"].item() == pytest.approx(margins.sum(), rel=1e-5)
    assert sums.extra["reward_accuracy"].item() == (margins > 0).sum()
    expected = gradients(total, {f"{s}.{n}": parts[s][n] for s in parts for n in ("a", "b")})
    found = {name: np.array(grad) for name, grad in utils.tree_flatten(grads)}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert np.abs(found[name] - grad).max() <= 1e-5 * np.abs(grad).max(), name


def parameters_of(engine: Engine) -> dict[str, mx.array]:
    return dict(utils.tree_flatten(engine.model.parameters()))


@pytest.mark.parametrize("method", ["lora", "dora", "full", "further"])
def test_a_run_begins_where_the_model_was(engine, method):
    """No pair has a margin, so the losses are log 2, 1 and 1 / (4 beta^2)."""
    batch, beta = batch_of(PAIRS), 0.2
    if method == "further":  # an adapter that has learned, as from answers alone
        learned = random_adapter(engine.model, 1, only=".ffn.")
        engine, method = engine.load_adapter(learned, "first"), "lora"
    for kind, expected in {"sigmoid": math.log(2), "hinge": 1, "ipo": 1 / (4 * beta**2)}.items():
        options = FinetuneOptions(method=method, preference=kind, beta=beta)
        model = trainable(engine, options)
        step = Step(model, options, loss_of(engine, model, options, PAIRS))
        for sums in (step.evaluate(batch), step.gradients(batch, KEY)[0]):
            assert sums.total.item() / sums.count.item() == pytest.approx(expected, rel=1e-5)
            margin = abs(sums.extra["reward_margin"].item())
            assert margin < 1e-4 if method == "dora" else margin == 0
    # the one graph that a GPU is given can be made; it is built only where it runs
    mx.compile(step._gradients)(model.trainable_parameters(), batch, KEY, None)


def test_the_reference_is_the_model_without_its_adapter(engine):
    reference = between(engine.model, batch_of(PAIRS))
    for number, pair in enumerate(PAIRS):
        sides = []
        for one in pair:
            tokens = mx.array([list(one.tokens)])
            logits = engine.model(tokens)[0, len(PROMPT) - 1 : -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            answer = tokens[0, len(PROMPT) :]
            sides.append(mx.take_along_axis(logprobs, answer[:, None], axis=1).sum().item())
        assert reference[number].item() == pytest.approx(sides[0] - sides[1], abs=1e-4)
    assert reference[len(PAIRS) :].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_raises_the_margin(engine, method):
    options = FinetuneOptions(method=method, preference="sigmoid")
    model = trainable(engine, options)
    before = between(engine.model, batch_of(PAIRS))
    step = Step(model, options, loss_of(engine, model, options, PAIRS))
    losses, margins = [], []
    for number in range(4):
        sums, grads = step.gradients(batch_of(PAIRS), mx.random.key(number))
        mx.eval(sums, grads)
        step.update(grads, sums.count, 3e-3)
        losses.append(sums.total.item())
        margins.append(sums.extra["reward_margin"].item())
    assert losses == sorted(losses, reverse=True) and margins == sorted(margins)
    assert step.evaluate(batch_of(PAIRS)).extra["reward_accuracy"].item() == len(PAIRS)
    if method == "full":  # the model itself was trained, and its reference stayed
        assert not np.allclose(between(engine.model, batch_of(PAIRS)), before)
    else:
        assert np.array_equal(between(engine.model, batch_of(PAIRS)), before)


def test_gradients_of_two_batches_are_those_of_one(engine):
    step = Step(changed(engine), FinetuneOptions(), preference_loss(engine.model, "sigmoid", 0.3))
    whole = step.gradients(batch_of(PAIRS), KEY)
    first = step.gradients(batch_of(PAIRS[:2]), KEY)
    both = step.gradients(batch_of(PAIRS[2:]), KEY, first)
    for one, other in zip(utils.tree_flatten(both), utils.tree_flatten(whole), strict=True):
        size = max(mx.abs(other[1]).max().item(), other[0].endswith("reward_margin"))  # of sums
        assert np.allclose(one[1], other[1], rtol=0, atol=1e-5 * size), one[0]


def test_a_step_takes_hardly_more_memory_than_one_on_answers(tiny):
    """The reference is computed before the model has any activations, and keeps none."""
    engine, answers = small_engine(tiny), [[5 + n, 9] * 60 for n in range(4)]
    batch = packed([[pair_of(*answers[:2])], [pair_of(*answers[2:])]], Shape(2, 256, 512, 4))
    options, peaks = FinetuneOptions(), []
    for loss in (cross_entropy, preference_loss(engine.model, "sigmoid", 0.1)):
        model = trainable(engine, options)
        step = Step(model, options, loss)
        mx.eval(model.parameters(), batch)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step.gradients(batch, KEY))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 0 and peaks[1] <= 1.15 * peaks[0]


def test_other_examples_have_the_loss_of_tokens(engine):
    examples = [PAIRS[0].chosen]
    assert loss_of(engine, engine.model, FinetuneOptions(), examples) is cross_entropy


def test_a_second_copy_is_said(engine):
    assert note(engine, FinetuneOptions()) == ""
    assert note(engine, FinetuneOptions(method="full")) == (
        "All weights are trained, so the reference of the preferences is a second copy of "
        f"small's weights, {engine.nbytes / 1e6:,.0f} MB."
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_reports_rewards_and_goes_on_from_where_it_began(tiny, tmp_path, method):
    engine, data, beta = small_engine(tiny), tmp_path / "pairs.jsonl", 0.2
    pairs = [
        {
            "prompt": f"What is {n}?",
            "chosen": "It is " + "so " * n + "good.",
            "rejected": f"It: {n}.",
        }
        for n in range(6)
    ]
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    rates = {"lora": 1e-2, "full": 1e-3}
    how = options(
        method=method, preference="ipo", beta=beta, steps=2, length=64, learning_rate=rates[method]
    )
    report = finetune(engine, data, tmp_path / "out", how)
    said = "All weights are trained, so the reference of the preferences is a second copy of "
    assert sum(note.startswith(said) for note in report.notes) == (method == "full")
    rows = curve(tmp_path / "out")
    first, last = rows[0], rows[-1]
    assert first["validation_loss"] == pytest.approx(1 / (4 * beta**2), rel=1e-4)
    assert abs(first["validation_reward_margin"]) < 1e-3 < last["validation_reward_margin"]
    assert {"reward_margin", "reward_accuracy"} < rows[1].keys()

    def stop(row, steps):
        if row["step"] == 1 and "loss" in row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(small_engine(tiny), data, tmp_path / "again", how, progress=stop)
    finetune(small_engine(tiny), data, tmp_path / "again", how, resume=True)
    assert curve(tmp_path / "again") == rows
