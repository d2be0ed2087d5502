"""Judges what lies at a path that is given as a model, before anything is converted."""

from __future__ import annotations

import json
from pathlib import Path

from openelm_mlx.engine.tokenizer import FILES
from openelm_mlx.errors import CheckpointError, HubError, TokenizerError

WEIGHT_SUFFIXES = (".gguf", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
LLAMA_ROWS = range(32000, 32257)  # of an embedding that LLaMA's tokenizer fits, with padding


def loadable(folder: Path) -> bool:
    """Tell whether the engine should load this folder as it is, without a conversion.

    A damaged folder counts as loadable: loading says best what is wrong with it.
    """
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file() or not (index.is_file() or weights.is_file()):
        return False
    corenets = ("token_embeddings.", "layers.")
    try:
        if index.is_file():
            names = json.loads(index.read_bytes())["weight_map"]
        else:
            with open(weights, "rb") as file:
                names = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24)))
        return not any(str(name).startswith(corenets) for name in names)
    except (OSError, ValueError, LookupError, TypeError):
        return True


def check_kind(source: Path) -> None:
    """Raise `CheckpointError` for a folder without weights, or a file that is no model at all."""
    from openelm_mlx.convert.sources import kind_of, weights_by_kind
    from openelm_mlx.engine.hub import MODELS

    if source.is_dir() and not weights_by_kind(source):
        loaded = "no model.safetensors with config.json"
        converted = "no checkpoint.pt or .gguf file that could be converted"
        raise CheckpointError(f"{source} has {loaded}, and {converted}; a model is {MODELS}")
    known = source.suffix.lower() in WEIGHT_SUFFIXES
    if source.is_file() and not known and kind_of(source) is None:
        raise CheckpointError(f"{source} is a file, but no model; a model is {MODELS}")


def missing_tokenizer(source: Path, source_format: str | None = None) -> Path | None:
    """LLaMA's tokenizer from a mirror, where a checkpoint has its vocabulary and no tokenizer.

    Raises `ConversionError` for what convert cannot read, and `TokenizerError` where no mirror can
    be reached.
    """
    from openelm_mlx.convert.sources import open_source
    from openelm_mlx.engine.hub import mirrored_tokenizer

    folder = source if source.is_dir() else source.parent
    opened = open_source(source, source_format)
    if opened.tokenizer is not None or any((folder / name).is_file() for name in FILES):
        return None
    tables = [name for name in opened.tensors if name.endswith("token_embeddings.weight")]
    if not tables or opened.tensors[tables[0]].shape[0] not in LLAMA_ROWS:
        return None
    try:
        return mirrored_tokenizer()
    except HubError as error:
        raise TokenizerError(f"there is no tokenizer beside {source}, and {error}") from None
