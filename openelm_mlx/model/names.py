"""Names of tensors: what CoreNet, trainers and other tools call them, and what this engine does.

Everything here works on names alone, without MLX. Adapters have names of their own elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from openelm_mlx.errors import CheckpointError
from openelm_mlx.model.config import HEAD

Value = TypeVar("Value")
RENAMES = (  # CoreNet's names become Hugging Face's; the first pattern that matches wins
    (re.compile(r"^classifier(?=\.|$)"), HEAD),
    (re.compile(r"^(token_embeddings|layers|norm)(?=\.|$)"), r"transformer.\1"),
)
# buffers that some exports carry, all of which the engine computes
COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|causal_mask|position_ids|masked_bias)$"
)
# modules that torch.compile, FSDP and checkpointing put around others, at any depth
INSERTED = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# what DDP (module.), Lightning (model.) or a trainer's own class put before every name
BEFORE = re.compile(r"(.*?\.)??(?:transformer|token_embeddings|layers|norm|classifier|lm_head)\.")
OURS = "attn.qkv_proj."  # in names of OpenELM only
ADAPTER = re.compile(r"\.base_layer\.|lora_|magnitude")  # in names of an adapter's parts


def split(name: str) -> tuple[str, str]:
    """Return the stem of a tensor's name, and the part that it is: weight, scales or biases."""
    stem, _, part = name.rpartition(".")
    return stem, part


def canonical_name(name: str) -> str:
    """Return Hugging Face's name of a tensor or module that CoreNet may have named."""
    for pattern, replacement in RENAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return name


def canonical(found: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same values under Hugging Face's names, without buffers that the engine computes.

    Names of modules that were put around the model are left out. Raises `CheckpointError` if one
    stands before some names only, or if two names mean one tensor.
    """
    plain = {name: INSERTED.sub("", name) for name in found if not COMPUTED.search(name)}
    before = common_prefix(list(plain.values()))
    result: dict[str, Value] = {}
    first: dict[str, str] = {}
    for name, inner in plain.items():
        known = canonical_name(inner.removeprefix(before))
        if known in result:
            both = f"{first[known]} and {name}"
            raise CheckpointError(f"the checkpoint contains both {both}, which are one tensor")
        result[known], first[known] = found[name], name
    return result


def frequencies(found: Mapping[str, Value]) -> Value | None:
    """Return the first of the buffers that have the frequencies of rotary embeddings, if any."""
    return next((of for name, of in found.items() if split(name)[1] == "inv_freq"), None)


def common_prefix(names: list[str]) -> str:
    """Return what stands before every name, "model." for example, and mostly nothing does."""
    match = next((BEFORE.match(name) for name in names if OURS in name), None)
    before = match[1] or "" if match else ""
    if others := [name for name in names if not name.startswith(before)]:
        what = f"{len(others)} of {len(names)} tensors are not of {before}*, first: {min(others)}"
        raise CheckpointError(f"{what}; save the state dict of the language model alone")
    return before
