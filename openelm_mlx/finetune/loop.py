"""The loop of a fine-tuning, from a loaded model to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import write_adapter
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.threads import device_work
from openelm_mlx.finetune.data import read_data
from openelm_mlx.finetune.optimizer import rate_at
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.plan import Plan
from openelm_mlx.finetune.step import Step
from openelm_mlx.finetune.trainable import adapter_of, hash_of, trainable

Progress = Callable[[dict[str, Any]], None]


@device_work
def finetune(
    engine: Engine,
    data: str | Path,
    folder: str | Path,
    options: FinetuneOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a model on the examples of `data`, and write the result into `folder`."""
    options, folder = options or FinetuneOptions(), Path(folder)
    length = options.length or min(1024, engine.config.max_context_length)
    examples = read_data(engine, data, options).train
    model = trainable(engine, options)
    step = Step(model, options)
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(examples, options, length)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        for number in range(1, plan.steps + 1):
            for batch in plan.batches(number):
                key = mx.random.key(hash_of(options.seed, "step", number))
                total, count, grads = step.gradients(batch, key)
                norm = step.update(grads, count, rate_at(options, number, plan.steps))
                mx.eval(total, norm, model.trainable_parameters(), step.optimizer.state)
                row = {"step": number, "loss": (total / count).item(), "norm": norm.item()}
                print(json.dumps(row), file=metrics, flush=True)
                if progress is not None:
                    progress(row)
    write_adapter(folder, adapter_of(model, folder.name), "mlx-lm", engine.config)
    return {"steps": plan.steps}
