"""Weights of OpenELM that Apple published outside Hugging Face, by name, fetched once into a cache.

Nothing here converts; `download` fetches one file.

    corenet:1.1b                the pretrained checkpoint (average of the last five), also 270m ...
    corenet:270m@100k           after 100,000 iterations: 50k to 300k by 50k, 330k to 350k by 5k
    corenet:3b-training         the full state at the end of training, with the optimizer's
    corenet:270m-training@100k  the same after 100,000 iterations
    corenet:3b-lora             fine-tuned for commonsense reasoning with LoRA, or -dora
    corenet-mlx:450m-4bit       the folder for MLX, 4-bit or (without -4bit) half precision

Addresses are those in apple/corenet's projects/openelm/README-pretraining.md and README-peft.md,
and in mlx_examples/open_elm/README.md. The adapters' rank and alpha are those of
projects/openelm/peft_configs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from openelm_mlx.convert.fetch.download import Progress, fetch
from openelm_mlx.engine.hub import converted, mirrored_tokenizer
from openelm_mlx.engine.model_cache import recall
from openelm_mlx.errors import HubError
from openelm_mlx.files import cache_folder
from openelm_mlx.model.config import PUBLISHED

ROOT = "https://docs-assets.developer.apple.com/ml-research/models/corenet/v0.1.0/openelm/"
ITERATIONS = (50, 100, 150, 200, 250, 300, 330, 335, 340, 345, 350)
MODEL_YAML = """\
model:
  language_modeling:
    general_gpt:
      model_name: OpenELM-%s
"""
LORA_YAML = """\
  lora:
    config:
    - regex: .*
      params: {r: 32, lora_alpha: 32, use_rslora: false}
"""


@dataclass(frozen=True)
class Published:
    """One name of the catalog. A .pt goes with a YAML, a folder has its own config.json."""

    name: str
    files: tuple[tuple[str, str], ...]  # path under `ROOT`, name here
    yaml: str | None

    @property
    def source(self) -> str:
        """The path to convert within the folder: the .pt file, or the folder itself."""
        return self.files[0][1] if self.yaml is not None else "."

    @property
    def about(self) -> str:
        """Say in one line what the name stands for."""
        if self.yaml is None:
            precision = "4-bit" if self.name.endswith("-4bit") else "half precision"
            return f"CoreNet's folder for MLX, {precision}"
        size, _, iterations = self.name.partition("@")
        if iterations or size.endswith("-training"):
            when = f"after {iterations[:-1]},000 iterations" if iterations else "at its end"
            what = "state of training" if size.endswith("-training") else "checkpoint"
            return f"CoreNet's {what} {when}"
        if kind := {"lora": "LoRA", "dora": "DoRA"}.get(size.rpartition("-")[2]):
            return f"fine-tuned for commonsense reasoning with {kind}"
        return "CoreNet's pretrained checkpoint"


def make_catalog() -> dict[str, Published]:
    entries = []
    for size in PUBLISHED:
        spelt = size.upper()
        model = MODEL_YAML % spelt.replace(".", "_")
        iterations = {f"@{n}k": f"checkpoint_epoch_0_iter_{1000 * n - 1}" for n in ITERATIONS}
        checkpoints = {f"corenet:{size}": "checkpoint_average"}
        checkpoints |= {f"corenet:{size}{at}": file for at, file in iterations.items()}
        training = f"corenet:{size}-training"
        checkpoints |= {training: "training_checkpoint_last"}
        checkpoints |= {f"{training}{at}": f"training_{file}" for at, file in iterations.items()}
        entries += [
            Published(name, ((f"pretrained/{spelt}/{file}.pt", "checkpoint.pt"),), model)
            for name, file in checkpoints.items()
        ]
        for kind in ("lora", "dora"):
            file = (f"peft/openelm_{kind}_{spelt}.pt", "checkpoint.pt")
            entries.append(Published(f"corenet:{size}-{kind}", (file,), model + LORA_YAML))
        for kind in ("", "-4bit"):
            files = tuple(
                (f"mlx/{spelt}{kind}/{name}", name)
                for name in ("weights.safetensors", "config.json")
            )
            entries.append(Published(f"corenet-mlx:{size}{kind}", files, None))
    return {entry.name: entry for entry in entries}


CATALOG = make_catalog()


def published(name: str) -> Published:
    """Return the entry of the catalog; nothing is fetched. Raises `HubError`."""
    if (entry := CATALOG.get(name.lower())) is not None:
        return entry
    near = get_close_matches(name.lower(), CATALOG, 3)
    near = near or [key for key in CATALOG if "@" not in key][:6]
    raise HubError(
        f"{name!r} is not a name of weights that Apple published; did you mean {', '.join(near)}? "
        "`openelm models` lists all names"
    )


def fetched_folder(entry: Published, cache: Path | None = None) -> Path:
    return (cache or cache_folder()) / entry.name.replace(":", "-").replace("@", "-")


def fetch_published(
    name: str, progress: Progress | None = None, cache: Path | None = None, root: str = ""
) -> Path:
    """Download what `name` stands for, or find it in the cache, and return the path to convert.

    Raises `HubError`.
    """
    entry = published(name)
    folder = fetched_folder(entry, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, local in entry.files:
            fetch((root or ROOT) + path, folder / local, progress, inspect=readable_as(local))
        yaml = folder / "config.yaml"
        known = yaml.read_text(encoding="utf-8") if yaml.is_file() else None
        if entry.yaml is not None and known != entry.yaml:
            yaml.write_text(entry.yaml, encoding="utf-8")
    except OSError as error:
        raise HubError(
            f"{folder} cannot be written: {error.strerror or error}; set OPENELM_CACHE to another "
            "folder"
        ) from None
    return folder / entry.source


def fetch_with_bar(name: str) -> Path:
    """Do what `fetch_published` does, and show its progress if standard error is a terminal."""
    from rich import progress
    from rich.console import Console

    published(name)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console, hidden = Console(file=sys.stderr), not sys.stderr.isatty()
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int | None, file: str) -> None:
            bar.update(task, completed=done, total=total, description=file)

        return fetch_published(name, show)


def published_model(name: str, tokenizer: Path | None = None) -> Path:
    """Return the model folder of a name, fetched and converted the first time."""
    entry = published(name)
    source = fetched_folder(entry) / entry.source
    if (known := recall(source, tokenizer)) is not None:
        return known
    if tokenizer is None:
        mirrored_tokenizer()  # before gigabytes are fetched that would be of no use without it
    return converted(fetch_with_bar(name), tokenizer, entry.name)


def readable_as(name: str) -> Callable[[Path], object]:
    """Return the reader that checks a fetched file: a wrong length shows in its structure."""
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
    from openelm_mlx.files import read_header, read_json

    readers: dict[str, Callable[[Path], object]] = {
        ".pt": TorchCheckpoint,
        ".safetensors": read_header,
        ".json": read_json,
    }
    return readers[Path(name).suffix]
