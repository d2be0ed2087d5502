"""What a run leaves behind: an adapter or a model of its own, its card, its picture, its report."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx import device
from openelm_mlx.device import mx, utils
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.adapter_files import write_adapter
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import FinetuneError, OptionError
from openelm_mlx.files import TensorInfo, write_json
from openelm_mlx.finetune.batches import Shape, packed
from openelm_mlx.finetune.card import write_card
from openelm_mlx.finetune.examples import Example, Pair, sequences_of
from openelm_mlx.finetune.picture import write_picture
from openelm_mlx.finetune.records import MESSAGES
from openelm_mlx.finetune.report import FinetuneReport
from openelm_mlx.finetune.state import (
    BEST,
    METRICS,
    REPORT,
    read_arrays,
    remove_checkpoint,
    set_weights,
    writing,
)
from openelm_mlx.finetune.trainable import adapter_of, form_of
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.decoder import OpenELM, parameters

if TYPE_CHECKING:
    from openelm_mlx.finetune.loop import Run

MOST_NAMED = 3  # of the examples that an error is about
UNCHANGED = (
    "No evaluation was better than that before the first step: the result is the model as it was. "
    "A lower learning rate, or more examples, may help."
)
PACKAGES = ("openelm-mlx", "mlx")


class NotFiniteError(Exception):
    """A loss is not finite, or the gradients of a step; the weights are those before it."""

    def __init__(self, what: str, step: int | None = None) -> None:
        super().__init__(what)
        self.step = step  # None for the loss on held-out data


def finished(run: Run, ended: str) -> FinetuneReport:
    """Give the model the best weights, write the result, and remove the checkpoint."""
    run.save()
    if run.data.validation:
        weights = run.weights
        if run.ranks.rank == 0:
            found, _ = read_arrays(run.folder / BEST)
            weights = {name: found[name] for name in weights}
        best = run.ranks.firsts(list(weights.values()))
        set_weights(run.model, dict(zip(weights, best, strict=True)))
    else:
        run.standing.best_step = run.standing.step
    report = report_of(run, ended)
    if run.ranks.rank == 0:
        with writing(run.folder):
            report = write_all(run, report)
    run.ranks.gather("written")  # mlx.launch kills the others when one ends
    return report


def failed(run: Run, error: NotFiniteError) -> FinetuneError:
    """Return the error of a run with a loss that is not finite, once its result is written."""
    what = str(error)
    if error.step is not None:
        what += f", in {named(run, error.step)}"
    if run.standing.step == 0:
        if run.ranks.rank == 0:
            remove_checkpoint(run.folder)
            (run.folder / METRICS).unlink(missing_ok=True)
        return FinetuneError(f"{what}; nothing was trained")
    if error.step is not None and run.held_out is not None:
        with suppress(NotFiniteError):  # these weights may be the best
            run.evaluate(run.held_out)
    report = finished(run, what)
    kept = f"{run.folder} has the weights of step {report.best_step}"
    remedy = "lower the learning rate, or look at the examples"
    return FinetuneError(f"{what}; {kept}; {remedy}, and begin again in another folder")


def named(run: Run, step: int) -> str:
    """Return the examples of a step whose loss or gradients are not finite, as errors name them;
    all of them if it is none by itself.
    """
    examples = run.plan.units(step)
    odd = [one for one in examples if not is_finite(run, one)] or examples
    more = f" and {len(odd) - MOST_NAMED} more" if len(odd) > MOST_NAMED else ""
    return ", ".join(sequences_of(one)[0].where for one in odd[:MOST_NAMED]) + more


def is_finite(run: Run, example: Example | Pair) -> bool:
    parts = sequences_of(example)
    size = sum(len(part.tokens) for part in parts)
    batch = packed([[example]], Shape(1, size, size, len(parts)))
    (total, *_), grads = run.step.gradients(batch, mx.random.key(0))
    pairs: Any = utils.tree_flatten(grads)
    flags = mx.stack([mx.isfinite(one).all() for one in (total, *(grad for _, grad in pairs))])
    return bool(flags.all().item())


def report_of(run: Run, ended: str) -> FinetuneReport:
    """Return what a run that has ended says of itself."""
    at, data = run.standing, run.data
    sequences = [one for unit in data.train for one in sequences_of(unit)]
    about = {
        "name": data.name,
        "kind": data.kind,
        "records": data.records,
        "examples": len(data.train),
        "validation_examples": len(data.validation),
        "tokens": sum(len(one.tokens) for one in sequences),
        "trained_tokens": sum(one.trained.count(1) for one in sequences),
        "sha256": data.sha256,
    }
    return FinetuneReport(
        folder=run.folder,
        model=base_name(run.engine),
        options=run.options,
        parameters=sum(array.size for array in run.weights.values()),
        base_parameters=run.engine.config.num_parameters,
        data=about,
        length=run.length,
        processes=run.ranks.size,
        steps=at.step,
        steps_planned=run.steps,
        epochs=run.plan.epoch(at.step) if at.step else 0.0,
        ended=ended,
        first_loss=at.first_loss,
        last_loss=at.last_loss,
        first_validation_loss=at.first_validation_loss,
        last_validation_loss=at.last_validation_loss,
        best_validation_loss=at.best_loss,
        best_step=at.best_step,
        tokens=at.tokens,
        trained_tokens=at.trained_tokens,
        seconds=at.seconds,
        peak_bytes=at.peak_bytes,
        predicted_bytes=run.fit["predicted"],
        versions={name: device.installed(name) for name in PACKAGES},
        notes=(*run.notices, *[UNCHANGED] * (at.best_step == 0 < at.step)),
    )


def write_all(run: Run, report: FinetuneReport) -> FinetuneReport:
    """Write the result of a run, with finetune.json last; then remove its checkpoint.

    Return the report with what could not be written in its notes.
    """
    folder = run.folder
    write_result(run)
    try:
        write_picture(folder)
    except OptionError as error:  # matplotlib is an extra of its own
        report = replace(report, notes=(*report.notes, f"there is no picture: {error}"))
    write_card(folder, report)
    write_json(folder / REPORT, report.as_dict())
    remove_checkpoint(folder)
    return report


def write_result(run: Run) -> None:
    """Write what `--adapter`, or `load`, takes: the trained weights as the model has them now."""
    folder, engine = run.folder, run.engine
    instruct = engine.instruct or run.data.kind == MESSAGES
    if run.options.method == "full":
        return write_model(folder, engine, run.model, instruct)
    adapter = adapter_of(run.model, folder.absolute().name)
    adapter = replace(adapter, base=run.fingerprint, instruct=instruct)
    form = form_of(adapter, engine.config)
    return write_adapter(folder, adapter, form, engine.config, base_name(engine))


def base_name(engine: Engine) -> str:
    """Return the name of a model without the folders of this machine."""
    return engine.path.name if os.path.exists(engine.name) else engine.name


def write_model(folder: Path, engine: Engine, model: OpenELM, instruct: bool) -> None:
    """Write a model folder: the weights, and what belongs to the base. config.json comes last, so
    nothing loads a part of it.
    """
    from openelm_mlx.convert.record import licence_files
    from openelm_mlx.convert.targets.folder import (
        sampling_defaults,
        tokenizer_files,
        write_beside,
        write_weights,
    )
    from openelm_mlx.convert.tokenizers import read_tokenizer

    arrays = parameters(model)
    names = list(expected_tensors(engine.config))
    infos = {name: TensorInfo(name_of(arrays[name].dtype), arrays[name].shape) for name in names}
    write_weights(folder, infos, ((name, mx.contiguous(arrays[name])) for name in names))
    tokenizer = tokenizer_files(read_tokenizer(engine.tokenizer.path))
    sampling = sampling_defaults(engine.path, engine.config)
    write_beside(folder, tokenizer, instruct, sampling, licence_files(engine.path))
    write_json(folder / "config.json", engine.config.to_hf_dict())
