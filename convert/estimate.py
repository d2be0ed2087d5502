"""What a conversion needs, before it works: memory, step by step, and time.

Both follow from shapes and options; no weights are read. Memory is what the process takes beside
the interpreter and its imports. Every step has its parts, and needs their sum: steps come one after
another, so a conversion needs what its largest step needs. `tests/tools/conversion_memory.py`
compares this with measured peaks. Time is counted work over rates that are measured in a fraction
of a second, and a guess: other programs, the disk and the size of matrices change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize import calibrate, losses
from openelm_mlx.convert.quantize.distill import Schedule
from openelm_mlx.convert.quantize.grids import PART as FITTED
from openelm_mlx.convert.quantize.rounding import PART, error_feedback, fitted_weights
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.evaluate.compare import kl_divergence
from openelm_mlx.evaluate.score import POSITIONS
from openelm_mlx.model.config import layer_shapes
from openelm_mlx.quantization import QuantSpec, all_specs, matrices, planned, stem_of

Parts = dict[str, int]  # what takes memory at the same time -> bytes
FLOAT32 = 4
CHUNK_BYTES = 4 << 20  # of a matrix, in float32, that is rounded at a time to be written
DISK = 1e9  # bytes that are read or written in a second
WHOLE = 5  # whole plans that are measured: the chosen one, and uniform ones beside it
FREED = 160 << 20  # memory that is freed and not yet given back: the most that was measured


def memory_needed(steps: dict[str, Parts]) -> int:
    """Return the bytes of the largest step."""
    return max(sum(parts.values()) for parts in steps.values())


class Sizes:
    """Bytes of a model's parts in float32."""

    def __init__(self, opened: OpenedModel) -> None:
        self.config, stems = opened.trimmed, matrices(opened.shapes)
        self.head = FLOAT32 * self.config.vocab_size * self.config.model_dim
        self.largest = FLOAT32 * max(math.prod(shape) for shape in stems.values())
        self.columns = max(shape[1] for shape in stems.values())
        inner = {stem: FLOAT32 * math.prod(of) for stem, of in stems.items() if ".layers." in stem}
        self.matrix, self.layer = max(inner.values()), 0
        for number in range(self.config.num_transformer_layers):
            own = (size for stem, size in inner.items() if f".layers.{number}." in stem)
            self.layer = max(self.layer, sum(own))

    def states(self, tokens: int) -> int:
        return FLOAT32 * tokens * self.config.model_dim

    def activations(self, rows: int, length: int) -> int:
        """Return what one layer makes on its way from the states of these tokens to the next."""
        per_token = 0
        for shape in layer_shapes(self.config):
            ffn = shape.ffn_dim * (7 if self.config.ffn_with_glu else 4)
            attention = shape.q_heads * (2 * length + 4 * self.config.head_dim)
            per_token = max(per_token, ffn, attention)
        return FLOAT32 * rows * length * (per_token + 3 * self.config.model_dim)

    def logits(self, copies: int, positions: int = POSITIONS) -> int:
        return FLOAT32 * copies * positions * self.config.vocab_size

    def keys_and_values(self, tokens: int) -> int:
        heads = sum(shape.kv_heads for shape in layer_shapes(self.config))
        return FLOAT32 * tokens * 2 * heads * self.config.head_dim


def memory_steps(
    opened: OpenedModel,
    options: ConvertOptions,
    nbytes: int,
    texts: Sequence[mx.array] = (),
    activations: Sequence[mx.array] = (),
) -> dict[str, Parts]:
    """Return the steps of a conversion with what takes memory in each; `nbytes` are written, and
    verified on batches of token ids, `texts`. Activations are measured on other batches.
    """
    sizes = Sizes(opened)
    rows, length = calibrate.calibration_shape(opened.trimmed, options)
    steps = {"writing": writing(opened, sizes, nbytes)}
    if options.uses_text and options.calibration_text is None:
        steps["writing the calibration text"] = text_writing(opened, sizes, length)
    if options.target_bpw is not None:
        steps |= measuring(sizes, options.target_bpw, length)
    if options.calibrate is not None:
        steps |= feeding_back(sizes, min(rows, calibrate.GPTQ_ROWS), length, nbytes)
    if options.calibrate in ("distill", "best"):
        steps["distilling"] = distilling(sizes, opened.trimmed.num_parameters, rows, length)
    if texts:
        steps |= verifying(sizes, texts)
    if activations:
        steps |= looking(sizes, activations)
    return {name: parts | {"freed": FREED} for name, parts in steps.items()}


def writing(opened: OpenedModel, sizes: Sizes, nbytes: int) -> Parts:
    """Return the memory of writing: some files give a matrix only as a whole."""
    stored = 0
    for name, info in opened.source.tensors.items():
        per_weight = 6 if stem_of(name) in opened.quantized else itemsize(info.dtype)
        stored = max(stored, math.prod(info.shape) * per_weight)
    share = nbytes * sizes.largest // FLOAT32 // opened.trimmed.num_parameters
    rows = 14 * min(sizes.largest, CHUNK_BYTES)
    return {"a source tensor": stored, "what is written": 2 * share, "rows": rows}


def text_writing(opened: OpenedModel, sizes: Sizes, length: int) -> Parts:
    stored, widened, rows = 0, 0, calibrate.ROWS_AT_ONCE
    for name, shape in opened.shapes.items():
        spec, size = planned(opened.source.plan, name), itemsize(opened.source.tensors[name].dtype)
        if spec is not None:
            stored += spec.nbytes(shape, "float32")
            continue
        stored += math.prod(shape) * min(size, FLOAT32)
        if size < FLOAT32:
            widened = max(widened, FLOAT32 * math.prod(shape))
    return {
        "weights as they are stored": stored,
        "a matrix in float32": widened,
        "keys and values": 2 * sizes.keys_and_values(rows * length),
        "logits": sizes.logits(8, rows),
    }


def measuring(sizes: Sizes, target_bpw: float, length: int) -> dict[str, Parts]:
    near = len(losses.near_bits(target_bpw))
    tokens = calibrate.measured_rows(length) * length
    changes = near * (4 * sizes.config.num_transformer_layers + 2)
    states = sizes.states(tokens)
    rounding = 14 * min(sizes.largest, FLOAT32 * FITTED)
    models = 2 * states + min(changes * states, max(losses.STATES, states))
    return {
        "measuring layers": {
            "a layer, and one that is changed": 2 * sizes.layer,
            "a matrix while it is rounded": 2 * sizes.matrix + rounding,
            "states of the models": models,
            "activations": sizes.activations(losses.BATCH, length),
        },
        "measuring losses": {
            "heads, exact and rounded": 3 * sizes.head + rounding,
            "states of the models": models,
            "logits": sizes.logits(8, min(tokens, POSITIONS)),
        },
    }


def feeding_back(sizes: Sizes, rows: int, length: int, nbytes: int) -> dict[str, Parts]:
    square = FLOAT32 * sizes.columns**2
    part = 4 * min(sizes.largest, FLOAT32 * PART)
    common = {
        "a layer": sizes.layer,
        "its inputs": sizes.states(rows * length),
        "what is rounded so far": nbytes,
    }
    return {
        "rounding the embeddings": {
            "exact, rounded, and the codes": 4 * sizes.head,
            "rows": part,
        },
        "second moments": common
        | {
            "moments and those of a batch": 2 * square,
            "activations": sizes.activations(calibrate.BATCH, length),
        },
        "inverting the moments": common | {"moments, and two in float64": 6 * square},
        "rounding layers": common
        | {
            "the moments' factor": square,
            "a matrix, rounded, and the codes": 4 * sizes.matrix,
            "rows": part,
        },
    }


def distilling(sizes: Sizes, parameters: int, rows: int, length: int) -> Parts:
    """Return the memory of distilling: it has the whole model, and its gradients."""
    batch = Schedule.rows
    layers = sizes.config.num_transformer_layers
    return {
        "exact and rounded weights": 2 * FLOAT32 * parameters,
        "codes, before and after training": 5 * FLOAT32 * parameters,
        "gradients and two moments of them": 4 * FLOAT32 * parameters,
        "states": sizes.states(rows * length),
        "activations": layers * sizes.activations(batch, length),
        "logits": sizes.logits(6, batch * length),
    }


def whole_texts(sizes: Sizes, texts: Sequence[mx.array]) -> tuple[int, int, int]:
    """Return the bytes of the states of all texts and the activations of one, and its tokens."""
    states = sizes.states(sum(tokens.size for tokens in texts))
    most = max(sizes.activations(*tokens.shape) for tokens in texts)
    return states, most, max(tokens.size for tokens in texts)


def verifying(sizes: Sizes, texts: Sequence[mx.array]) -> dict[str, Parts]:
    states, most, longest = whole_texts(sizes, texts)
    states *= 2
    return {
        "verifying layers": {
            "a layer": sizes.layer,
            "a matrix as it is read": sizes.matrix,
            "states of both models": states,
            "activations": most,
        },
        "verifying losses": {
            "heads of both models": 2 * sizes.head,
            "a matrix as it is read": sizes.head,
            "states of both models": states,
            "logits": sizes.logits(10, min(POSITIONS, longest)),
        },
    }


def looking(sizes: Sizes, texts: Sequence[mx.array]) -> dict[str, Parts]:
    states, most, longest = whole_texts(sizes, texts)
    return {
        "measuring activations": {
            "a layer": sizes.layer,
            "a matrix as it is read": sizes.matrix,
            "states": states,
            "activations": 2 * most,  # all are kept until the largest is found
        },
        "measuring logits": {
            "the head, and as it is read": 2 * sizes.head,
            "states": states,
            "logits": sizes.logits(2, min(POSITIONS, longest)),
        },
    }


def seconds_needed(
    opened: OpenedModel,
    options: ConvertOptions,
    nbytes: int,
    texts: Sequence[mx.array] = (),
    activations: Sequence[mx.array] = (),
) -> float:
    """Return about how long a conversion takes on this machine. Measuring the rates computes."""
    config, stems = opened.trimmed, matrices(opened.shapes)
    rate, weights = Rates(), config.num_parameters
    rows, length = calibrate.calibration_shape(config, options)
    measured = calibrate.measured_rows(length) * length

    def passed(tokens: float) -> float:
        return 2 * tokens * weights * rate["multiply"]

    def compared(tokens: int) -> float:
        return tokens * config.vocab_size * rate["compare"]

    stored = sum(info.nbytes for info in opened.source.tensors.values())
    fits = options.target_bpw is not None and options.calibrate is None
    work = weights * rate["fit" if fits else "quantize"] if options.quantizes else 0.0
    seconds = work + (stored + nbytes) / DISK
    if options.uses_text and options.calibration_text is None:
        seconds += passed(3 * rows * length)  # few rows at a time: memory is what limits
    if options.target_bpw is not None:
        near = len(losses.near_bits(options.target_bpw))
        models = near * len(stems)
        sampled = sum(min(shape[0], losses.ROWS) * shape[1] for shape in stems.values())
        seconds += passed((models / 2 + WHOLE) * measured) + (models + WHOLE) * compared(measured)
        seconds += ((near + WHOLE) * weights + len(all_specs()) * sampled) * rate["fit"]
    if options.calibrate is not None:
        tokens, inner = min(rows, calibrate.GPTQ_ROWS) * length, [of[1] for of in stems.values()]
        products = sum(2 * tokens * n**2 + 4 * n**3 for n in inner) * rate["multiply"]
        seconds += passed(4 * tokens) + products + weights * rate["feed back"]
    if options.calibrate in ("distill", "best"):
        tokens = int(Schedule.epochs * rows * length)
        seconds += passed(4 * tokens) + 2 * compared(tokens)
    seconds += passed(sum(text.size for text in activations))
    tokens = sum(text.size for text in texts)
    return seconds + (passed(2 * tokens) + compared(tokens) + 2 * stored / DISK if texts else 0.0)


class Rates(dict[str, float]):
    """The seconds that parts of the work take on this machine: for a floating-point operation of a
    product, for a weight that is rounded, and for a logit that is compared.

    Each is measured when it is first asked for.
    """

    def __init__(self) -> None:
        x, square = mx.random.normal((256, 1024)), mx.random.normal((1024, 1024))
        plain, spec = square[:, :128], QuantSpec(4, 64)
        factor = np.eye(128, dtype=np.float32)
        self.work: dict[str, tuple[int, Callable[[], Any]]] = {
            "multiply": (2 * x.size * 1024, lambda: x @ square),
            "quantize": (square.size, lambda: mx.quantize(square)),
            "fit": (x.size, lambda: fitted_weights(x, spec, mx.bfloat16)),
            "compare": (x.size, lambda: kl_divergence(x, x + 0.1)),
            "feed back": (
                plain.size,
                lambda: error_feedback(np.array(plain), factor, spec, mx.bfloat16).codes,
            ),
        }

    def __missing__(self, name: str) -> float:
        count, run = self.work[name]
        mx.eval(run())  # the first run prepares more than it computes
        start = time.perf_counter()
        mx.eval(run())
        self[name] = (time.perf_counter() - start) / count
        return self[name]
