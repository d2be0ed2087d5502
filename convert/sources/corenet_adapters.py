"""LoRA and DoRA inside a checkpoint of CoreNet's, beside the base that they were trained on.

CoreNet (corenet/third_party/modeling/lora.py, after Hugging Face's peft) stores A [rank, columns]
and B [rows, rank] of W [rows, columns]; of the embedding, A [rank, rows] and B [columns, rank].
There only the input side is adapted: the tied head keeps the base. The scale of a layer is in the
YAML of the training:

    LoRA (arXiv:2106.09685)     s = alpha / r
    rsLoRA (arXiv:2312.03732)   s = alpha / sqrt(r)
    DoRA (arXiv:2402.09353)     like LoRA, with every row scaled to its learned length m
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import TensorSource, kind_of, weights_by_kind
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import with_rows
from openelm_mlx.errors import ConfigError, ConversionError
from openelm_mlx.files import read_yaml
from openelm_mlx.model.adapters import Adapter, LowRank
from openelm_mlx.model.config import HEAD, OpenELMConfig
from openelm_mlx.model.fingerprint import SAMPLE, fingerprint
from openelm_mlx.model.peft import divisor, is_plain

BASE = re.compile(r"(.+)\.base_layer\.weight")
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(\w+)(?:\.weight)?"
)
Strength = Callable[[str, int], float]


@dataclass(frozen=True)
class LoraOptions:
    """The strength of an adapter, which is not in its tensors; by default it is in the YAML."""

    alpha: float | None = None
    rank_stabilised: bool = False
    yaml: Path | None = None


class BaseLayers(TensorSource):
    """A checkpoint with an adapter, seen as the base alone."""

    def __init__(self, source: TensorSource) -> None:
        self.path, self._source = source.path, source
        self._stored: dict[str, str] = {}  # name here -> name in the source
        for name in source.tensors:
            if not PART.fullmatch(name):
                base = BASE.fullmatch(name)
                self._stored[f"{base[1]}.weight" if base else name] = name
        self.tensors = {name: source.tensors[stored] for name, stored in self._stored.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        return self._source.load(self._stored[name])

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        return self._source.reader(self._stored[name])


def has_adapters(source: TensorSource) -> bool:
    return any(BASE.fullmatch(name) or PART.fullmatch(name) for name in source.tensors)


def read_checkpoint(path: Path, config: OpenELMConfig) -> Adapter:
    """Return the adapter in a `.pt` file, or in a folder of one, for a model of `config`; the YAML
    lies beside the file. Raises `ConversionError`, `CheckpointError` or `ConfigError`.
    """
    files = weights_by_kind(path).get("pt", []) if path.is_dir() else [path]
    found_one = len(files) == 1 and files[0].is_file() and kind_of(files[0]) == "pt"
    source = TorchCheckpoint(files[0]) if found_one else None
    if source is None or not has_adapters(source):
        what = "is not an adapter" if os.path.lexists(path) else "does not exist"
        raise ConversionError(
            f"{path} {what}: give a folder with adapter_config.json, as mlx-lm and PEFT "
            "write it, or a CoreNet checkpoint with LoRA or DoRA"
        )
    yaml, base = source.path.with_name("config.yaml"), BaseLayers(source)
    found = corenet_adapter(source, LoraOptions(yaml=yaml if yaml.is_file() else None))

    def rows(name: str) -> mx.array | None:
        return base.reader(name)(0, SAMPLE) if name in base.tensors else None

    parts = with_rows(found.parts, config.vocab_size)
    adapter = Adapter(found.name, parts, fingerprint(config, rows))
    adapter.check(config)
    return adapter


def corenet_adapter(source: TensorSource, options: LoraOptions) -> Adapter:
    """Return the adapter in a checkpoint.

    Raises `ConversionError` if its parts do not fit together, or if its strength is not known.
    """
    parts: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    for name in source.tensors:
        if match := PART.fullmatch(name):
            stem, part, adapter_name = match.groups()
            names.add(adapter_name)
            parts.setdefault(stem, {})[part.replace("lora_embedding_", "lora_")] = name
        elif match := BASE.fullmatch(name):
            parts.setdefault(match[1], {})["base"] = name
    if len(names) > 1:
        raise ConversionError(
            f"{source.path} has several adapters ({', '.join(sorted(names))}); only one can be "
            "merged: save a checkpoint with that one"
        )
    scale_of = strengths(source.path, options)
    found = {stem: low_rank(source, stem, part, scale_of) for stem, part in parts.items()}
    return Adapter(source.path.stem, found)


def low_rank(
    source: TensorSource, stem: str, found: Mapping[str, str], scale_of: Strength
) -> LowRank:
    where = f"{source.path}: the adapter of {stem}"
    needed = {"base": "base_layer.weight", "lora_A": "lora_A", "lora_B": "lora_B"}
    if lacking := ", ".join(needed[part] for part in needed if part not in found):
        raise ConversionError(
            f"{where} lacks {lacking}; the checkpoint must contain the base with the adapter"
        )
    shape, a, b = (source.tensors[found[part]].shape for part in needed)
    magnitude = found.get("lora_magnitude_vector")
    embedding = ".lora_embedding_A." in found["lora_A"]
    if embedding and magnitude is not None:
        raise ConversionError(f"{where} is DoRA on an embedding, which CoreNet does not define")
    rank = a[0] if len(a) == 2 else 0
    outer = shape if embedding else shape[::-1]
    if len(shape) != 2 or rank < 1 or a != (rank, outer[0]) or b != (outer[1], rank):
        raise ConversionError(
            f"{where} has A of shape {a} and B of shape {b}, which do not fit a base of {shape}"
        )
    if magnitude is not None and math.prod(source.tensors[magnitude].shape) != shape[0]:
        raise ConversionError(
            f"{where} has magnitudes of shape {source.tensors[magnitude].shape} for {shape[0]} rows"
        )
    scale = scale_of(stem, rank)
    first, second = (source.load(found[part]).astype(mx.float32) for part in ("lora_A", "lora_B"))
    first, second = (second.T, first.T) if embedding else (first, second)
    m = None if magnitude is None else source.load(magnitude).astype(mx.float32).reshape(-1)
    return LowRank(first, second, scale, m)


def strengths(path: Path, options: LoraOptions) -> Strength:
    """Return the function from stem and rank to s, which may raise. Flags win over the YAML."""
    rules = [] if options.alpha is not None or options.yaml is None else lora_rules(options.yaml)

    def strength(stem: str, rank: int) -> float:
        if options.alpha is not None:
            return options.alpha / divisor(rank, options.rank_stabilised)
        corenets = "classifier" if stem == HEAD else stem.removeprefix("transformer.")
        for pattern, alpha, yaml_rank, stabilised in rules:
            if not pattern.match(corenets):
                continue
            if yaml_rank != rank:
                raise ConfigError(
                    f"{options.yaml} gives {corenets} rank {yaml_rank}, but its tensors have rank "
                    f"{rank}"
                )
            return alpha / divisor(rank, stabilised)
        raise ConversionError(
            f"{path} contains an adapter of {stem}, whose strength is not in the tensors: give the "
            "YAML it was trained with as --config, or its lora_alpha as --lora-alpha (Apple's: 32)"
        )

    return strength


def lora_rules(path: Path) -> list[tuple[re.Pattern[str], float, int, bool]]:
    """Return `model.lora.config` of a CoreNet YAML: pattern of names, alpha, rank, stabilised."""
    node: Any = read_yaml(path)
    for key in ("model", "lora", "config"):
        node = node.get(key) if isinstance(node, dict) else None
    if node is None:
        return []
    if not isinstance(node, list):
        raise ConfigError(f"{path}: model.lora.config must be a list")
    rules = []
    for entry in node:
        params = entry.get("params") if isinstance(entry, dict) else None
        if not isinstance(params, dict):
            raise ConfigError(f"{path}: an entry of model.lora.config has no params")
        alpha: Any = params.get("lora_alpha")
        rank, stable = params.get("r"), params.get("use_rslora", False)
        numbers = all(type(n) in (int, float) and abs(n or 0) < 1e9 for n in (alpha, rank))
        if not numbers or type(rank) is not int or rank < 1 or type(stable) is not bool:
            raise ConfigError(
                f"{path}: model.lora.config needs lora_alpha, r and use_rslora as numbers and "
                "true or false"
            )
        rules.append((plain_pattern(path, entry.get("regex")), alpha, rank, stable))
    return rules


def plain_pattern(path: Path, regex: Any) -> re.Pattern[str]:
    """Compile a pattern if it is as simple as CoreNet's. Raises `ConfigError`."""
    if not is_plain(regex):
        raise ConfigError(
            f"{path}: the regex {str(regex)[:40]!r} of model.lora.config is more than names, '.', "
            "'.*' and '\\d'; give the strength as --lora-alpha instead"
        )
    return re.compile(regex)
