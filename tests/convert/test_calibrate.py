"""Learned rounding: packing, grids, error feedback and distillation, each against plain rounding or
MLX itself.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from formats import again, random_folder, tokenizer_file
from golden_set import GOLDEN
from small import random_tokens, small_model, true_loss

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import LazyWeights, exact_weights, logits, rounding
from openelm_mlx.convert.quantize.calibrate import (
    CONTROL,
    PROMPTS,
    QUESTIONS,
    calibrate,
    calibrate_gptq,
    prompt_ids,
    sampled_tokens,
    stored_model,
    text_tokens,
)
from openelm_mlx.convert.quantize.distill import Schedule, Start, distill, finished
from openelm_mlx.convert.quantize.losses import make_reference, nearest
from openelm_mlx.convert.quantize.plan import calibrate_best
from openelm_mlx.convert.quantize.rounding import (
    Learned,
    error_feedback,
    fitted_weights,
    inverse_factor,
    pack,
    rounded,
)
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.quantization import QuantSpec, matrices

AFFINE = [QuantSpec(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def even(columns):
    """The factor of inputs whose columns matter alike."""
    return inverse_factor(np.eye(columns, dtype=np.float32))


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_codes_are_packed_as_mlx_packs_them(spec):
    packed, scales, biases = mx.quantize(
        mx.array(gaussian(8, 256)), group_size=spec.group_size, bits=spec.bits
    )
    repeat = lambda side: np.repeat(np.array(side), spec.group_size, axis=1)  # noqa: E731
    values = np.array(
        mx.dequantize(packed, scales, biases, group_size=spec.group_size, bits=spec.bits)
    )
    codes = np.rint((values - repeat(biases)) / repeat(scales))
    assert mx.array_equal(pack(codes, spec.bits), packed)


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, 128)], ids=str)
def test_error_feedback_beats_nearest_rounding(spec):
    weights, inputs = (
        gaussian(16, 256),
        gaussian(400, 256, 1) @ gaussian(256, 256, 2) / 16,
    )  # correlated columns
    hessian = inputs.T @ inputs / len(inputs)
    loss = lambda other: float((((np.array(other) - weights) @ inputs.T) ** 2).mean())  # noqa: E731
    others = (way(mx.array(weights), spec, mx.float16) for way in (rounded, fitted_weights))
    learned = error_feedback(weights, inverse_factor(hessian), spec, mx.float16)
    assert loss(learned.weights()) < 0.7 * min(map(loss, others))
    arrays = learned.arrays("a.weight", mx.float16)
    assert np.abs(np.array(dequantized("a.weight", arrays, spec)) - learned.weights()).max() < 1e-5
    assert (np.abs(learned.before - learned.codes) <= 0.5).all()


def test_constant_rows_and_inputs_that_are_not_finite():
    flat = np.zeros((2, 64), np.float32)
    assert (
        np.abs(error_feedback(flat, even(64), QuantSpec(4, 64), mx.float16).weights()).max() < 1e-6
    )
    with pytest.raises(ConversionError, match="activations that are not finite"):
        inverse_factor(np.full((64, 64), np.inf))


def test_moments_become_the_factor_of_their_inverse():
    inputs = gaussian(300, 96) @ gaussian(96, 96, 1)
    moments = inputs.T @ inputs / 300
    damped = moments.astype(np.float64) + 0.1 * np.diag(moments).mean() * np.eye(96)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    assert np.allclose(inverse_factor(moments, 0.1), expected, rtol=1e-5, atol=1e-7)


def test_rows_are_rounded_and_packed_alike_some_at_a_time(monkeypatch):
    weights, inputs = gaussian(24, 128), gaussian(300, 128, 1)
    factor = inverse_factor(inputs.T @ inputs / 300)
    whole = error_feedback(weights, factor, QuantSpec(3, 32), mx.float16)
    arrays = whole.arrays("a.weight", mx.float16)
    monkeypatch.setattr(rounding, "PART", 5 * 128)
    parts = error_feedback(weights, factor, QuantSpec(3, 32), mx.float16)
    found = parts.arrays("a.weight", mx.float16)
    assert all(mx.array_equal(found[name], array) for name, array in arrays.items())
    assert np.array_equal(parts.before, whole.before)


@pytest.mark.parametrize("name", ["tied-gqa4", "untied-mha"])
def test_rounding_layer_by_layer_is_that_of_a_whole_model(name):
    config, weights = small_model(name)
    stems, tokens = list(matrices(expected_tensors(config))), random_tokens(config, rows=8)
    tied, chosen = config.share_input_output_layers, [s for s in stems if ".layers." not in s]
    plan = dict.fromkeys([*chosen, *stems[5:9]], QuantSpec(3, 32))
    lazy = LazyWeights(weights, weights.__getitem__)
    found = calibrate_gptq(config, lazy, plan, tokens, "float32").weights(weights)
    model = dict(weights)
    for stem in filter(plan.get, stems):
        moments, seen = np.eye(config.model_dim, dtype=np.float32), {}
        if tied or stem != stems[0]:
            logits(config, model, tokens, seen.__setitem__)
            moments = np.array(seen[stem].T @ seen[stem] / len(seen[stem]))
        name, damping = f"{stem}.weight", 0.1 if tied and stem == stems[0] else 0.01
        factor = inverse_factor(moments, damping)
        codes = error_feedback(np.array(weights[name]), factor, plan[stem], mx.float32)
        model[name] = mx.array(codes.weights())
    for name, array in model.items():
        same = mx.abs(array - found[name]) < 1e-4
        assert same.mean().item() > 0.98, name  # a last bit may tip the grid of a row


@pytest.mark.parametrize("name", ["tied-gqa4", "untied-mha"])
def test_each_method_loses_less_than_the_one_before(name):
    config, weights = small_model(name)
    shapes = expected_tensors(config)
    plan = dict.fromkeys(matrices(shapes), QuantSpec(2, 32))
    plan["transformer.layers.0.ffn.proj_1"] = QuantSpec(4, 32, "mxfp4")
    plan["transformer.layers.1.attn.out_proj"] = None
    tokens = random_tokens(config, rows=8)
    reference = make_reference(config, weights, tokens)
    learned = calibrate("gptq", config, weights, plan, tokens, "float16")
    starts = calibrate_gptq(config, weights, plan, tokens, "float16", keep_codes=True)
    trained, again = (
        distill(config, weights, starts, tokens, Schedule(epochs=4)) for _ in range(2)
    )
    losses = [true_loss(reference, plan, nearest("float16"))] + [
        reference.loss(found.weights(weights)) for found in (learned, trained)
    ]
    assert losses[1] < 0.85 * losses[0] and losses[2] < 0.9 * losses[1]
    assert learned.codes == {} and set(learned.stored) == {
        f"{stem}.weight" for stem in starts.codes
    }
    for tensor, parts in trained.stored.items():
        assert all(mx.array_equal(parts[part], again.stored[tensor][part]) for part in parts)
    assert "transformer.layers.0.ffn.proj_1.weight" not in trained.stored
    assert {name for name, shape in shapes.items() if len(shape) == 1} <= set(trained.stored)


def test_the_weights_that_are_trained_are_those_that_are_stored():
    spec = QuantSpec(3, 32)
    codes = error_feedback(gaussian(8, 64), even(64), spec, mx.float32)
    start = Start(codes, *map(mx.array, (codes.before, codes.scales, codes.biases)))
    shift = {"codes": 0.7, "scales": 0.1, "biases": -0.2}
    moved = {"codes": start.place, "scales": mx.zeros((8, 2)), "biases": mx.zeros((8, 2))}
    moved = {name: array + shift[name] for name, array in moved.items()}
    stored = finished(Learned({"m": spec}, "float32"), {"m": start}, [moved], {"norm": mx.ones(2)})
    exact = {"m.weight": mx.zeros((8, 64)), "norm": mx.zeros(2), "other": mx.ones(3)}
    found = stored.weights(exact)
    assert mx.allclose(found["m.weight"], start.weights(moved), atol=1e-5)
    assert not mx.allclose(found["m.weight"], mx.array(codes.weights()), atol=1e-2)
    assert found["norm"].sum() == 2 and found["other"].sum() == 3


def test_samples_are_the_models_own_and_do_not_depend_on_how_many():
    config, weights = small_model()
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    encode = lambda text: [5 + len(word) for word in text.split()]  # noqa: E731
    few, many = (sampled_tokens(model, encode, rows, 24) for rows in (3, 20))
    assert many.shape == (20, 24) and mx.array_equal(few, many[:3])
    assert (many[:, 0] == 1).all() and not any(
        (many[:, 1:] == control).any() for control in CONTROL
    )
    assert many[1, 1].item() == 5 + len("The")
    greedy_like = (
        mx.take_along_axis(model(many)[:, 4:-1], many[:, 5:, None], axis=-1).mean()
        - model(many).mean()
    )
    assert greedy_like.item() > 0  # likelier than a token drawn evenly


@pytest.mark.parametrize("spec", [{}, {"bits": 4, "group_size": 32}, {"mode": "nvfp4"}], ids=str)
def test_the_text_is_that_of_the_exact_model_without_its_memory(spec, tmp_path):
    source = again(
        random_folder(tmp_path / "source"), tmp_path / "stored", dtype="bfloat16", **spec
    )
    opened = open_model(ConvertOptions(source, tmp_path / "m"))
    model, exact = stored_model(opened), OpenELM(opened.trimmed)
    exact.load_weights(list(exact_weights(opened).items()))
    arrays = parameters(model)
    assert sum(array.nbytes for array in arrays.values()) < 0.7 * 4 * opened.trimmed.num_parameters
    tokens = random_tokens(opened.trimmed, rows=2)
    assert mx.allclose(model(tokens), exact(tokens), atol=1e-4, rtol=1e-4)


def test_an_instruct_model_also_answers(tiny):
    from openelm_mlx.engine.prompts import encode_messages

    encode = lambda text: tiny.tokenizer.encode(text, bos=False)  # noqa: E731
    want = encode_messages(tiny.tokenizer, [{"role": "user", "content": QUESTIONS[1]}])
    assert prompt_ids(encode, 3, instruct=True) == want
    assert (
        prompt_ids(encode, 2, instruct=True)
        == prompt_ids(encode, 2, instruct=False)
        == [1, *encode(PROMPTS[2])]
    )


def test_calibration_text_of_a_user(tmp_path):
    encode = lambda text: [ord(letter) for letter in text]  # noqa: E731
    path = tmp_path / "mine.txt"
    path.write_text("abcdefghijk")
    assert text_tokens(path, encode, 4).tolist() == [
        [1, 97, 98, 99],
        [1, 100, 101, 102],
        [1, 103, 104, 105],
    ]
    assert text_tokens(path, encode, 4, limit=2).tolist() == [[1, 97, 98, 99], [1, 100, 101, 102]]
    with pytest.raises(ConversionError, match="mine.txt has 11 tokens; at least 40 are needed"):
        text_tokens(path, encode, 41)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="cannot be read as UTF-8"):
        text_tokens(path, encode, 4)
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        text_tokens(tmp_path / "none.txt", encode, 4)


@pytest.mark.parametrize("method", ["gptq", "distill"])
def test_a_calibrated_folder_is_what_was_learned(method, tmp_path):
    from mlx_lm import load as mlx_lm_load

    text = tmp_path / "text.txt"
    text.write_text("once upon a time two birds flew in a forest with a fox who lived there " * 80)
    common = {
        "source": GOLDEN / "tied-gqa4" / "checkpoint.pt",
        "tokenizer": tokenizer_file(tmp_path),
        "dtype": "float16",
        "bits": 3,
        "group_size": 32,
        "verify_text": text,
    }
    plain = convert(ConvertOptions(target=tmp_path / "plain", **common))
    report = convert(
        ConvertOptions(
            target=tmp_path / "m",
            calibrate=method,
            calibration_text=text,
            calibration_tokens=1024,
            **common,
        )
    )
    assert report.written_bytes == plain.written_bytes
    assert (
        report.verification["mean_kl_divergence"] < 0.7 * plain.verification["mean_kl_divergence"]
    )
    tokens = mx.array([[1, 30, 44, 90, 7]])
    theirs, _ = mlx_lm_load(str(tmp_path / "m"))
    assert (
        mx.abs(theirs(tokens).astype(mx.float32) - load(tmp_path / "m").model(tokens)).max().item()
        < 0.05
    )
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["calibration"] == {
        "calibration_tokens": 1024,
        "calibration_text": "text.txt",
        "method": method,
    }
    assert f"--calibrate {method}" in record["command"] and str(tmp_path) not in json.dumps(record)


def test_the_better_of_two_calibrations_on_text_that_neither_saw():
    config, weights = small_model()
    plan = dict.fromkeys(matrices(expected_tensors(config)), QuantSpec(2, 32))
    tokens = random_tokens(config, rows=12)
    learned, record = calibrate_best(config, weights, plan, tokens, "float16")
    held = make_reference(config, weights, tokens[-2:])
    assert record["compared_tokens"] == 2 * tokens.shape[1]
    again = calibrate_gptq(config, weights, plan, tokens[:-2], "float16")
    assert held.loss(again.weights(weights)) == pytest.approx(record["losses"]["gptq"])
    assert held.loss(learned.weights(weights)) == pytest.approx(min(record["losses"].values()))
    assert record["losses"][record["method"]] == min(record["losses"].values())


@pytest.mark.parametrize("dry_run", [False, True])
def test_one_row_of_text_is_too_little_to_compare_on(tmp_path, dry_run):
    (tmp_path / "text.txt").write_text("once upon a time two birds flew in a forest " * 8)
    options = ConvertOptions(
        GOLDEN / "tied-gqa4" / "checkpoint.pt",
        tmp_path / "m",
        tokenizer=tokenizer_file(tmp_path),
        dtype="float16",
        target_bpw=4.0,
        calibrate="best",
        calibration_text=tmp_path / "text.txt",
        dry_run=dry_run,
    )
    with pytest.raises(ConversionError, match="has 64 tokens; --calibrate best .* at least 128"):
        convert(options)
    assert not (tmp_path / "m").exists()
