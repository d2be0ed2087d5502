"""CoreNet's LoRA and DoRA checkpoints: merged into their base, or kept apart in the adapter format
of mlx-lm.

A layer's adapter is two thin matrices A [r, in] and B [out, r] beside its base weight W [out, in]
(corenet/third_party/modeling/lora.py, after Hugging Face's peft):

    LoRA (arXiv:2106.09685)   W + s B A,  s = alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv:2312.03732)
    DoRA (arXiv:2402.09353)   the same with every row scaled to its learned length m

On the embedding [vocabulary, dim] the matrices are A [r, vocabulary] and B [dim, r], and only the
input side is adapted: the tied head keeps the base embedding, so a merged model has a head of its
own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import TensorSource
from openelm_mlx.convert.sources.yaml_files import read_yaml
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError, OptionError
from openelm_mlx.files import TensorInfo, write_json

BASE = re.compile(r"(.+)\.base_layer\.weight")
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(\w+)(?:\.weight)?"
)
HEAD = "lm_head.weight"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class LoraOptions:
    """What the tensors do not tell of an adapter; unset values come from the CoreNet YAML."""

    alpha: float | None = None
    rank_stabilised: bool = False
    yaml: Path | None = None


@dataclass(frozen=True)
class Adapter:
    """One adapted layer: names of its tensors in the source, and the strength of B A."""

    stem: str
    a: str
    b: str
    magnitude: str | None
    rank: int
    scale: float
    embedding: bool


class AdaptedCheckpoint(TensorSource):
    """A checkpoint with adapters, seen as the plain one: merged, or (`merge` False) its base alone.

    Raises `ConversionError` when the parts of an adapter do not fit together or its strength is not
    known.
    """

    def __init__(self, source: TensorSource, options: LoraOptions, merge: bool = True) -> None:
        self.path = source.path
        self.adapters = find_adapters(source, options)
        self._source, self.merge = source, merge
        self._original: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for original, info in source.tensors.items():
            if PART.fullmatch(original):
                continue
            base = BASE.fullmatch(original)
            name = f"{base[1]}.weight" if base else original
            self._original[name], self.tensors[name] = original, info
        embedding = next((a.stem for a in self.adapters.values() if a.embedding), None)
        if embedding is not None and HEAD not in self.tensors:
            self._original[HEAD] = f"{embedding}.base_layer.weight"
            self.tensors[HEAD] = self.tensors[f"{embedding}.weight"]

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        """The tensor `name`, merged in float32 and rounded once to the type its base is stored
        in.
        """
        base = self._source.load(self._original[name])
        adapter = self.adapters.get(name.removesuffix(".weight"))
        return (
            base
            if adapter is None or not self.merge
            else self.merged(adapter, base).astype(base.dtype)
        )

    def factors(self, adapter: Adapter) -> tuple[mx.array, mx.array]:
        """mlx-lm's lora_a [in, r] and lora_b [r, out] (embedding: [vocabulary, r] and [r, dim]), in
        float32.
        """
        a, b = (self._source.load(name).astype(mx.float32) for name in (adapter.a, adapter.b))
        return a.T, b.T

    def merged(self, adapter: Adapter, base: mx.array) -> mx.array:
        """The float32 weights of the adapted layer, [out, in] or [vocabulary, dim]."""
        first, second = self.factors(adapter)
        if not adapter.embedding:
            first, second = second.T, first.T
        weight = mx.addmm(base.astype(mx.float32), first, second, alpha=adapter.scale)
        if adapter.magnitude is None:
            return weight
        return weight * (self.magnitude(adapter) / mx.linalg.norm(weight, axis=1))[:, None]

    def magnitude(self, adapter: Adapter) -> mx.array:
        """mlx-lm's `m`: the lengths of the adapted rows, which for LoRA are what they come out
        as.
        """
        if adapter.magnitude is not None:
            return self._source.load(adapter.magnitude).astype(mx.float32).reshape(-1)
        base = self._source.load(f"{adapter.stem}.base_layer.weight")
        return mx.linalg.norm(self.merged(adapter, base), axis=1)


def has_adapters(source: TensorSource) -> bool:
    return any(BASE.fullmatch(name) or PART.fullmatch(name) for name in source.tensors)


def find_adapters(source: TensorSource, options: LoraOptions) -> dict[str, Adapter]:
    """The adapted layers by stem, each checked to be whole and of shapes that fit."""
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
            f"{source.path} holds several adapters ({', '.join(sorted(names))}); only one can be merged: "
            "save a checkpoint with that one"
        )
    scale_of = strengths(source.path, options)
    return {stem: make_adapter(source, stem, found, scale_of) for stem, found in parts.items()}


def make_adapter(
    source: TensorSource, stem: str, found: Mapping[str, str], scale_of: Any
) -> Adapter:
    where = f"{source.path}: the adapter of {stem}"
    if missing := [part for part in ("base", "lora_A", "lora_B") if part not in found]:
        lacking = ", ".join(part.replace("base", "base_layer.weight") for part in missing)
        raise ConversionError(
            f"{where} lacks {lacking}; the checkpoint must hold the base with the adapter"
        )
    shape, (a, b) = (
        source.tensors[found["base"]].shape,
        (source.tensors[found[p]].shape for p in ("lora_A", "lora_B")),
    )
    magnitude = found.get("lora_magnitude_vector")
    embedding = ".lora_embedding_A." in found["lora_A"]
    if embedding and magnitude is not None:
        raise ConversionError(f"{where} is DoRA on an embedding, which CoreNet does not define")
    rank = a[0] if len(a) == 2 else 0
    outer = (shape[0], shape[1]) if embedding and len(shape) == 2 else shape[::-1]
    if len(shape) != 2 or rank < 1 or a != (rank, outer[0]) or b != (outer[1], rank):
        raise ConversionError(
            f"{where} has A of shape {a} and B of shape {b}, which do not fit a base of {shape}"
        )
    if magnitude is not None and math.prod(source.tensors[magnitude].shape) != shape[0]:
        raise ConversionError(
            f"{where} has magnitudes of shape {source.tensors[magnitude].shape} for {shape[0]} rows"
        )
    return Adapter(
        stem, found["lora_A"], found["lora_B"], magnitude, rank, scale_of(stem, rank), embedding
    )


def strengths(path: Path, options: LoraOptions) -> Any:
    """Layer and rank -> s. The flags win over the YAML. Raises `ConversionError` or `ConfigError` from the call."""
    rules = [] if options.alpha is not None or options.yaml is None else lora_rules(options.yaml)

    def strength(stem: str, rank: int) -> float:
        if options.alpha is not None:
            return scaled(options.alpha, rank, options.rank_stabilised)
        corenets = "classifier" if stem == "lm_head" else stem.removeprefix("transformer.")
        for pattern, alpha, yaml_rank, rank_stabilised in rules:
            if not pattern.match(corenets):
                continue
            if yaml_rank != rank:
                raise ConfigError(
                    f"{options.yaml} gives {corenets} rank {yaml_rank}, but its tensors have rank {rank}"
                )
            return scaled(alpha, rank, rank_stabilised)
        raise ConversionError(
            f"{path} holds an adapter of {stem}, whose strength is not in the tensors: give the YAML it was trained "
            "with as --config, or its lora_alpha as --lora-alpha (Apple's: 32)"
        )

    return strength


def scaled(alpha: float, rank: int, rank_stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def lora_rules(path: Path) -> list[tuple[re.Pattern[str], float, int, bool]]:
    """`model.lora.config` of a CoreNet YAML: pattern of layer names, alpha, rank, rank-stabilised.
    Empty if absent.
    """
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
                f"{path}: model.lora.config needs lora_alpha, r and use_rslora as numbers and true or false"
            )
        rules.append((plain_pattern(path, entry.get("regex")), alpha, rank, stable))
    return rules


def plain_pattern(path: Path, regex: Any) -> re.Pattern[str]:
    """The pattern compiled, if it is of the plain kind CoreNet's recipes use: a hostile one could
    run for ever.
    """
    if (
        not isinstance(regex, str)
        or len(regex) > 100
        or not re.fullmatch(r"(?:\w|\.\*|\\\.|\\d\+?|\.)*", regex)
        or regex.count("*") + regex.count("+") > 4
    ):
        raise ConfigError(
            f"{path}: the regex {str(regex)[:40]!r} of model.lora.config is more than names, '.', '.*' and '\\d'; "
            "give the strength as --lora-alpha instead"
        )
    return re.compile(regex)


def write_adapter(
    folder: Path,
    checkpoint: AdaptedCheckpoint,
    vocab_size: int,
    num_layers: int,
    quantized_embedding: bool,
) -> None:
    """Write `folder`/adapters.safetensors and adapter_config.json, which mlx_lm.load(...,
    adapter_path=) reads.

    mlx-lm knows one rank, one scale and one kind for all layers. Lower ranks are padded with zeros,
    scales that differ move into lora_b, and beside DoRA a LoRA layer becomes DoRA whose magnitudes
    are the lengths it has anyway.
    """
    adapters = list(checkpoint.adapters.values())
    rank, scales = (
        max(adapter.rank for adapter in adapters),
        {adapter.scale for adapter in adapters},
    )
    dora = any(adapter.magnitude is not None for adapter in adapters)
    if dora and quantized_embedding and any(adapter.embedding for adapter in adapters):
        raise OptionError(
            "mlx-lm applies no DoRA adapter to a quantized embedding; merge it, or leave the base unquantized"
        )
    folder.mkdir()
    arrays: dict[str, mx.array] = {}
    keys = []
    for adapter in adapters:
        stem = adapter.stem
        keys.append(stem)
        a, b = checkpoint.factors(adapter)
        b = b if len(scales) == 1 else b * adapter.scale
        a, b = (
            mx.pad(a, [(0, 0), (0, rank - adapter.rank)]),
            mx.pad(b, [(0, rank - adapter.rank), (0, 0)]),
        )
        arrays[f"{stem}.lora_a"] = a[:vocab_size] if adapter.embedding else a
        arrays[f"{stem}.lora_b"] = b
        if dora:
            magnitude = checkpoint.magnitude(adapter)
            arrays[f"{stem}.m"] = magnitude[:vocab_size] if adapter.embedding else magnitude
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays, metadata={"format": "mlx"})
    parameters = {
        "rank": rank,
        "scale": scales.pop() if len(scales) == 1 else 1.0,
        "dropout": 0.0,
        "keys": keys,
    }
    content = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }
    write_json(folder / "adapter_config.json", content)
