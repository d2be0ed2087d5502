"""The files a configuration stands in, JSON and CoreNet's YAML, read without trust in their size or shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openelm_mlx.errors import ConfigError

MAX_YAML_BYTES = 1 << 18  # CoreNet's recipes have 5 KB
MAX_JSON_BYTES = 4 << 20  # a sharded 3B's index has 40 KB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError` with the file's name."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is no configuration: it has more than {MAX_JSON_BYTES} bytes")
        raw = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold an object, not {type(raw).__name__}")
    return raw


def corenet_section(path: str | Path) -> dict[str, Any]:
    """`model.language_modeling.general_gpt` of a CoreNet YAML. Raises `ConfigError` with the file's name."""
    node: Any = read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{path} has no section model.language_modeling.general_gpt: no CoreNet language model")
    known: Iterable[str] = ("model_name", "vocab_size", "max_context_length", "padding_index")
    if unknown := sorted(str(key) for key in node.keys() - set(known)):
        raise ConfigError(f"{path}: general_gpt has keys this engine does not know: {', '.join(unknown)}")
    return node


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises `ConfigError` with the file's name, also for one that would grow without end."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read here")  # nested, they double with every level

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is no configuration: it has more than {MAX_YAML_BYTES} bytes")
        return yaml.load(data.decode("utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def corenet_overrides(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a CoreNet YAML says itself about the model: sizes of vocabulary and context, padding row."""
    names = ("vocab_size", "max_context_length", "padding_index")
    return {name: section[name] for name in names if section.get(name) is not None}
