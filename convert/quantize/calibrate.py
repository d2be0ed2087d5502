"""Calibration: the text it is done on, and rounding learned on that text for any plan.

The text is the user's own or what the exact model itself writes: a model's own samples show the
distribution that quantization must keep, need no download and no licence, and are the same on every
run (data-free calibration: Liu et al., arXiv:2305.17888). Matrices are rounded one after another,
each on the inputs that the rounded ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openelm_mlx import device
from openelm_mlx.convert.quantize import (
    EMBEDDINGS,
    NORM,
    Hook,
    Weights,
    embedded,
    head,
    head_stem,
    head_weights,
    in_batches,
    last_states,
    layer,
    normed,
    of_layer,
    through,
)
from openelm_mlx.convert.quantize.rounding import (
    DAMPING,
    Codes,
    Learned,
    error_feedback,
    inverse_factor,
    rounded,
)
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES, name_of
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.compare import own_text
from openelm_mlx.files import read_text
from openelm_mlx.model.config import BOS, EOS, UNK, OpenELMConfig
from openelm_mlx.quantization import Plan, planned

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.convert.options import ConvertOptions, Progress
    from openelm_mlx.model.decoder import OpenELM

Encode = Callable[[str], list[int]]  # text to ids, without BOS
Moments = Callable[[], mx.array]  # computed when they are needed, and freed when they are used
PROMPTS = (
    *("", "The", "In", "A", "It was", "This is", "When", "He said", "She", "There was once", "We"),
    *("How to", "I think", "On the", "If you", "Once upon a time"),
)
QUESTIONS = (
    "Hello!",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how rain forms.",
    "Give me three tips for sleeping well.",
    "Tell me a story about a fox.",
    "How do I bake bread?",
    "Who are you?",
)
SEED = 17
ROW = 257  # tokens in a row of text: BOS and 256
ROWS_AT_ONCE = 16  # drawn together: a row's text does not depend on how many rows are wanted
CONTROL = (UNK, BOS, EOS)  # never in a plain sample, so that every row is full
MEASURE_TOKENS = 2048  # on which every matrix is measured
BATCH = 8  # rows of tokens in one pass
GPTQ_ROWS = 64  # give the second moments 16,384 tokens, more than any matrix has columns
LAYER_MATRICES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
TIED_DAMPING = 0.1  # tied embeddings are inputs too, where every column matters alike


def row_length(config: OpenELMConfig) -> int:
    return min(ROW, config.max_context_length)


def given_tokens(opened: OpenedModel, options: ConvertOptions) -> mx.array | None:
    """Return the rows of token ids of the user's text, None if none was given."""
    if options.calibration_text is None:
        return None
    rows, length = calibration_shape(opened.trimmed, options)
    return text_tokens(options.calibration_text, opened.tokenizer.processor.encode, length, rows)


def written_tokens(
    opened: OpenedModel, options: ConvertOptions, progress: Progress | None = None
) -> mx.array:
    """Return rows of token ids that the model writes."""
    model, encode = stored_model(opened), opened.tokenizer.processor.encode
    rows, length = calibration_shape(opened.trimmed, options)
    return sampled_tokens(model, encode, rows, length, progress, options.is_instruct)


def stored_model(opened: OpenedModel) -> OpenELM:
    """Return the source as a model that takes no more memory than it takes in its files.

    Quantized matrices stay quantized. Activations are in the type that the engine takes; matrices
    in a smaller one are widened, one by one, when they are used.
    """
    from openelm_mlx.engine.compute_type import compute_dtype
    from openelm_mlx.engine.loading import cast, quantize_as_stored
    from openelm_mlx.model.decoder import OpenELM

    model = OpenELM(opened.trimmed)
    plan = {stem: spec for stem, spec in opened.source.plan.items() if spec is not None}
    quantize_as_stored(model, plan)
    stored = name_of(opened.load(NORM).dtype)
    dtype = DTYPES[compute_dtype(opened.trimmed, stored, None, device.kind()).dtype].mlx
    arrays: dict[str, mx.array] = {}
    for name, shape in opened.shapes.items():
        quantized = planned(plan, name) is not None
        own = opened.packed(name) if quantized else {name: opened.load(name)}
        for key, array in own.items():
            small = len(shape) == 2 and not quantized and array.itemsize < dtype.size
            arrays[key] = array if small else cast(array, dtype)
        mx.eval(own)
    model.load_weights(list(arrays.items()))
    return model


def calibration_shape(config: OpenELMConfig, options: ConvertOptions) -> tuple[int, int]:
    """Return how many rows to calibrate on, and how many tokens a row has."""
    length = row_length(config)
    if options.calibrate is None:
        return measured_rows(length), length
    return max(1, options.calibration_tokens // length), length


def measured_rows(length: int) -> int:
    """Return on how many rows of so many tokens every matrix is measured."""
    return max(1, MEASURE_TOKENS // length)


def text_tokens(path: Path, encode: Encode, length: int, limit: int | None = None) -> mx.array:
    """Return a text file as rows [n, length], each after BOS, at most `limit` of them, spread
    evenly over the text.

    Raises `OptionError` for a file that cannot be read as UTF-8, `ConversionError` for one shorter
    than a row.
    """
    ids, step = encode(read_text(path, "--calibration-text")), length - 1
    rows = [[BOS, *ids[at : at + step]] for at in range(0, len(ids) - step + 1, step)]
    if not rows:
        raise ConversionError(
            f"{path} has {len(ids)} tokens; at least {step} are needed to measure anything"
        )
    if limit is not None and len(rows) > limit:
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    return mx.array(rows, dtype=mx.int32)


def sampled_tokens(
    model: OpenELM,
    encode: Encode,
    rows: int,
    length: int,
    progress: Progress | None = None,
    instruct: bool = False,
) -> mx.array:
    """Return rows [rows, length] that `model` writes after each of `PROMPTS` in turn.

    Every other row of an Instruct model is a conversation that starts with one of `QUESTIONS`; it
    goes on with the next turn when an answer ends.
    """
    parts = []
    for first in range(0, rows, ROWS_AT_ONCE):
        numbers = range(first, first + ROWS_AT_ONCE)
        prompts = [prompt_ids(encode, number, instruct)[:length] for number in numbers]
        banned = mx.zeros((ROWS_AT_ONCE, model.args.vocab_size))
        for row, number in enumerate(numbers):
            banned[row, mx.array(CONTROL[:2] if asks(number, instruct) else CONTROL)] = -mx.inf
        parts.append(own_text(model, prompts, length, SEED + first, banned))
        if progress is not None:
            progress(min(first + ROWS_AT_ONCE, rows), rows, "the model writes calibration text")
    return mx.concatenate(parts)[:rows]


def asks(row: int, instruct: bool) -> bool:
    return instruct and row % 2 == 1


def prompt_ids(encode: Encode, row: int, instruct: bool) -> list[int]:
    """Return the first tokens of a row, BOS included. A test compares turns with the engine's."""
    if not asks(row, instruct):
        return [BOS, *encode(PROMPTS[row % len(PROMPTS)])]
    question = QUESTIONS[row // 2 % len(QUESTIONS)]
    turns = "<|system|>\n", f"\n<|user|>\n{question}", "\n<|assistant|>\n"
    system, user, assistant = map(encode, turns)
    return [BOS, *system, EOS, *user, EOS, *assistant]


def calibrate(
    method: str,
    config: OpenELMConfig,
    exact: Weights,
    plan: Plan,
    tokens: mx.array,
    dtype: str,
    progress: Progress | None = None,
) -> Learned:
    """Learn the rounding of `plan` on tokens [rows, length]: by `gptq`, or by `distill`, which goes
    on from there and needs the whole model in memory.
    """
    goes_on = method == "distill"
    learned = calibrate_gptq(config, exact, plan, tokens[:GPTQ_ROWS], dtype, progress, goes_on)
    if not goes_on:
        return learned
    from openelm_mlx.convert.quantize.distill import distill

    return distill(config, exact, learned, tokens, progress=progress)


def calibrate_gptq(
    config: OpenELMConfig,
    exact: Weights,
    plan: Plan,
    tokens: mx.array,
    dtype: str,
    progress: Progress | None = None,
    keep_codes: bool = False,
) -> Learned:
    """Round every affine matrix of `plan` with error feedback on tokens [rows, length]; the others
    are rounded to nearest.

    The second moments come from the model rounded so far, so that later matrices make up for
    earlier ones. In memory are one layer, the inputs of it, and one matrix of second moments.
    """
    done, batches = Learned(plan, dtype), in_batches(tokens, BATCH)
    tied, layers = config.share_input_output_layers, config.num_transformer_layers
    place, count = 0, layers * len(LAYER_MATRICES) + (1 if tied else 2)

    def step(
        own: dict[str, mx.array], stem: str, moments: Moments | None, damping: float = DAMPING
    ) -> None:
        nonlocal place
        if progress is not None:
            progress(place, count, f"rounding {stem}")
        codes = round_one(done, own, stem, moments, damping)
        if codes is not None and keep_codes:
            done.codes[stem] = codes
        place += 1

    own = {f"{EMBEDDINGS}.weight": exact[f"{EMBEDDINGS}.weight"]}
    if tied:  # rounded as the head they are too, for the inputs that it has in the exact model
        step(own, EMBEDDINGS, partial(head_moments, config, exact, batches), TIED_DAMPING)
    else:
        step(own, EMBEDDINGS, None)
    inputs = embedded(own, batches)
    for number in range(layers):
        own = of_layer(exact, number)
        run = partial(layer, config, number, own)
        for stem in (f"transformer.layers.{number}.{matrix}" for matrix in LAYER_MATRICES):
            step(own, stem, partial(second_moments, run, inputs, stem))
        through(config, number, own, inputs)
    if not tied:
        own = head_weights(config, exact)
        stem = head_stem(config)
        step(own, stem, partial(second_moments, partial(head, config, own), inputs, stem))
    if progress is not None:
        progress(count, count, "rounded")
    return done


def round_one(
    done: Learned, own: dict[str, mx.array], stem: str, moments: Moments | None, damping: float
) -> Codes | None:
    """Round a matrix, and replace it in `own` by the weights that it stands for from now on.

    Returns its codes if it was rounded with error feedback, for inputs of these second moments or,
    with None, for columns that matter alike.
    """
    spec, name, kind = done.plan.get(stem), f"{stem}.weight", DTYPES[done.dtype].mlx
    if spec is None or spec.mode != "affine":
        own[name] = rounded(own[name], spec, kind)
        return None
    weights = np.asarray(own[name])
    if moments is None:
        factor = inverse_factor(np.eye(weights.shape[1], dtype=np.float32), damping)
    else:
        factor = inverse_factor(np.asarray(moments()), damping)
    codes = error_feedback(weights, factor, spec, kind)
    done.stored[name] = codes.arrays(name, kind)
    own[name] = dequantized(name, done.stored[name], spec)
    mx.eval(own[name], done.stored[name])
    return codes


def second_moments(
    run: Callable[[mx.array, Hook], Any], states: Iterable[mx.array], stem: str
) -> mx.array:
    """Return the mean of x x^T over the inputs of a matrix, [columns, columns]."""
    total, count = mx.array(0.0), 0
    for x in states:
        seen: dict[str, mx.array] = {}
        run(x, seen.__setitem__)
        total, count = total + seen[stem].T @ seen[stem], count + len(seen[stem])
        mx.eval(total)
    return total / count


def head_moments(config: OpenELMConfig, exact: Weights, batches: list[mx.array]) -> mx.array:
    """Return the second moments of the head's inputs in the exact model."""
    states, norm = last_states(config, exact, batches), {NORM: exact[NORM]}

    def run(x: mx.array, hook: Hook) -> None:
        hook(NORM, normed(config, norm, x).reshape(-1, x.shape[-1]))

    return second_moments(run, states, NORM)
