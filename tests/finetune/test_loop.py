"""The loop: what it writes, what it computes, when it ends, and what it refuses."""

from __future__ import annotations

import json

import pytest
from training import curve, options, small_engine

from openelm_mlx import load
from openelm_mlx.device import mx, utils
from openelm_mlx.errors import FinetuneError, OptionError
from openelm_mlx.finetune import finetune
from openelm_mlx.finetune.data import read_data
from openelm_mlx.finetune.run import prepared
from openelm_mlx.finetune.state import stored
from openelm_mlx.finetune.step import Step
from openelm_mlx.stopping import StopKey

IDS = mx.array([[1, 40, 90, 700, 3, 5]])


def test_a_run_writes_a_curve_a_report_and_the_best_weights(engine, pairs, tmp_path):
    told = []
    report = finetune(
        engine,
        pairs,
        tmp_path / "out",
        options(evaluate_every=2),
        progress=lambda row, steps: told.append((row, steps)),
    )
    rows = curve(tmp_path / "out")
    losses = [row["validation_loss"] for row in rows if "best" in row]
    assert [(row["step"], "best" in row) for row in rows] == [
        (0, True),
        *((1, False), (2, False), (2, True), (3, False), (4, False), (4, True)),
        *((5, False), (6, False), (6, True)),
    ]
    assert [row for row, _ in told] == [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()
    ]
    assert {steps for _, steps in told} == {6} and losses[-1] < losses[0]
    assert report.best_validation_loss == min(losses) and report.ended == "all steps are done"
    saved = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert saved == json.loads(json.dumps(report.as_dict())) and saved["options"]["rank"] == 2
    assert report.tokens == sum(row["tokens"] for row, _ in told if "tokens" in row)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"state.safetensors", "best.safetensors"}
    trained = engine.load_adapter(tmp_path / "out", "out").model
    assert mx.abs(trained(IDS) - engine.model(IDS)).max().item() > 0.01


def test_the_result_is_the_best_and_patience_ends_a_run(engine, pairs, tmp_path):
    """What is learned makes the loss on other words worse, sooner or later."""
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps({"prompt": "Whom?", "completion": "Snow White, of course!"}))
    asked = options(learning_rate=0.3, evaluate_every=1, patience=2, epochs=9.0, validation=others)
    report = finetune(engine, pairs, tmp_path / "out", asked)
    losses = [row["validation_loss"] for row in curve(tmp_path / "out") if "best" in row]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert (report.best_step, report.steps) == (best, best + 2) and report.steps < 36
    assert report.ended == "no better validation loss in 2 evaluations"


@pytest.mark.parametrize("more", [{"batch": 1, "accumulate": 6}, {"batch": 3, "accumulate": 2}])
def test_gradients_that_accumulate_equal_those_of_a_larger_batch(engine, pairs, tmp_path, more):
    """Tokens weigh the same, though batches have different numbers of them."""
    finetune(engine, pairs, tmp_path / "one", options(batch=6))  # all examples in each step
    finetune(engine, pairs, tmp_path / "more", options(**more))
    for one, other in zip(curve(tmp_path / "one"), curve(tmp_path / "more"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_step_of_more_than_an_epoch_is_told(engine, pairs, tmp_path):
    for accumulate, told in (
        (3, ()),
        (4, ("An epoch has fewer batches than the 4 of accumulate, so a step takes 3.",)),
    ):
        asked = options(batch=2, accumulate=accumulate)  # 6 examples are trained
        run = prepared(engine, pairs, tmp_path / "out", asked, False)
        assert run.notices == told and len(run.plan.batches(1)) == 3


def test_all_weights_become_a_model_with_equal_logits(engine, pairs, tmp_path):
    asked = options(method="full", learning_rate=1e-3)
    before = engine.model(IDS)
    finetune(engine, pairs, tmp_path / "out", asked)
    loaded = load(tmp_path / "out")
    assert mx.array_equal(loaded.model(IDS), engine.model(IDS))
    assert mx.abs(before - engine.model(IDS)).max().item() > 0.01
    assert loaded.tokenizer.encode("Once upon") == engine.tokenizer.encode("Once upon")


@pytest.fixture
def poisoned(engine, pairs, monkeypatch):
    """The place of an example whose loss, or whose gradients, are made not finite."""
    lines = pairs.read_text().splitlines()
    lines[4] = json.dumps({"prompt": "What?", "completion": "Zebra."})
    pairs.write_text("\n".join(lines))
    data, original = read_data(engine, pairs, options()), Step.gradients
    place = f"{pairs}, line 5"
    tokens = {one.where: set(one.tokens) for one in (*data.train, *data.validation)}
    (token, *_) = tokens.pop(place).difference(*tokens.values())

    def poison(loss, gradient):
        def gradients(step, batch, *more):
            sums, grads = original(step, batch, *more)
            bad = (batch.tokens == token).any()
            grads = utils.tree_map(lambda grad: mx.where(bad, grad * gradient, grad), grads)
            return sums._replace(total=mx.where(bad, loss, sums.total)), grads

        monkeypatch.setattr(Step, "gradients", gradients)
        return place

    return poison


def test_a_loss_that_is_not_finite_ends_a_run_with_step_and_example(
    engine, pairs, tmp_path, poisoned
):
    """The folder has the best weights before it: here the last ones, which are evaluated then."""
    place, out = poisoned(mx.inf, 1.0), tmp_path / "out"
    asked = options(batch=1, seed=2, evaluate_every=50, validation_share=0.01)
    with pytest.raises(FinetuneError) as raised:
        finetune(engine, pairs, out, asked)
    step = curve(out)[-1]["step"] + 1
    assert 1 < step < 8
    assert str(raised.value) == (
        f"step {step}: the loss is inf, in {place}; {out} has the weights of step {step - 1}; "
        "lower the learning rate, or look at the examples, and begin again in another folder"
    )
    report = json.loads((out / "finetune.json").read_text())
    assert report["ended"] == f"step {step}: the loss is inf, in {place}"
    assert report["best_validation_loss"] == curve(out)[-1]["validation_loss"]


@pytest.mark.parametrize(
    ("loss", "gradient", "said"),
    [(0.0, mx.nan, "norm of the gradients is nan"), (mx.inf, 1.0, "loss is inf")],
)
def test_what_is_not_finite_changes_no_weight(
    engine, pairs, tmp_path, poisoned, loss, gradient, said
):
    place, seen = poisoned(loss, gradient), list[dict[str, mx.array]]()
    asked = options(batch=1, seed=2, validation_share=0.0)
    run = prepared(engine, pairs, tmp_path / "out", asked, False)
    with pytest.raises(FinetuneError) as raised:
        run.whole(lambda *_: seen.append(stored(run.model, run.step.optimizer)), StopKey())
    what = f"step {len(seen) + 1}: the {said}, in {place}; "
    assert len(seen) > 1 and str(raised.value).startswith(what)
    now = stored(run.model, run.step.optimizer)
    del now["optimizer.learning_rate"], seen[-1]["optimizer.learning_rate"]
    assert all(mx.array_equal(now[name], before) for name, before in seen[-1].items())


def test_what_cannot_be_trained_is_refused(engine, tiny, pairs, tmp_path):
    with pytest.raises(OptionError) as raised:
        finetune(tiny, pairs, tmp_path / "out", options(method="full"))
    assert str(raised.value) == (
        "openelm-tiny is quantized, and quantized weights cannot be trained; give --method lora or "
        "dora, or a model that is not quantized"
    )
    half = small_engine(tiny)
    half.model.set_dtype(mx.float16)
    with pytest.raises(OptionError) as raised:
        finetune(half, pairs, tmp_path / "out", options(method="full"))
    assert str(raised.value) == (
        f"{half.name} is in float16, in which the squares of gradients underflow; load it in "
        "float32 or bfloat16, or give --method lora or dora"
    )
    assert not (tmp_path / "out").exists()


def test_weights_that_are_trained_keep_their_type(engine, pairs, tmp_path):
    """With the optimizer's they are what the memory of a run is predicted from."""
    engine.model.set_dtype(mx.bfloat16)
    asked = options(method="full", steps=2, learning_rate=0.01)
    run = prepared(engine, pairs, tmp_path / "out", asked, False)
    report = run.whole(lambda *_: None, StopKey())
    found = stored(run.model, run.step.optimizer)
    del found["optimizer.learning_rate"], found["optimizer.step"]
    assert {array.dtype for array in found.values()} == {mx.bfloat16}
    assert report.best_step == 2 and report.last_loss < report.first_loss
