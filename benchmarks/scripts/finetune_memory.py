"""Hold the predicted memory of a fine-tuning against the measured peak of its steps.

    python -m openelm_mlx.benchmarks.scripts.finetune_memory 270m --corners 1x128 4x256 1x1024
    python -m openelm_mlx.benchmarks.scripts.finetune_memory openelm-tiny --method dora

A corner is ROWSxLENGTH, or ROWSxLENGTHxTRAINED if only so many tokens of each row are trained, as
in long prompts with short answers. A published size has random weights; anything else is a name or
a folder. Each corner is predicted, then two steps are taken on random tokens, and the peak is that
of `mx.get_peak_memory`. The corner 4x1024 of the 270M takes about 11 GB and several minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
from array import array
from time import perf_counter
from typing import Any

from openelm_mlx.benchmarks.measure.weights import random_engine
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine, load
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.examples import Example
from openelm_mlx.finetune.memory import predict
from openelm_mlx.finetune.options import METHODS, FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.finetune.trainable import trainable
from openelm_mlx.model.config import PUBLISHED, normal_name

CORNERS = ("1x128", "1x1024", "2x512", "4x128", "4x256", "4x1024")
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a published size, or the name or folder of a model")
    parser.add_argument("--corners", nargs="+", default=CORNERS, metavar="ROWSxLENGTH[xTRAINED]")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object a corner")
    given = vars(parser.parse_args())
    name, corners, as_json = (given.pop(key) for key in ("model", "corners", "json"))
    engine = random_engine(name) if normal_name(name) in PUBLISHED else load(name)
    options = FinetuneOptions(**given)
    for corner in corners:
        rows, length, *trained = map(int, corner.split("x"))
        every = rows * (trained or [length])[0]
        row = measured(engine, options, Shape(rows, length, every, rows))
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        parts = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in row["parts"].items())
        print(
            f"{corner:>8}  predicted {row['predicted'] / 1e6:9.1f} MB  measured "
            f"{row['measured'] / 1e6:9.1f} MB  ratio {row['ratio']:.3f}  "
            f"predicted in {row['seconds']:.2f} s  ({parts})",
            flush=True,
        )


def measured(engine: Engine, options: FinetuneOptions, shape: Shape) -> dict[str, Any]:
    """Return the predicted and the measured peak of steps on batches that fill a shape."""
    gc.collect()  # the arrays of the corner before
    step = Step(trainable(engine, options), options)
    start = perf_counter()
    found = predict(step, options, [shape])
    seconds = perf_counter() - start
    mx.eval(step.model.parameters(), step.optimizer.state)
    train(step, options, shape, 1)  # while the first one is compiled, MLX is not ahead
    peak = train(step, options, shape, STEPS)
    parts = {part: found[place] for place, part in enumerate(found._fields[:5])}
    facts = {"shape": shape._asdict(), "predicted": found.total, "measured": peak}
    return facts | {"ratio": found.total / peak, "seconds": seconds, "parts": parts}


def train(step: Step, options: FinetuneOptions, shape: Shape, steps: int) -> int:
    """Take steps on random tokens; return their peak of memory in bytes."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    for number in range(steps):
        batch = random_batch(step, shape, number)
        found: Any = None
        for _ in range(options.accumulate):
            found = step.gradients(batch, mx.random.key(1), found)
            mx.eval(found)
        sums, grads = found
        del found
        norm = step.update(grads, sums.count, 1e-4)
        del grads
        mx.eval(norm, step.model.trainable_parameters(), step.optimizer.state)
    return mx.get_peak_memory()


def random_batch(step: Step, shape: Shape, seed: int) -> Batch:
    """Return a batch of rows that are one example each, of which the last tokens are trained."""
    size = (shape.rows, shape.length)
    tokens = mx.random.randint(0, step.model.args.vocab_size, size, key=mx.random.key(seed))
    answer = min(shape.trained // shape.rows, shape.length - 1)
    trained = array("b", [0] * (shape.length - answer) + [1] * answer)
    lists: Any = tokens.tolist()
    rows = [[Example(array("i", row), trained, "")] for row in lists]
    return packed(rows, shape)


if __name__ == "__main__":
    main()
