"""A fine-tuning from a loaded model to a folder."""

from __future__ import annotations

from pathlib import Path

from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.ranks import launched
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune import logs, state
from openelm_mlx.finetune.data import read_data
from openelm_mlx.finetune.loop import Progress, Run
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.report import FinetuneReport
from openelm_mlx.finetune.trainable import continued
from openelm_mlx.stopping import StopKey


def finetune(
    engine: Engine,
    data: str | Path,
    folder: str | Path,
    options: FinetuneOptions | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> FinetuneReport:
    """Train a model on the examples of `data`, and write the result into `folder`.

    The folder is a new one, or with `resume` that of a run that was stopped, which goes on with the
    same numbers as if it had not been. Ctrl-C, or a KeyboardInterrupt that `progress` raises, saves
    at the end of the step and is raised again. In the processes of `mlx.launch` each batch is one
    process's, and the first one writes. With the method `full` the engine has the new weights then.

    Raises `OptionError`, `FinetuneError` or `CheckpointError`, most of them before any work; after
    a loss that is not finite the folder has the best weights before it.
    """
    check_loaded("engine", engine)
    run = prepared(engine, data, Path(folder), options or FinetuneOptions(), resume)
    with StopKey() as stop:
        return run.whole(progress or (lambda row, steps: None), stop)


@device_work
def prepared(
    engine: Engine, data: str | Path, folder: Path | None, options: FinetuneOptions, resume: bool
) -> Run:
    """Return a run that can begin, or go on; without a folder it is only to be looked at. Nothing
    is written yet.
    """
    options = continued(engine, options)
    check_engine(engine, options)
    logs.check(options.log)
    ranks = launched()
    resumed = False
    if folder is not None and ranks.rank == 0:
        resumed = state.check_folder(folder, resume, data, options.validation)
    read = read_data(engine, data, options)
    return Run(engine, read, folder or Path(), options, ranks, resumed)


def check_engine(engine: Engine, options: FinetuneOptions) -> None:
    """Raise `OptionError` for a model that cannot be trained like this."""
    if options.method != "full":
        return
    if engine.quantization:
        what = f"{engine.name} is quantized, and quantized weights cannot be trained"
        raise OptionError(f"{what}; give --method lora or dora, or a model that is not quantized")
    if engine.model.transformer.norm.weight.dtype == mx.float16:
        what = f"{engine.name} is in float16, in which the squares of gradients underflow"
        raise OptionError(f"{what}; load it in float32 or bfloat16, or give --method lora or dora")
