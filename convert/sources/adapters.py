"""LoRA and DoRA: CoreNet's checkpoints, merged or kept apart, and mlx-lm's adapter folders, merged.

An adapter of W [out, in] is two thin matrices whose product is added to it, scaled by s:

    LoRA (arXiv:2106.09685)     s = alpha / r
    rsLoRA (arXiv:2312.03732)   s = alpha / sqrt(r)
    DoRA (arXiv:2402.09353)     like LoRA, with every row scaled to its learned length m

CoreNet (corenet/third_party/modeling/lora.py, after Hugging Face's peft) stores A [r, in] and
B [out, r]; on the embedding [vocabulary, dim] A [r, vocabulary] and B [dim, r]. There only the
input side is adapted: the tied head keeps the base, so a merged model has a head of its own.

mlx-lm (mlx_lm/tuner) stores lora_a [in, r] and lora_b [r, out]; on the embedding lora_a
[vocabulary, r] and lora_b [r, dim]; one scale for all layers; and m as `m`. A tied embedding is
adapted in the head too, so merging leaves it tied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import EMBEDDINGS, HEAD, TensorSource
from openelm_mlx.convert.sources.folder import load_place
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError, OptionError
from openelm_mlx.files import TensorPlace, read_header, read_json, read_yaml, write_json
from openelm_mlx.quantization import stem_of

BASE = re.compile(r"(.+)\.base_layer\.weight")
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(\w+)(?:\.weight)?"
)
ADAPTER_FOLDER, ADAPTERS, SETTINGS = "adapter", "adapters.safetensors", "adapter_config.json"
LEAVES = ("lora_a", "lora_b", "m")
Strength = Callable[[str, int], float]


def merged(
    base: mx.array, a: mx.array, b: mx.array, scale: float, m: mx.array | None, embedding: bool
) -> mx.array:
    """Return the float32 weights of an adapted layer; `a` and `b` are mlx-lm's, in float32."""
    first, second = (a, b) if embedding else (b.T, a.T)
    weight = mx.addmm(base.astype(mx.float32), first, second, alpha=scale)
    return weight if m is None else weight * (m / mx.linalg.norm(weight, axis=1))[:, None]


@dataclass(frozen=True)
class LoraOptions:
    """The strength of an adapter, which is not in its tensors; by default it is in the YAML."""

    alpha: float | None = None
    rank_stabilised: bool = False
    yaml: Path | None = None


@dataclass(frozen=True)
class Adapter:
    """One adapted layer of CoreNet: the names of its tensors, and the strength of B A."""

    stem: str
    a: str
    b: str
    magnitude: str | None
    rank: int
    scale: float
    embedding: bool


class AdaptedCheckpoint(TensorSource):
    """A checkpoint with adapters, seen as a plain one: merged, or (`merge` False) its base alone.

    Raises `ConversionError` if the parts of an adapter do not fit together, or if its
    strength is not known.
    """

    def __init__(self, source: TensorSource, options: LoraOptions, merge: bool = True) -> None:
        self.path, self.merge = source.path, merge
        self.adapters = find_adapters(source, options)
        self._source = source
        self._stored: dict[str, str] = {}  # name here -> name in the source
        for name in source.tensors:
            if not PART.fullmatch(name):
                base = BASE.fullmatch(name)
                self._stored[f"{base[1]}.weight" if base else name] = name
        embedding = next((a.stem for a in self.adapters.values() if a.embedding), None)
        if embedding is not None and f"{HEAD}.weight" not in self._stored:
            self._stored[f"{HEAD}.weight"] = f"{embedding}.base_layer.weight"
        self.tensors = {name: source.tensors[stored] for name, stored in self._stored.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`, merged in float32 and rounded once to the type of its base."""
        base = self._source.load(self._stored[name])
        adapter = self.adapters.get(stem_of(name))
        if adapter is None or not self.merge:
            return base
        return self._merged(adapter, base).astype(base.dtype)

    def factors(self, adapter: Adapter) -> tuple[mx.array, mx.array]:
        """Return mlx-lm's lora_a and lora_b in float32."""
        a, b = (self._source.load(name).astype(mx.float32) for name in (adapter.a, adapter.b))
        return a.T, b.T

    def magnitude(self, adapter: Adapter) -> mx.array:
        """Return mlx-lm's `m`: the lengths of the adapted rows, which LoRA does not state."""
        if adapter.magnitude is not None:
            return self._source.load(adapter.magnitude).astype(mx.float32).reshape(-1)
        base = self._source.load(f"{adapter.stem}.base_layer.weight")
        return mx.linalg.norm(self._merged(adapter, base), axis=1)

    def _merged(self, adapter: Adapter, base: mx.array) -> mx.array:
        m = None if adapter.magnitude is None else self.magnitude(adapter)
        return merged(base, *self.factors(adapter), adapter.scale, m, adapter.embedding)


def has_adapters(source: TensorSource) -> bool:
    return any(BASE.fullmatch(name) or PART.fullmatch(name) for name in source.tensors)


def find_adapters(source: TensorSource, options: LoraOptions) -> dict[str, Adapter]:
    """Return the adapted layers by stem. Raises `ConversionError` if parts do not fit."""
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
    return {stem: make_adapter(source, stem, found, scale_of) for stem, found in parts.items()}


def make_adapter(
    source: TensorSource, stem: str, found: Mapping[str, str], scale_of: Strength
) -> Adapter:
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
    return Adapter(stem, found["lora_A"], found["lora_B"], magnitude, rank, scale, embedding)


def strengths(path: Path, options: LoraOptions) -> Strength:
    """Return the function from stem and rank to s, which may raise. Flags win over the YAML."""
    rules = [] if options.alpha is not None or options.yaml is None else lora_rules(options.yaml)

    def strength(stem: str, rank: int) -> float:
        if options.alpha is not None:
            return options.alpha / (math.sqrt(rank) if options.rank_stabilised else rank)
        corenets = "classifier" if stem == HEAD else stem.removeprefix("transformer.")
        for pattern, alpha, yaml_rank, stabilised in rules:
            if not pattern.match(corenets):
                continue
            if yaml_rank != rank:
                raise ConfigError(
                    f"{options.yaml} gives {corenets} rank {yaml_rank}, but its tensors have rank "
                    f"{rank}"
                )
            return alpha / (math.sqrt(rank) if stabilised else rank)
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
    """Compile a pattern if it is as simple as CoreNet's; a hostile one could run forever."""
    plain = isinstance(regex, str) and re.fullmatch(r"(?:\w|\.\*|\\\.|\\d\+?|\.)*", regex)
    if not plain or len(regex) > 100 or regex.count("*") + regex.count("+") > 4:
        raise ConfigError(
            f"{path}: the regex {str(regex)[:40]!r} of model.lora.config is more than names, '.', "
            "'.*' and '\\d'; give the strength as --lora-alpha instead"
        )
    return re.compile(regex)


def write_adapter(
    folder: Path, checkpoint: AdaptedCheckpoint, rows: int, layers: int, quantized_embedding: bool
) -> None:
    """Write the folder that mlx_lm.load(..., adapter_path=) reads; `rows` is the vocabulary's size.

    mlx-lm knows one rank, one scale and one kind for all layers. Lower ranks are padded with zeros,
    scales that differ move into lora_b, and beside DoRA a LoRA layer becomes DoRA whose magnitudes
    are the lengths it has anyway.
    """
    adapters = list(checkpoint.adapters.values())
    rank = max(adapter.rank for adapter in adapters)
    scales = {adapter.scale for adapter in adapters}
    dora = any(adapter.magnitude is not None for adapter in adapters)
    if dora and quantized_embedding and any(adapter.embedding for adapter in adapters):
        raise OptionError(
            "mlx-lm applies no DoRA adapter to a quantized embedding; merge it, or leave the base "
            "unquantized"
        )
    folder.mkdir()
    arrays: dict[str, mx.array] = {}
    for adapter in adapters:
        a, b = checkpoint.factors(adapter)
        b = b if len(scales) == 1 else b * adapter.scale
        a = mx.pad(a, [(0, 0), (0, rank - adapter.rank)])
        b = mx.pad(b, [(0, rank - adapter.rank), (0, 0)])
        kept = rows if adapter.embedding else None
        arrays[f"{adapter.stem}.lora_a"], arrays[f"{adapter.stem}.lora_b"] = a[:kept], b
        if dora:
            arrays[f"{adapter.stem}.m"] = checkpoint.magnitude(adapter)[:kept]
    mx.save_safetensors(str(folder / ADAPTERS), arrays, metadata={"format": "mlx"})
    parameters = {
        "rank": rank,
        "scale": scales.pop() if len(scales) == 1 else 1.0,
        "dropout": 0.0,
        "keys": [adapter.stem for adapter in adapters],
    }
    kind = "dora" if dora else "lora"
    settings = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    write_json(folder / SETTINGS, settings)


class FusedAdapter(TensorSource):
    """A source with an adapter of mlx-lm merged into it. Raises `ConversionError`."""

    def __init__(self, source: TensorSource, folder: Path) -> None:
        self.path, self._source, self._folder = source.path, source, folder
        self.config, self.tokenizer = source.config, source.tokenizer
        self.instruct, self.licence = source.instruct, source.licence
        self.tensors = dict(source.tensors)
        self._scale, places = read_adapter(folder)
        self._parts: dict[str, dict[str, TensorPlace]] = {}  # name in the source -> leaf -> place
        for name, place in places.items():
            stem, _, leaf = name.rpartition(".")
            if leaf not in LEAVES or f"{stem}.weight" not in source.tensors:
                raise ConversionError(
                    f"{folder} adapts {name[:100]}, which {source.path} does not have"
                )
            self._parts.setdefault(f"{stem}.weight", {})[leaf] = place
        for name, parts in self._parts.items():
            check_parts(folder, name, source.tensors[name].shape, parts)
        adapted = {stem_of(name) for name in self._parts}
        self.plan = {stem: spec for stem, spec in source.plan.items() if stem not in adapted}

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._source.files, self._folder / ADAPTERS)

    def packed(self, name: str) -> dict[str, mx.array]:
        return self._source.packed(name)

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`, merged in float32 and rounded once to the type of its base."""
        base = self._source.load(name)
        if name not in self._parts:
            return base
        stored = self._parts[name]
        parts = {leaf: load_place(place).astype(mx.float32) for leaf, place in stored.items()}
        a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
        embedding = name == f"{EMBEDDINGS}.weight"
        return merged(base, a, b, self._scale, m, embedding).astype(base.dtype)


def check_parts(
    folder: Path, name: str, shape: tuple[int, ...], parts: Mapping[str, TensorPlace]
) -> None:
    """Raise `ConversionError` if the parts of an adapter do not fit its base of `shape`."""
    shapes = {leaf: place.info.shape for leaf, place in parts.items()}
    rank = shapes.get("lora_a", (0, 0))[-1]
    outer = shape if name == f"{EMBEDDINGS}.weight" else shape[::-1]
    wanted = {"lora_a": (outer[0], rank), "lora_b": (rank, outer[-1]), "m": (shape[0],)}
    complete = len(shape) == 2 and {"lora_a", "lora_b"} <= shapes.keys()
    if not complete or any(shapes[leaf] != wanted[leaf] for leaf in shapes):
        raise ConversionError(
            f"{folder}: the parts of {name} have shapes {shapes}, which do not fit a base of "
            f"{shape}"
        )


def read_adapter(folder: Path) -> tuple[float, dict[str, TensorPlace]]:
    """Return the scale of an adapter folder and the places of its tensors.

    Raises `ConversionError`, `CheckpointError` or `ConfigError`.
    """
    raw = read_json(folder / SETTINGS)
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise ConversionError(
            f"{folder}: fine_tune_type is {str(kind)[:40]!r}; lora and dora are merged"
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e9:
        raise ConversionError(f"{folder}: {SETTINGS} has no number as lora_parameters.scale")
    return float(scale), read_header(folder / ADAPTERS)
