"""The JSON files that a configuration stands in, read without trust in their size or shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import ConfigError, OptionError

GENERATION_CONFIG = "generation_config.json"
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
# of the examples in its model cards
APPLES_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.2}
MAX_JSON_BYTES = 4 << 20  # a sharded 3B's index has 40 KB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError` with the file's name."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            why = f"it has more than {MAX_JSON_BYTES} bytes"
            raise ConfigError(f"{path} is no configuration: {why}")
        raw = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold an object, not {type(raw).__name__}")
    return raw


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
