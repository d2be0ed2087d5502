"""CoreNet's tensor names -> Hugging Face's, and the check that a checkpoint holds exactly what its model needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from openelm_mlx.errors import CheckpointError, ConversionError

RENAMES: tuple[
    tuple[str, str], ...
] = (  # the first pattern that matches wins; a Hugging Face name matches none
    (r"^classifier\.", "lm_head."),
    (r"^(token_embeddings|layers|norm)\.", r"transformer.\1."),
)
COMPUTED = re.compile(
    r"\.inv_freq$|(^|\.)causal_mask$"
)  # buffers some exports carry; the engine computes them
ADAPTER = re.compile(r"\.base_layer\.|lora_|magnitude")


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def renamed_tensors(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's name -> the source's, without computed buffers. Raises `ConversionError` for adapters."""
    result: dict[str, str] = {}
    for name in names:
        if ADAPTER.search(name):
            raise ConversionError(
                f"the checkpoint holds an adapter ({name}); only whole models are converted: merge it first"
            )
        if COMPUTED.search(name):
            continue
        if rename(name) in result:
            raise ConversionError(
                f"the checkpoint holds both {result[rename(name)]} and {name}, which are one tensor"
            )
        result[rename(name)] = name
    return result


def check_coverage(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `CheckpointError` that names the first tensors missing, superfluous or of the wrong
    shape.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"{len(extra)} the model does not have ({', '.join(extra[:3])})")
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            problems.append(
                f"{name} has shape {tuple(found[name])} where the configuration asks for {tuple(shape)}"
            )
            break
    if problems:
        raise CheckpointError("the tensors do not make this model: " + "; ".join(problems))
