"""Weights of OpenELM outside Hugging Face, by name: CoreNet's checkpoints and its MLX folders.

Full training checkpoints (with the optimizer's state) have no name here; by file they convert too.

Addresses are those in apple/corenet's projects/openelm/README-pretraining.md and README-peft.md,
and in mlx_examples/open_elm/README.md. The adapters' rank and alpha are those of
projects/openelm/peft_configs.

    corenet:1.1b          the pretrained checkpoint (average of the last five), also 270m, 450m, 3b
    corenet:270m@100k     after 100,000 iterations: 50k to 300k by 50k, 330k to 350k by 5k
    corenet:3b-lora       fine-tuned for commonsense reasoning with LoRA, or -dora
    corenet-mlx:450m-4bit the folder for MLX, 4-bit or (without -4bit) half precision
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from openelm_mlx.convert.fetch.download import Progress, fetch
from openelm_mlx.engine.hub import converted, mirrored_tokenizer
from openelm_mlx.engine.model_cache import cache_folder, recall
from openelm_mlx.errors import HubError
from openelm_mlx.model.config import PUBLISHED

ROOT = "https://docs-assets.developer.apple.com/ml-research/models/corenet/v0.1.0/openelm/"
ITERATIONS = (50, 100, 150, 200, 250, 300, 330, 335, 340, 345, 350)
LORA_YAML = """\
  lora:
    config:
    - regex: .*
      params: {r: 32, lora_alpha: 32, use_rslora: false}
"""


@dataclass(frozen=True)
class Published:
    """One name of the catalog: files to fetch (path under `ROOT` -> name here), and the YAML that goes with a .pt."""

    name: str
    files: tuple[tuple[str, str], ...]
    yaml: str | None

    @property
    def source(self) -> str:
        """What to convert within the folder: the .pt file, or the folder itself."""
        return self.files[0][1] if self.yaml is not None else "."

    @property
    def about(self) -> str:
        """Say in one line what the name stands for."""
        if self.yaml is None:
            return "CoreNet's folder for MLX, " + (
                "4-bit" if self.name.endswith("-4bit") else "half precision"
            )
        size, _, iterations = self.name.partition("@")
        if iterations:
            return f"CoreNet's checkpoint after {iterations[:-1]},000 iterations"
        kind = {"lora": "LoRA", "dora": "DoRA"}.get(size.rpartition("-")[2])
        return (
            f"fine-tuned for commonsense reasoning with {kind}"
            if kind
            else "CoreNet's pretrained checkpoint"
        )


def make_catalog() -> dict[str, Published]:
    entries = []
    for size in PUBLISHED:
        spelt = size.upper()
        model = f"model:\n  language_modeling:\n    general_gpt:\n      model_name: OpenELM-{spelt.replace('.', '_')}\n"
        checkpoints = {f"corenet:{size}": "average"}
        checkpoints |= {f"corenet:{size}@{n}k": f"epoch_0_iter_{1000 * n - 1}" for n in ITERATIONS}
        entries += [
            Published(name, ((f"pretrained/{spelt}/checkpoint_{what}.pt", "checkpoint.pt"),), model)
            for name, what in checkpoints.items()
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
    """The entry of the catalog, before anything is fetched. Raises `HubError`."""
    entry = CATALOG.get(name.lower())
    if entry is None:
        near = (
            get_close_matches(name.lower(), CATALOG, 3)
            or [key for key in CATALOG if "@" not in key][:6]
        )
        raise HubError(
            f"{name!r} is no name of weights that Apple published; did you mean {', '.join(near)}? "
            "`openelm models` lists all names"
        )
    return entry


def fetched_folder(entry: Published, cache: Path | None = None) -> Path:
    return (cache or cache_folder()) / entry.name.replace(":", "-").replace("@", "-")


def fetch_published(
    name: str, progress: Progress | None = None, cache: Path | None = None, root: str = ""
) -> Path:
    """Download what `name` stands for, or find it in the cache; returns the path to convert. Raises
    `HubError`.
    """
    entry = published(name)
    folder = fetched_folder(entry, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, local in entry.files:
            fetch((root or ROOT) + path, folder / local, progress, inspect=readable_as(local))
        yaml = folder / "config.yaml"
        if entry.yaml is not None and not (
            yaml.is_file() and yaml.read_text(encoding="utf-8") == entry.yaml
        ):
            yaml.write_text(entry.yaml, encoding="utf-8")
    except OSError as error:
        raise HubError(
            f"{folder} cannot be written: {error.strerror or error}; set OPENELM_CACHE to another folder"
        ) from None
    return folder / entry.source


def fetch_with_bar(name: str) -> Path:
    """`fetch_published` with its progress shown on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    published(name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(name, total=None)
        return fetch_published(
            name,
            lambda done, total, file: bar.update(
                task, completed=done, total=total, description=file
            ),
        )


def published_model(name: str, tokenizer: Path | None = None) -> Path:
    """The model folder that a name of the catalog becomes, fetched and converted the first time."""
    entry = published(name)
    source = fetched_folder(entry) / entry.source
    if (known := recall(source, tokenizer)) is not None:
        return known
    if tokenizer is None:
        mirrored_tokenizer()  # before gigabytes are fetched that would be of no use without it
    return converted(fetch_with_bar(name), tokenizer, entry.name)


def readable_as(name: str) -> Callable[[Path], None]:
    """A look at the structure of a file just fetched: a length the server lied about shows
    there.
    """
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
    from openelm_mlx.files import read_header, read_json

    readers: dict[str, Callable[[Path], object]] = {
        ".pt": TorchCheckpoint,
        ".safetensors": read_header,
        ".json": read_json,
    }
    reader = readers[Path(name).suffix]

    def inspect(path: Path) -> None:
        reader(path)

    return inspect
