"""How a model chats unless told otherwise: what its generation_config.json says of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import ConfigError, OptionError
from openelm_mlx.files import read_json
from openelm_mlx.model.config import GENERATION_CONFIG

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
# those of the examples in Apple's model cards
APPLES_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.2}


def generation_config(folder: Path) -> dict[str, Any]:
    """Read generation_config.json in `folder`, with Apple's defaults if it has no sampling."""
    path = folder / GENERATION_CONFIG
    raw = read_json(path) if path.exists() else {}
    silent = all(raw.get(key) is None for key in ("do_sample", *SAMPLING_KEYS))
    return {**raw, **APPLES_DEFAULTS} if silent else raw


def chat_sampling(folder: Path) -> SamplingOptions:
    """Return how a chat with the model in `folder` draws tokens unless told otherwise.

    Keys and meaning are those of Hugging Face's GenerationConfig, and two more, the penalties on
    the answer alone: the choice is greedy unless `do_sample` is true, the temperature then 1 where
    it is not given. Raises `ConfigError` for a damaged file and values out of range.
    """
    raw, path = generation_config(folder), folder / GENERATION_CONFIG
    sample = raw.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise ConfigError(f"{path}: do_sample is {sample!r}; it must be true or false")
    given = {key: raw[key] for key in SAMPLING_KEYS if raw.get(key) is not None}
    try:
        options = SamplingOptions(**{"temperature": 1.0, **given})
    except OptionError as error:
        raise ConfigError(f"{path}: {error}") from None
    return options if sample else replace(options, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
