"""Count the kernels that a GPU launches for one decoded token, and the bytes it moves.

    python -m openelm_mlx.benchmarks.ledger.count 270m
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --json
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --rows 4
    python -m openelm_mlx.benchmarks.ledger.count 270m --sample

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
from openelm_mlx.benchmarks.ledger.layout import kernels, passes
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
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import OpenELMError
from openelm_mlx.graph.layout import VIEWS, Layout, after
from openelm_mlx.graph.trace import Array, Node
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import MLX_GROUP_SIZE, make_spec

if TYPE_CHECKING:
    from rich.console import Console

KV = "kv"
UPDATES = ("ScatterAxis", "SliceUpdate")  # of the first input
# what a kernel is for -> which kernel of our own saves it, or how one could
ABSORBED = {
    "norm before attention": "qkv_proj's kernel as it reads its input",
    "norm before FFN": "proj_1's kernel as it reads its input",
    "query and key norm": "norm_rope_store",
    "scale and rotate query and key": "norm_rope_store",
    "rotate query and key": "norm_rope_store",
    "store key and value": "norm_rope_store",
    "residual": "add_rms_norm",
    "mask": "attention that is told the length",
    "slots and positions": "the kernel that draws",
    "gate": "proj_1's kernel, which holds gate and up",
    "copy": "contiguous input",
    "copy of keys or values": "a view",
    "log-probabilities": "not needed for a greedy token",
    "logits to float32": "the head's kernel",
    "next token": "the head's kernel, then a tiny one",
    "sampling": "sample",
    "random numbers": "sample",
    "embedding row": "one kernel, also for quantized weights",
}
NORMS = {"attn_norm": "norm before attention", "ffn_norm": "norm before FFN", "norm": "last norm"}
PURPOSES = {  # of primitives that read no weight
    "RMSNorm": "query and key norm",
    "RoPE": "rotate query and key",
    "ScaledDotProductAttention": "attention",
    "ArgReduce": "next token",
    "LogSumExp": "log-probabilities",
    "Dequantize": "embedding row",
    "Gather": "copy of keys or values",
    "RandomBits": "random numbers",
    "norm_rope_store": "norm, rotate and store heads",
    "sample": "next token",
} | dict.fromkeys(UPDATES, "store key and value")
LATER = ("logits", "log-probabilities", "random numbers")  # what reads these has no other purpose
FURTHER, COPIED = "further passes", "copy of an input"
SAMPLED = SamplingOptions(temperature=0.8, top_k=40, top_p=0.9)
UNTESTED = (
    "Counted on the graph by the rules of MLX's Metal source; not run on Metal. Weights are read "
    "once."
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
    copies: int = 0
    """The buffers of keys and values that are updated by primitives of MLX. Each is copied at every
    step, by one more kernel, while the device is behind the host: commands that wait hold it
    (metal/eval.cpp), so that it is not updated in place (metal/indexing.cpp, gpu/slicing.cpp).
    """
    bytes_copied: int = 0  # by these copies, read and written

    @property
    def bytes_from_memory(self) -> int:
        """Bytes of weights, keys and values that are read: what memory bandwidth bounds."""
        return self.bytes_read.total() - self.bytes_read["activations"]


def ledger(traced: Traced) -> Ledger:
    """Count every primitive of the graph. Raises `BenchmarkError` for one without a rule."""
    result = Ledger(traced.engine)
    layouts: dict[str, Layout] = {}
    sources = traced.parameters | dict.fromkeys(traced.caches, KV)
    later: dict[str, str] = {}  # array -> purpose of what reads it
    for node in traced.graph.nodes:
        inputs = [layouts.get(array.name, Layout.rows(array.shape)) for array in node.inputs]
        outputs = [out.name for out in node.outputs]
        layouts |= zip(outputs, after(node, inputs), strict=True)
        if node.name in VIEWS or node.name in UPDATES:  # a view of a weight is that weight
            for out, read in zip(outputs, node.inputs, strict=False):
                sources |= {out: sources[read.name]} if read.name in sources else {}
        purpose = purpose_of(node, sources, later)
        if purpose in LATER or any(array.name in later for array in node.inputs):
            later |= dict.fromkeys(outputs, purpose if purpose in LATER[1:] else "sampling")
        if count := kernels(node, inputs):
            more, copies = passes(node, inputs), count - passes(node, inputs)
            result.kernels += count
            result.by_primitive += Counter({label(node): 1, FURTHER: more - 1, COPIED: copies})
            result.by_purpose += Counter({purpose: more, "copy": copies})
            for part, size in bytes_read(node, inputs, sources, traced):
                result.bytes_read[part] += size
            for part, size in bytes_written(node):
                result.bytes_written[part] += size
            if node.name in UPDATES and node.inputs[0].name in sources:
                result.copies += 1
                result.bytes_copied += 2 * node.inputs[0].nbytes
    return result


def bytes_read(
    node: Node, inputs: list[Layout], sources: Mapping[str, str], traced: Traced
) -> Iterator[tuple[str, int]]:
    """Yield the bytes that a kernel reads, by part.

    A lookup reads its rows, an update not the buffer, attention the slots that are filled.
    """
    buffers = buffers_of(node)
    attention = node.name == "ScaledDotProductAttention"
    for place, (array, layout) in enumerate(zip(node.inputs, inputs, strict=True)):
        size, source = layout.distinct, sources.get(array.name)
        if attention and place in (1, 2):
            source = KV
            if array.shape[-2] == traced.capacity:
                size = size * traced.context // traced.capacity
        elif place == 0 and node.name == "Gather":
            size = node.outputs[0].size
        elif array in buffers:
            continue
        part = source and source != KV and part_of(source)
        yield part or source or "activations", size * array.dtype.size


def bytes_written(node: Node) -> Iterator[tuple[str, int]]:
    """Yield the bytes that a kernel writes, by part: of a buffer those of one token."""
    if node.name not in UPDATES:
        yield "activations", sum(array.nbytes for array in node.outputs)
    for buffer in buffers_of(node):
        yield KV, buffer.nbytes // buffer.shape[-2]


def buffers_of(node: Node) -> list[Array]:
    """Return the buffers of keys and values to which a node adds those of a token."""
    if node.kernel is None:
        return [node.inputs[0]] if node.name in UPDATES else []
    named = zip(node.kernel.inputs, node.inputs, strict=True)
    return [array for name, array in named if name in node.kernel.in_place]


def label(node: Node) -> str:
    """Return a primitive's name as printed; a fused one by its arithmetic."""
    names = [part.name for part in node.parts if part.name not in ("Broadcast", "AsType")]
    return f"Compiled({' '.join(names)})" if node.parts else node.name


def purpose_of(node: Node, sources: Mapping[str, str], later: Mapping[str, str]) -> str:
    """Return the purpose of a kernel: by what it is, by the weight that it reads, by what it comes
    after (`LATER`), or else by its arithmetic.
    """
    if node.name in PURPOSES and (node.kernel or node.name in ("ArgReduce", "RandomBits")):
        return PURPOSES[node.name]
    reads = [sources[array.name] for array in node.inputs if array.name in sources]
    weight = next((path for path in reads if path != KV), None)
    if weight is not None:
        return purpose_of_weight(weight.rsplit(".", 1)[0], node)
    inside = {part.name for part in node.parts} or {node.name}
    integer = not any(mx.issubdtype(out.dtype, mx.floating) for out in node.outputs)
    if node.name in PURPOSES:
        return PURPOSES[node.name]
    if node.name == "AsType" and not integer:
        return "logits to float32"
    if after_what := [later[array.name] for array in node.inputs if array.name in later]:
        return LATER[1] if LATER[1] in after_what else max(after_what)  # else "sampling" if any is
    if node.outputs[0].dtype == mx.uint32 and node.parts:
        return "random numbers"
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
            grid.add_column("saved, or could be, by", overflow="fold")
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
    for entry in ledgers:
        if entry.copies:
            behind = f"{entry.engine}: while the device is behind the host, {entry.copies} buffers"
            console.print(f"{behind} are copied at every step too, {entry.bytes_copied:,} bytes.")


def show_times(console: Console, times: Mapping[str, HostTime]) -> None:
    console.print("Host time for a step without our kernels, mx.fast calls as one primitive each")
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
    sample = f"sample at temperature {SAMPLED.temperature}, top-k {SAMPLED.top_k}, top-p "
    add("--sample", action="store_true", help=f"{sample}{SAMPLED.top_p} (default: greedy)")
    steps = "steps timed on the host, of one row; 0 times none (default: 100)"
    add("--steps", type=int, default=100, help=steps)
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        config = OpenELMConfig.from_name(options.size)
        quantized = make_spec(options.bits, options.group_size if options.bits else None, None)
        spec = WeightSpec(options.dtype, None if quantized is None else quantized.as_config())
        sampling = SAMPLED if options.sample else SamplingOptions()
        how = config, spec, options.context, options.rows, sampling
        ledgers = [ledger(trace_ours(*how, kernels=on)) for on in (True, False)]
        times = {}
        # of mlx-lm one greedy row is counted: it has another cache for several, other samplers
        if options.rows == 1 and not options.sample:
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
        drawn = ", sampled" if options.sample else ""
        show(f"OpenELM {options.size}, {spec}: {kernels}{drawn}", ledgers, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
