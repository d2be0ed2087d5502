"""The memory of a fine-tuning: the prediction is what is measured, and what does not fit is made
smaller or refused.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from test_step import batch_of, trainee
from training import options, small_engine, write_pairs

from openelm_mlx.device import mx
from openelm_mlx.errors import FinetuneError
from openelm_mlx.finetune import finetune, memory
from openelm_mlx.finetune.batches import Shape
from openelm_mlx.finetune.memory import Prediction, arrays_of, fitted, largest, predict
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.graph.memory import Pace, evaluation_order, peak
from openelm_mlx.graph.trace import trace

LORA = FinetuneOptions(batch=4, dropout=0.1)


def shape(rows: int, length: int) -> Shape:
    return Shape(rows, length, rows * length, rows)


def shapes_of(options: FinetuneOptions) -> list[Shape]:
    return [shape(options.batch, 64)]


def step_of(options: FinetuneOptions) -> Step:
    return Step(trainee(), options)


@pytest.mark.parametrize("flags", [(), ("--method", "dora", "--gradient-checkpointing")])
def test_the_peak_of_a_process_is_the_predicted_one(flags):
    command = ["-m", "openelm_mlx.benchmarks.scripts.finetune_memory", "openelm-tiny", "--json"]
    corners = ["--corners", "1x128x24", *(["2x128"] if flags else ["1x128", "1x256"])]
    run = subprocess.run([sys.executable, *command, *corners, *flags], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(corners) - 1
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.1), row


def test_more_rows_and_longer_ones_take_more():
    step = step_of(LORA)
    small = predict(step, LORA, [shape(1, 32)])
    for other in (shape(2, 32), shape(1, 64)):
        assert predict(step, LORA, [other]).activations > 1.5 * small.activations
    several = predict(step, LORA, [shape(1, 32), shape(2, 32), shape(1, 64)])
    assert several.total == max(
        predict(step, LORA, [one]).total for one in (shape(2, 32), shape(1, 64))
    )
    summed = predict(step, replace(LORA, accumulate=2), [shape(1, 32)])
    assert summed.total - small.total == small.trained  # the sum of earlier gradients


def test_recomputed_layers_take_less():
    options = replace(LORA, gradient_checkpointing=True)
    most = [predict(step_of(one), one, [shape(4, 128)]).activations for one in (LORA, options)]
    assert most[1] < 0.7 * most[0]


def test_only_shapes_that_could_take_the_most_are_looked_at():
    assert largest([shape(4, 32), shape(2, 32), shape(1, 128), shape(1, 128), shape(2, 64)]) == [
        shape(1, 128)
    ]
    assert set(largest([shape(8, 32), shape(1, 128)])) == {shape(8, 32), shape(1, 128)}


def test_a_prediction_changes_nothing():
    """The step computes afterwards what it does without one, and its arrays are those it had."""
    batch, results = batch_of((5, 3), (6,)), []
    for predicted in (False, True):
        step = step_of(LORA)
        before = step.model.trainable_parameters()
        if predicted:
            predict(step, LORA, [Shape(*batch.tokens.shape, batch.trained.size, batch.counts.size)])
            after = step.model.trainable_parameters()
            both = [arrays_of(tree) for tree in (before, after)]
            assert all(now is old for now, old in zip(*both, strict=True))
        sums, grads = step.gradients(batch, mx.random.key(3))
        norm = step.update(grads, sums.count, 1e-2)
        results.append([sums.total.item(), norm.item(), step.evaluate(batch).total.item()])
    assert results[0] == results[1]


def test_a_graph_that_mlx_does_not_tell_is_that_of_a_processor(monkeypatch):
    """So it is with the gradient of cuDNN's attention, which no test has here."""
    step, real, told = step_of(LORA), memory.trace, []

    def trace_later(*given):
        told.append(given)
        if len(told) == 1:
            raise ValueError("[export_function] Unable to get state for primitive")
        return real(*given)

    plain = predict(step, LORA, [shape(1, 32)])
    monkeypatch.setattr(memory, "trace", trace_later)
    assert predict(step, LORA, [shape(1, 32)]) == plain


def test_a_batch_that_does_not_fit_is_computed_in_parts():
    needed = {batch: predict(step_of(LORA), LORA, [shape(batch, 64)]).total for batch in (1, 2, 4)}
    trained = predict(step_of(LORA), LORA, [shape(1, 64)]).trained
    fits = fitted(step_of, LORA, shapes_of, needed[4])
    assert (fits.options, fits.notice) == (LORA, "")
    assert fits.predicted.total == needed[4] == fits.predicted.as_dict()["total"]
    halved = fitted(step_of, LORA, shapes_of, needed[4] - 1)
    assert (halved.options.batch, halved.options.accumulate) == (2, 2)
    assert halved.predicted.total == needed[2] + trained
    text = r"A batch of 4 needs about .* MB, and there are .* MB; "
    text += r"2 batches of 2 are computed instead \(about .* MB\)\."
    assert re.fullmatch(text, halved.notice)
    least = fitted(step_of, replace(LORA, accumulate=3), shapes_of, needed[1] + trained)
    assert (least.options.batch, least.options.accumulate) == (1, 12)


def test_what_fits_in_no_way_is_refused_with_the_ways_that_would():
    least = predict(step_of(LORA), replace(LORA, accumulate=2), [shape(1, 64)])
    one = "training needs about .* for one row of 64 tokens, and there are .*; it fits with half"
    with pytest.raises(FinetuneError, match=one):
        fitted(step_of, LORA, shapes_of, least.total - 1)
    none = "none of half the --length .*, --gradient-checkpointing .*, --bits 4 .* is enough by"
    with pytest.raises(FinetuneError, match=f"{none} itself: use several, or a smaller model"):
        fitted(step_of, LORA, shapes_of, 1000)
    full = FinetuneOptions(method="full", batch=1)
    with pytest.raises(FinetuneError, match=r"--method lora \("):
        fitted(step_of, full, shapes_of, 1000)


def test_a_run_takes_the_batch_that_fits_and_keeps_it_when_it_goes_on(tiny, tmp_path):
    """MLX's own limit of memory is what there is on a processor."""
    engine, pairs = small_engine(tiny), write_pairs(tmp_path / "pairs.jsonl")
    whole = finetune(engine, pairs, tmp_path / "whole", options(batch=2, steps=2))
    assert whole.predicted_bytes["total"] > 0 and whole.options.batch == 2

    def interrupt(row, steps):
        raise KeyboardInterrupt

    before, folder = mx.set_memory_limit(whole.predicted_bytes["total"] - 1), tmp_path / "halved"
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(engine, pairs, folder, options(batch=2, steps=2), progress=interrupt)
    finally:
        mx.set_memory_limit(before)
    halved = finetune(engine, pairs, folder, options(batch=2, steps=2), resume=True)
    assert (halved.options.batch, halved.options.accumulate) == (1, 2)
    assert halved.predicted_bytes["total"] < whole.predicted_bytes["total"]
    assert halved.steps == whole.steps and halved.notes[0].startswith("A batch of 2 needs about ")
    written = json.loads((folder / "finetune.json").read_text())
    assert written["predicted_bytes"] == halved.predicted_bytes


def test_a_reference_beside_the_model_counts():
    plain, beside = (predict(step_of(LORA), LORA, [shape(1, 32)], kept) for kept in (0, 1000))
    assert beside == plain._replace(weights=plain.weights + 1000)
    assert str(Prediction(1, 2, 3, 0, 10**9, shape(1, 8))) == (
        "1.0 GB (weights 0.0 MB, trained 0.0 MB, optimizer 0.0 MB, gradients 0.0 MB, "
        "activations 1.0 GB)"
    )


def test_buffers_live_as_in_mlx():
    """Counted by hand, in matrices of 4 x 4: `x` is the caller's."""
    x = mx.ones((4, 4))
    for function, most in (
        (lambda x: [(x @ x).sin().exp()], 1),  # each writes over the one before
        (lambda x: [x @ x, (x @ x).sin()], 2),  # the first is an output
        (lambda x: [(x.T @ x).T.exp() @ x], 2),  # a view takes none
        (lambda x: [mx.concatenate([x.sin(), x.exp()]).sum(axis=0, keepdims=True)], 4),
    ):
        graph = trace(function, x)
        assert peak(graph) == most * x.nbytes, graph.nodes
    chain = trace(lambda x: [x @ x @ x @ x @ x @ x], x)
    assert [node.name for node in evaluation_order(chain)] == ["Matmul"] * 5
    assert peak(chain) == 2 * x.nbytes
    assert peak(chain, (), Pace(2, 1)) == 3 * x.nbytes  # what is read is held a while longer
    assert peak(chain, (), Pace()) == 5 * x.nbytes
    assert peak(trace(lambda x: [x.sin()], x), {"A"}) == x.nbytes  # given: it is written over
