"""The files a configuration stands in, JSON and CoreNet's YAML, read without trust in their size or shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.errors import ConfigError, OptionError, reason
from openelm_mlx.options import SamplingOptions

GENERATION_CONFIG = "generation_config.json"
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
APPLES_DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.2,
}  # of the examples in its model cards
MAX_YAML_BYTES = 1 << 18  # CoreNet's recipes have 5 KB
MAX_JSON_BYTES = 4 << 20  # a sharded 3B's index has 40 KB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError` with the file's name."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ConfigError(
                f"{path} is no configuration: it has more than {MAX_JSON_BYTES} bytes"
            )
        raw = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold an object, not {type(raw).__name__}")
    return raw


def generation_config(folder: Path) -> dict[str, Any]:
    """Read generation_config.json in `folder`.

    Apple's defaults are added where the file does not say how tokens are drawn.
    """
    path = folder / GENERATION_CONFIG
    raw = read_json(path) if path.exists() else {}
    silent = all(raw.get(key) is None for key in ("do_sample", *SAMPLING_KEYS))
    return {**raw, **APPLES_DEFAULTS} if silent else raw


def chat_sampling(folder: Path) -> SamplingOptions:
    """Return how a chat with the model in `folder` draws tokens unless told otherwise.

    Keys and meaning are those of Hugging Face's GenerationConfig, and two more, the penalties on the
    answer alone: the choice is greedy unless `do_sample` is true, the temperature then 1 where it
    is not given. Raises `ConfigError` for a damaged file and values out of range.
    """
    raw = generation_config(folder)
    sample = raw.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise ConfigError(
            f"{folder / GENERATION_CONFIG}: do_sample is {sample!r}; it must be true or false"
        )
    given = {key: raw[key] for key in SAMPLING_KEYS if raw.get(key) is not None}
    try:
        options = SamplingOptions(**{"temperature": 1.0, **given})
    except OptionError as error:
        raise ConfigError(f"{folder / GENERATION_CONFIG}: {error}") from None
    return options if sample else replace(options, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def corenet_section(path: str | Path) -> dict[str, Any]:
    """`model.language_modeling.general_gpt` of a CoreNet YAML. Raises `ConfigError` with the file's name."""
    node: Any = read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path} has no section model.language_modeling.general_gpt: no CoreNet language model"
        )
    known: Iterable[str] = ("model_name", "vocab_size", "max_context_length", "padding_index")
    if unknown := sorted(str(key) for key in node.keys() - set(known)):
        raise ConfigError(
            f"{path}: general_gpt has keys this engine does not know: {', '.join(unknown)}"
        )
    return node


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises `ConfigError` with the file's name, also for one that would grow without end."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError(
                    "merge keys (<<) are not read here"
                )  # nested, they double with every level

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError(
                f"{path} is no configuration: it has more than {MAX_YAML_BYTES} bytes"
            )
        return yaml.load(data.decode("utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {reason(error)}") from None


def corenet_overrides(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a CoreNet YAML overrides: sizes of vocabulary and context, padding row."""
    names = ("vocab_size", "max_context_length", "padding_index")
    return {name: section[name] for name in names if section.get(name) is not None}
