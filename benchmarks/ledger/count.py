"""Count the kernels that a GPU launches for one decoded token, and the bytes it moves.

    python -m openelm_mlx.benchmarks.ledger.count 270m
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --json
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --rows 4

The count is made on the graph, so it is the same on every machine; nothing is computed and no
weights are needed. The rules of what launches a kernel are in layout.py, after the source of MLX's
Metal backend; none of this has run on Metal. The host's time for a step is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from openelm_mlx.benchmarks.hardware import part_of
from openelm_mlx.benchmarks.ledger.graph import Array, Node
from openelm_mlx.benchmarks.ledger.layout import VIEWS, Layout, after, kernels
from openelm_mlx.benchmarks.ledger.steps import (
    HostTime,
    Traced,
    WeightSpec,
    host_times,
    trace_mlx_lm,
    trace_ours,
)
from openelm_mlx.device import mx
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import OpenELMError
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import MLX_GROUP_SIZE, make_spec

if TYPE_CHECKING:
    from rich.console import Console

KV = "kv"
UPDATES = {"ScatterAxis": 2, "SliceUpdate": 1}  # which input is written into the first one
# what a kernel is for -> how a kernel written for OpenELM could save it
ABSORBED = {
    "norm before attention": "computed by qkv_proj's kernel as it reads its input",
    "norm before FFN": "computed by proj_1's kernel as it reads its input",
    "query and key norm": "one kernel: norm, scale, rotate, and store key and value",
    "scale and rotate query and key": "same kernel",
    "rotate query and key": "same kernel",
    "store key and value": "same kernel",
    "angles of the position": "computed by that kernel",
    "slots and positions": "computed by that kernel",
    "mask": "attention told the length",
    "residual": "added by the projection's kernel",
    "gate": "computed by proj_1's kernel, which holds gate and up",
    "copy": "no copy, given contiguous input",
    "copy of keys or values": "no copy, given a view",
    "log-probabilities": "not needed for a greedy token",
    "logits to float32": "written so by the head's kernel",
    "next token": "maximum kept by the head's kernel, then a tiny one",
    "embedding row": "one kernel, also for quantized weights",
}
NORMS = {"attn_norm": "norm before attention", "ffn_norm": "norm before FFN", "norm": "last norm"}
PURPOSES = {  # of primitives that read no weight
    "RMSNorm": "query and key norm",
    "RoPE": "rotate query and key",
    "ScaledDotProductAttention": "attention",
    "ArgReduce": "next token",
    "LogSumExp": "log-probabilities",
    "Subtract": "log-probabilities",
    "Dequantize": "embedding row",
    "Gather": "copy of keys or values",
    "AsType": "logits to float32",
} | dict.fromkeys(UPDATES, "store key and value")
UNTESTED = (
    "Counted on the graph by the rules of MLX's Metal source; not run on Metal. Weights are read "
    "once; buffers are updated in place."
)


@dataclass
class Ledger:
    """The cost of one token. Bytes are those that kernels touch; `activations` stay in caches."""

    engine: str
    kernels: int = 0
    by_primitive: Counter[str] = field(default_factory=Counter)
    by_purpose: Counter[str] = field(default_factory=Counter)
    bytes_read: Counter[str] = field(default_factory=Counter)  # by part of the model
    bytes_written: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_from_memory(self) -> int:
        """Bytes of weights, keys and values that are read: what memory bandwidth bounds."""
        return self.bytes_read.total() - self.bytes_read["activations"]


def ledger(traced: Traced) -> Ledger:
    """Count every primitive of the graph. Raises `BenchmarkError` for one without a rule."""
    result = Ledger(traced.engine)
    layouts: dict[str, Layout] = {}
    sources = traced.parameters | dict.fromkeys(traced.caches, KV)
    for node in traced.graph.nodes:
        inputs = [layouts.get(array.name, Layout.rows(array.shape)) for array in node.inputs]
        outputs = [out.name for out in node.outputs]
        layouts |= zip(outputs, after(node, inputs), strict=True)
        if (node.name in VIEWS or node.name in UPDATES) and node.inputs[0].name in sources:
            # a view of a weight is that weight
            sources |= dict.fromkeys(outputs, sources[node.inputs[0].name])
        if count := kernels(node, inputs):
            result.kernels += count
            result.by_primitive[label(node)] += 1
            result.by_purpose[purpose_of(node, sources)] += 1
            if count > 1:
                result.by_primitive["copy of an input"] += count - 1
                result.by_purpose["copy"] += count - 1
            for part, size in bytes_read(node, inputs, sources, traced):
                result.bytes_read[part] += size
            written = KV if node.name in UPDATES else "activations"
            result.bytes_written[written] += sum(array.nbytes for array in written_by(node))
    return result


def bytes_read(
    node: Node, inputs: list[Layout], sources: Mapping[str, str], traced: Traced
) -> Iterator[tuple[str, int]]:
    """Yield the bytes that a kernel reads, by part.

    A lookup reads its rows, an update not the buffer, attention the slots that are filled.
    """
    for place, (array, layout) in enumerate(zip(node.inputs, inputs, strict=True)):
        size, source = layout.distinct, sources.get(array.name)
        if node.name == "ScaledDotProductAttention" and place in (1, 2):
            source = KV
            if array.shape[2] == traced.capacity:
                size = size * traced.context // traced.capacity
        elif place == 0 and node.name == "Gather":
            size = node.outputs[0].size
        elif place == 0 and node.name in UPDATES:
            continue
        part = source and source != KV and part_of(source)
        yield part or source or "activations", size * array.dtype.size


def written_by(node: Node) -> tuple[Array, ...]:
    return (node.inputs[UPDATES[node.name]],) if node.name in UPDATES else node.outputs


def label(node: Node) -> str:
    """Return a primitive's name as printed; a fused one by its arithmetic."""
    names = [part.name for part in node.parts if part.name not in ("Broadcast", "AsType")]
    return f"Compiled({' '.join(names)})" if node.parts else node.name


def purpose_of(node: Node, sources: Mapping[str, str]) -> str:
    """Return the purpose of a kernel, by the weight that it reads or else by its arithmetic."""
    reads = [sources[array.name] for array in node.inputs if array.name in sources]
    weight = next((path for path in reads if path != KV), None)
    if weight is not None:
        return purpose_of_weight(weight.rsplit(".", 1)[0], node)
    inside = {part.name for part in node.parts} or {node.name}
    integer = not any(mx.issubdtype(out.dtype, mx.floating) for out in node.outputs)
    if node.name in PURPOSES:
        return PURPOSES[node.name]
    if "Select" in inside and len(inside) > 3 and "Cos" not in inside:
        return "scale and rotate query and key"
    if inside & {"Cos", "Sin", "Exp"}:
        return "angles of the position"
    if "Sigmoid" in inside or inside == {"Compiled"}:
        return "gate"
    if "LessEqual" in inside or node.outputs[0].dtype == mx.bool_:
        return "mask"
    if node.name == "Add" and not integer:
        return "residual"
    return "slots and positions" if integer else "other"


def purpose_of_weight(module: str, node: Node) -> str:
    own = module.rsplit(".", 1)[-1]
    if own == "token_embeddings" and node.name in ("Gather", "Dequantize"):
        return "embedding row"
    if own in ("token_embeddings", "lm_head"):
        return "logits"
    if own.endswith("norm"):
        return NORMS.get(own, "query and key norm")
    return ".".join(module.rsplit(".", 2)[-2:])


def show(title: str, ledgers: Sequence[Ledger], times: Mapping[str, HostTime]) -> None:
    """Print kernels by purpose and by primitive, bytes by part, and the host's time."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)

    kernels = [str(entry.kernels) for entry in ledgers]
    memory = [f"{entry.bytes_from_memory:,}" for entry in ledgers]
    tables: tuple[tuple[str, str, str, list[str]], ...] = (
        (f"{title}, by purpose", "for", "by_purpose", ["all", *kernels]),
        ("The same kernels by primitive", "primitive", "by_primitive", ["all", *kernels]),
        ("Bytes read, by part", "part", "bytes_read", ["weights, keys, values", *memory]),
        ("Bytes written", "part", "bytes_written", []),
    )
    for heading, first, counter, last in tables:
        notes = ABSORBED if counter == "by_purpose" else None
        grid = Table(title=heading, title_justify="left", box=None, pad_edge=False)
        grid.add_column(first, overflow="fold")
        for entry in ledgers:
            grid.add_column(entry.engine, justify="right")
        if notes:
            grid.add_column("a kernel made for it could save it:", overflow="fold")
        counts: list[Counter[str]] = [getattr(entry, counter) for entry in ledgers]
        for name in dict.fromkeys(name for count in counts for name in count):  # as they run
            cells = [f"{count[name]:,}" if count[name] else "-" for count in counts]
            grid.add_row(name, *cells, *([notes.get(name, "")] if notes else []))
        if last:
            grid.add_row(*last)
        console.print(grid)
        console.print()
    if times:
        show_times(console, times)
    console.print(UNTESTED)


def show_times(console: Console, times: Mapping[str, HostTime]) -> None:
    console.print("Host time for a step, mx.fast calls as one primitive each", end=" ")
    console.print("(us, and as a share of mlx-lm's):")
    peer = times["mlx-lm"]
    for name, own in times.items():
        pairs = ((own.build, peer.build), (own.submit, peer.submit), (own.total, peer.total))
        build, submit, both = (f"{1e6 * mine:5.0f} ({mine / other:.2f})" for mine, other in pairs)
        console.print(f"  {name:<22}  build {build}  submit {submit}  both {both}")
    console.print()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openelm_mlx.benchmarks.ledger.count",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add("size", nargs="?", default="270m", help="a published size (default: 270m)")
    add("--bits", type=int, help="of the weights (default: unquantized)")
    size = MLX_GROUP_SIZE
    add(
        "--group-size", type=int, default=size, help=f"weights that share a scale (default: {size})"
    )
    dtypes = ", ".join(FLOATS)
    add("--dtype", default="bfloat16", help=f"of the activations: {dtypes} (default: bfloat16)")
    add("--context", type=int, default=64, help="tokens attended to (default: 64)")
    rows = "sequences stepped together, 1 to 5 (default: 1)"
    add("--rows", type=int, choices=range(1, 6), default=1, help=rows)
    steps = "steps timed on the host, of one row; 0 times none (default: 100)"
    add("--steps", type=int, default=100, help=steps)
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        config = OpenELMConfig.from_name(options.size)
        quantized = make_spec(options.bits, options.group_size if options.bits else None, None)
        spec = WeightSpec(options.dtype, None if quantized is None else quantized.as_config())
        ledgers = [ledger(trace_ours(config, spec, options.context, options.rows))]
        times = {}
        if options.rows == 1:  # mlx-lm has another cache for several rows, which is not counted
            ledgers.append(ledger(trace_mlx_lm(config, spec, options.context)))
            times = host_times(config, spec, options.steps) if options.steps else {}
    except OpenELMError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    if options.json:
        host = {name: asdict(time) for name, time in times.items()}
        print(json.dumps({"ledgers": [vars(each) for each in ledgers], "host_seconds": host}))
    else:
        several = f" of each of {options.rows} rows" if options.rows > 1 else ""
        kernels = f"kernels of one token{several} at {options.context} tokens"
        show(f"OpenELM {options.size}, {spec}: {kernels}", ledgers, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
