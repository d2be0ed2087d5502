"""YAML files, CoreNet's and recipes, read without trust in their size or shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openelm_mlx.errors import ConfigError, reason

MAX_YAML_BYTES = 1 << 18  # CoreNet's recipes have 5 KB


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises `ConfigError`, also for one that would grow without
    end.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                # nested, they double with every level
                raise yaml.YAMLError("merge keys (<<) are not read here")

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError(
                f"{path} is not a configuration: it has more than {MAX_YAML_BYTES} bytes"
            )
        return yaml.load(data.decode("utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {reason(error)}") from None
