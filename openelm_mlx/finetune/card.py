"""The model card of a fine-tuning: what was trained, on what, with which losses, and its use."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from openelm_mlx.engine.adapter_files import WEIGHTS
from openelm_mlx.engine.hub import SHORT_NAMES, looks_like_path
from openelm_mlx.engine.prompts import TEMPLATE
from openelm_mlx.files import replacing
from openelm_mlx.finetune.picture import PICTURE
from openelm_mlx.finetune.records import PAIRS
from openelm_mlx.finetune.report import FinetuneReport, settings
from openelm_mlx.finetune.state import METRICS

CARD = "README.md"
FOLDER, START = "PATH_OF_THIS_FOLDER", '"Once upon a time"'
WHAT = {
    "lora": "A LoRA adapter of rank {rank} for {base}: {own} trainable parameters, beside the "
    "{all} of the model",
    "dora": "A DoRA adapter of rank {rank} for {base}: {own} trainable parameters, beside the "
    "{all} of the model",
    "full": "{base}, with all of its {all} parameters fine-tuned",
}


def write_card(folder: Path, report: FinetuneReport) -> None:
    """Write README.md into the folder of a result, once its other files are there."""
    with replacing(folder / CARD) as new:
        new.write_text(card(report, {path.name for path in folder.iterdir()}), encoding="utf-8")


def card(report: FinetuneReport, files: Collection[str]) -> str:
    """Return the text of a card in a folder with these files."""
    base = base_of(report.model)
    numbers = {"own": f"{report.parameters:,}", "all": f"{report.base_parameters:,}"}
    what = WHAT[report.method].format(rank=report.options.rank, base=link(base), **numbers)
    parts = [
        f"---\n{entries(report, base)}---\n",
        f"# {report.folder.absolute().name}\n",
        f"{what}. Trained with openelm-mlx {report.versions['openelm-mlx']}.\n",
        f"```\n{uses(report, base, files)}```\n",
        f"## Data\n\n{table(facts_of_data(report.data))}",
        f"## Losses\n\n{losses(report)}",
    ]
    if PICTURE in files:
        parts.append(f"![training and validation loss by step]({PICTURE})\n")
    parts += [
        f"The losses of every step are in `{METRICS}`.\n",
        f"## How it was made\n\n{course(report)}",
        f"```yaml\n{recipe(report)}```\n",
    ]
    parts += [f"- {note}\n" for note in report.notes]
    parts.append("The licences of the base model and of the data apply.\n")
    return "\n".join(parts)


def base_of(model: str) -> str:
    """Return the hub id of a model if it has one, else its name without its folders."""
    if looks_like_path(model):
        return Path(model).name
    return SHORT_NAMES.get(model.lower(), model)


def on_hub(base: str) -> bool:
    return "/" in base


def link(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{base}`"


def entries(report: FinetuneReport, base: str) -> str:
    """Return the front matter, as Hugging Face reads it; the licence is for the user to state."""
    import yaml

    method = report.method
    found: dict[str, Any] = {}
    if on_hub(base):
        relation = "finetune" if method == "full" else "adapter"
        found |= {"base_model": base, "base_model_relation": relation}
    tags = ["mlx", "openelm", *([] if method == "full" else [method])]
    found |= {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": tags}
    return str(yaml.safe_dump(found, sort_keys=False))


def uses(report: FinetuneReport, base: str, files: Collection[str]) -> str:
    """Return the commands that use the result; mlx-lm reads adapters of its own form only."""
    whole = report.method == "full"
    model, beside = (FOLDER, "") if whole else (shlex.quote(base), f" --adapter {FOLDER}")
    chats = (
        f"openelm chat {model}"
        if TEMPLATE in files
        else f"openelm generate {START} --model {model}"
    )
    commands = [f"{chats}{beside}"]
    if not whole:
        commands.append(f"openelm fuse {model}{beside} -o merged")
    if whole or WEIGHTS in files:
        theirs = FOLDER if whole else f"FOLDER_OF_THE_BASE --adapter-path {FOLDER}"
        commands.append(f"mlx_lm.generate --model {theirs} --prompt {START}")
    return "".join(f"{command}\n" for command in commands)


def facts_of_data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of the data, in words."""
    named = {key.replace("_", " "): value for key, value in data.items() if value is not None}
    return [
        (key, f"{value:,}" if type(value) is int else f"`{value}`") for key, value in named.items()
    ]


def table(rows: list[tuple[str, str]], heads: str = "| | |\n|---|---|") -> str:
    return "\n".join([heads, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def losses(report: FinetuneReport) -> str:
    """Return the losses at the start, at the best evaluation and at the end."""
    trained = [("at the start", "first_loss"), ("at the end", "last_loss")]
    validated = [
        ("at the start", "first_validation_loss"),
        (f"at the best, step {report.best_step:,}", "best_validation_loss"),
        ("at the end", "last_validation_loss"),
    ]
    rows = [
        (f"{kind}, {when}", f"{value:.4f}")
        for kind, fields in (("training", trained), ("validation", validated))
        for when, name in fields
        if (value := getattr(report, name)) is not None
    ]
    unit = "preference pair" if report.data.get("kind") == PAIRS else "trained token"
    return f"In nats, the mean per {unit}.\n\n{table(rows)}"


def course(report: FinetuneReport) -> str:
    """Return how long it took, and with what."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    several = "" if report.processes == 1 else f" in {report.processes} processes"
    epochs = f"{report.epochs:.3g} epoch{'s' * (report.epochs != 1)}"
    return (
        f"{report.steps:,} of {report.steps_planned:,} steps ({report.ended}), or "
        f"{epochs}, in {report.seconds:,.0f} seconds{several}: "
        f"{report.tokens_per_second:,.0f} tokens a second, at most "
        f"{report.peak_bytes / 1e6:,.0f} MB of memory. With {versions}.\n"
    )


def recipe(report: FinetuneReport) -> str:
    """Return the options as YAML, which `openelm finetune --config` takes."""
    import yaml

    given = {
        key: value for key, value in settings(report.options).items() if value not in (None, [])
    }
    return str(yaml.safe_dump({**given, "length": report.length}, sort_keys=False))
