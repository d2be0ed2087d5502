"""`openelm inspect`: a model's layers, parameters and bytes, from its configuration and headers."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Collection
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.options import MODEL_HELP, given_path
from openelm_mlx.errors import CacheError, naming
from openelm_mlx.quantization import stem_of

if TYPE_CHECKING:
    from openelm_mlx.engine.memory import Choice
    from openelm_mlx.model.cache_kinds import CacheKind
    from openelm_mlx.model.config import OpenELMConfig

EXAMPLES = """examples:
  openelm inspect 1.1b                 a published size, nothing downloaded
  openelm inspect my-model --json
  openelm inspect my-model --adapter my-adapter     its kind, ranks and matrices
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="layers, parameters and bytes of a model",
        description="Show heads and sizes of each layer, parameters, and bytes by part.\n"
        "It reads no weights, only their headers.",
        epilog=EXAMPLES,
    )
    named: Any = {"nargs": "?", "default": "openelm-tiny"}
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **named)
    text = "describe the LoRA or DoRA adapter in this folder, too"
    parser.add_argument("--adapter", metavar="FOLDER", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = inspect(args.model, None if args.adapter is None else given_path(args.adapter))
    if args.json:
        print(json.dumps(facts))
    else:
        show(facts)
    return 0


def show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80)
    title = f"{facts['name']}: {facts['layers_total']} layers, dim {facts['model_dim']}"
    table = Table(title=title, title_justify="left")
    for column in ("layer", "query heads", "kv heads", "FFN width"):
        table.add_column(column, justify="right")
    table.add_column("parameters")
    widest = max(layer["parameters"] for layer in facts["layers"])
    for number, layer in enumerate(facts["layers"]):
        bar = "█" * max(1, round(24 * layer["parameters"] / widest))
        sizes = (str(layer[key]) for key in ("q_heads", "kv_heads", "ffn_dim"))
        table.add_row(str(number), *sizes, f"{bar} {layer['parameters'] / 1e6:.2f}M")
    console.print(table)
    print(f"parameters          {facts['parameters']:,}")
    context = f"{facts['max_context_length']:,} tokens"
    print(f"vocabulary          {facts['vocab_size']:,}, context {context}")
    bits = f"{facts['bits_per_weight']:.2f} bits per weight"
    print(f"weights             {facts['bytes']:,} bytes, {bits}")
    for part, size in facts["bytes_by_part"].items():
        print(f"  {part:<18}{size:,} bytes ({size / facts['bytes']:.1%})")
    print(f"a token reads       {facts['bytes_read_per_token']:,} bytes of weights")
    added = [f"{size:,} bytes {kind}" for kind, size in facts["kv_bytes_per_token"].items()]
    print(f"a token adds        {'; '.join(added)}")
    print(f"assumed             {facts['assumed']}")
    for mac in facts["macs"]:
        print(f"{'on a Mac of ' + size_text(mac['memory_bytes']):<20}{room_text(mac)}")
    print("  computed          for one sequence of a full context; not measured on a Mac")
    for place, (dtype, why) in facts.get("computed_in", {}).items():
        print(f"computed in         {dtype} on {place}: {why}")
    if adapter := facts.get("adapter"):
        ranks, scales = (spread(adapter[key]) for key in ("ranks", "scales"))
        print(f"adapter             {adapter['name']}: {adapter['kind']}, rank {ranks}")
        print(f"  scale             {scales}")
        for matrix, layers in adapter["matrices"].items():
            where = f" of layers {runs(layers)}" if layers else ""
            print(f"  changes           {matrix}{where}")
        size = f"{adapter['bytes']:,} bytes in float32"
        print(f"  parameters        {adapter['parameters']:,}, {size}")


def size_text(size: int) -> str:
    return f"{size / 2**30:.0f} GB"


def room_text(mac: dict[str, Any]) -> str:
    """Write whether a model fits, as in "fits: 4.8 of 5.7 GB, prompts in chunks of 256"."""
    room = f"{mac['needs_bytes'] / 1e9:.1f} of {mac['recommended_bytes'] / 1e9:.1f} GB"
    chunks = "prompts in chunks of"
    if mac["fits"]:
        return f"fits: {room}, {chunks} {mac['prefill_chunk']}"
    found = mac["fits_with"]
    if found is None:
        return f"does not fit: {room}; no options make it"
    given = {"--bits": found["bits"], "--kv-bits": found["kv_bits"]}
    flags = " ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
    size = f"{found['needs_bytes'] / 1e9:.1f} GB"
    return f"does not fit: {room}; with {flags} {size}, {chunks} {found['prefill_chunk']}"


def spread(values: Collection[float]) -> str:
    """Write the least and the greatest of some numbers, as in "4 to 16"."""
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def runs(numbers: list[int]) -> str:
    """Write rising numbers in short, as in "0-3, 7"."""
    found = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        found.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(found)


MACS = (8 << 30, 16 << 30)  # bytes of the machines that `inspect` plans for
PLANNED_BITS = (8, 6, 5, 4)  # fewer lose much (docs/quantization.md)
PARTS = {  # and what the names of their tensors have; all others are norms
    "embedding": "token_embeddings",
    "head": "lm_head",
    "attention": "_proj",
    "feed-forward": ".proj_",
}


def inspect(name: str, adapter: Path | None = None) -> dict[str, Any]:
    """Return everything that `openelm inspect` shows, as plain data.

    A published size needs no file, and of a folder only the headers are read. `adapter` is the
    folder of one; it is read, and must fit the model.
    """
    from openelm_mlx.engine.compute_type import largest_activation
    from openelm_mlx.engine.hub import resolve_model
    from openelm_mlx.model.checkpoint import read_headers
    from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, expected_tensors, normal_name

    apples = "/" not in name or name.lower().startswith("apple/")
    if apples and normal_name(name) in PUBLISHED and not os.path.exists(name):
        config = OpenELMConfig.from_name(name)
        sizes = {tensor: 2 * math.prod(shape) for tensor, shape in expected_tensors(config).items()}
        assumed = "bfloat16 weights and cache, as nothing was downloaded"
        facts = describe(name, config, sizes, assumed) | computed_facts(config, "float32", None)
        facts |= mac_facts(config, sum(sizes.values()), True)
        return facts | adapter_facts(adapter, config)
    folder = resolve_model(name).folder
    with naming(folder):
        headers = read_headers(folder)
    config = headers.config
    sizes = {tensor: place.info.nbytes for tensor, (_, place) in headers.places.items()}
    infos = [place.info for _, place in headers.places.values()]
    # on a Mac float32 becomes a type of 16 bits
    weights = sum(info.nbytes // 2 if info.dtype == "float32" else info.nbytes for info in infos)
    stored = headers.places["transformer.norm.weight"][1].info.dtype
    facts = describe(name, config, sizes, "a 16-bit cache")
    facts |= mac_facts(config, weights, not headers.specs)
    computed = computed_facts(config, stored, largest_activation(folder, headers))
    return facts | computed | adapter_facts(adapter, config)


def mac_facts(config: OpenELMConfig, weights: int, quantizable: bool) -> dict[str, Any]:
    """Return whether a model fits on Macs of 8 and 16 GB, and else the options that make it fit."""
    from openelm_mlx.engine.memory import plan
    from openelm_mlx.model.config import expected_tensors
    from openelm_mlx.quantization import MLX_GROUP_SIZE, QuantSpec, matrices

    shapes = expected_tensors(config)
    stems = matrices(shapes)
    rest = 2 * sum(math.prod(shape) for shape in shapes.values() if len(shape) != 2)
    sizes: dict[int | None, int] = {None: weights}
    if quantizable and all(shape[1] % MLX_GROUP_SIZE == 0 for shape in stems.values()):
        for bits in PLANNED_BITS:
            spec = QuantSpec(bits, MLX_GROUP_SIZE)
            sizes[bits] = rest + sum(spec.nbytes(of, "bfloat16") for of in stems.values())
    macs = []
    for memory in MACS:
        found = plan(config, sizes, memory)
        fits = found.fitting == found.plain
        macs.append(
            {
                "memory_bytes": memory,
                "recommended_bytes": found.available,
                **chosen(found.plain),
                "needs": found.plain.needs._asdict(),
                "fits": fits,
                "fits_with": None if found.fitting is None else chosen(found.fitting),
            }
        )
    return {"macs": macs}


def chosen(choice: Choice) -> dict[str, Any]:
    return {
        "bits": choice.bits,
        "kv_bits": choice.kv_bits,
        "prefill_chunk": choice.chunk,
        "needs_bytes": choice.needs.total,
    }


def computed_facts(config: OpenELMConfig, stored: str, largest: float | None) -> dict[str, Any]:
    """Return the types that a processor and a GPU would compute in, unasked, and why."""
    from openelm_mlx.engine.compute_type import compute_dtype

    kinds = {"a processor": "cpu", "a GPU": "metal"}
    found = {
        place: tuple(compute_dtype(config, stored, None, kind, largest))
        for place, kind in kinds.items()
    }
    return {"computed_in": found}


def adapter_facts(folder: Path | None, config: OpenELMConfig) -> dict[str, Any]:
    """Return the entry about an adapter, or none if there is no folder."""
    if folder is None:
        return {}
    from openelm_mlx.engine.adapter_files import read_adapter
    from openelm_mlx.model.config import HEAD, expected_tensors

    adapter = read_adapter(folder, config)
    parts = adapter.parts.values()
    kinds = {"LoRA" if part.magnitude is None else "DoRA" for part in parts}
    matrices: dict[str, list[int]] = {}  # and the layers whose matrix is changed
    stems = dict.fromkeys([*map(stem_of, expected_tensors(config)), HEAD])
    for stem in (stem for stem in stems if stem in adapter.parts):
        layer, _, name = stem.removeprefix("transformer.layers.").partition(".")
        if layer.isdecimal():
            matrices.setdefault(name, []).append(int(layer))
        else:
            matrices[stem.removeprefix("transformer.")] = []
    about = {
        "name": adapter.name,
        "kind": " and ".join(sorted(kinds, reverse=True)),
        "ranks": sorted({part.rank for part in parts}),
        "scales": sorted({part.scale for part in parts}),
        "matrices": matrices,
        "parameters": adapter.num_parameters,
        "bytes": 4 * adapter.num_parameters,
    }
    return {"adapter": about}


def describe(
    name: str, config: OpenELMConfig, sizes: dict[str, int], assumed: str
) -> dict[str, Any]:
    """Compute all figures from the bytes of each tensor."""
    from openelm_mlx.model.config import expected_tensors, layer_shapes

    shapes, tensors = layer_shapes(config), expected_tensors(config).items()
    total = sum(sizes.values())
    layers = []
    for number, shape in enumerate(shapes):
        prefix = f"transformer.layers.{number}."
        count = sum(math.prod(dims) for tensor, dims in tensors if tensor.startswith(prefix))
        layers.append({**shape._asdict(), "parameters": count})
    read = total
    if not config.share_input_output_layers:  # one row of the embedding; a tied one is the head
        embedding = sum(size for tensor, size in sizes.items() if "token_embeddings" in tensor)
        read += embedding // config.vocab_size - embedding
    return {
        "name": name,
        "model_dim": config.model_dim,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_context_length": config.max_context_length,
        "layers_total": len(shapes),
        "layers": layers,
        "parameters": config.num_parameters,
        "bytes": total,
        "bits_per_weight": 8 * total / config.num_parameters,
        "bytes_by_part": by_part(sizes),
        "bytes_read_per_token": read,
        "kv_bytes_per_token": {
            name: kind.bytes_per_token(config, itemsize=2)
            for name, kind in cache_kinds(config).items()
        },
        "assumed": assumed,
    }


def cache_kinds(config: OpenELMConfig) -> dict[str, CacheKind]:
    """Return the kinds of cache that the size of the model's heads allows, by name."""
    from openelm_mlx.engine.options import KV_BITS, EngineOptions
    from openelm_mlx.model.cache_kinds import CacheKind

    kinds = {"16-bit": CacheKind()}
    for bits in sorted(KV_BITS, reverse=True):
        with contextlib.suppress(CacheError):
            kind = CacheKind.of(config, EngineOptions(kv_bits=bits))
            kinds[f"{bits}-bit (--kv-bits {bits})"] = kind
    return kinds


def by_part(sizes: dict[str, int]) -> dict[str, int]:
    """Sum the bytes of each part of the model; scales and biases are a part of their own."""
    parts: dict[str, int] = {}
    for tensor, size in sizes.items():
        part = next((part for part, mark in PARTS.items() if mark in tensor), "norms")
        if tensor.endswith((".scales", ".biases")):
            part = "scales and biases"
        parts[part] = parts.get(part, 0) + size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))
