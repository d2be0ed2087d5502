"""The ledger of one decoding step: kernels that a GPU launches for it, bytes it moves, time the
host takes to submit it.

    python -m openelm_mlx.benchmarks.ledger.count 270m
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --json
    python -m openelm_mlx.benchmarks.ledger.count 270m --bits 4 --rows 4

Counted on the graph, so it is the same on every machine; nothing is computed and no weights are
needed. Rules of what launches a kernel are in layout.py, after the source of MLX's Metal backend;
none of this has run on Metal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from openelm_mlx.benchmarks.hardware.roofline import part_of
from openelm_mlx.benchmarks.ledger.graph import Node
from openelm_mlx.benchmarks.ledger.layout import VIEWS, Layout, after, kernels
from openelm_mlx.benchmarks.ledger.trace import DTYPES, Form, Traced, trace_mlx_lm, trace_ours
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.model.config import OpenELMConfig

WRITES = (
    "ScatterAxis",
    "SliceUpdate",
    "DynamicSliceUpdate",
)  # into a buffer of which only the update is touched

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


@dataclass
class Ledger:
    """What one token costs. Bytes are those that kernels touch; `activations` never leave the
    caches of a chip.
    """

    engine: str
    kernels: int = 0
    by_primitive: Counter[str] = field(default_factory=Counter)
    by_purpose: Counter[str] = field(default_factory=Counter)
    bytes_read: Counter[str] = field(
        default_factory=Counter
    )  # by part of the model, and "activations"
    bytes_written: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_from_memory(self) -> int:
        """Bytes of weights, keys and values that are read: what memory bandwidth bounds."""
        return sum(size for part, size in self.bytes_read.items() if part != "activations")

    def as_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "kernels": self.kernels,
            "by_primitive": dict(self.by_primitive),
            "by_purpose": dict(self.by_purpose),
            "bytes_read": dict(self.bytes_read),
            "bytes_written": dict(self.bytes_written),
        }


def ledger(traced: Traced) -> Ledger:
    """Count every primitive of the graph. Raises `BenchmarkError` for a primitive without a rule in
    layout.py.
    """
    result = Ledger(traced.engine)
    layouts: dict[str, Layout] = {}
    parts = dict.fromkeys(traced.caches, "kv") | {
        name: part_of(path) for name, path in traced.parameters.items()
    }
    for node in traced.graph.nodes:
        inputs = [layouts.get(array.name, Layout.rows(array.shape)) for array in node.inputs]
        count = kernels(node, inputs)
        for out, layout in zip(node.outputs, after(node, inputs), strict=True):
            layouts[out.name] = layout
        if node.name in VIEWS or node.name in WRITES:  # a view of a weight is that weight
            parts.update(
                (out.name, parts[node.inputs[0].name])
                for out in node.outputs
                if node.inputs[0].name in parts
            )
        if not count:
            continue
        result.kernels += count
        result.by_primitive[label(node)] += 1
        result.by_primitive["copy of an input"] += count - 1
        purpose = purpose_of(node, traced)
        result.by_purpose[purpose] += 1
        result.by_purpose["copy"] += count - 1
        for part, size in reads(node, inputs, parts, traced):
            result.bytes_read[part] += size
        written = sum(
            a.size * a.dtype.size
            for a in (
                node.inputs[-1:]
                if node.name == "SliceUpdate"
                else node.inputs[2:3]
                if node.name in WRITES
                else node.outputs
            )
        )
        result.bytes_written["kv" if node.name in WRITES else "activations"] += written
    for counter in (result.by_primitive, result.by_purpose):
        for key in [key for key, n in counter.items() if not n]:
            del counter[key]
    return result


def reads(
    node: Node, inputs: list[Layout], parts: Mapping[str, str], traced: Traced
) -> Iterable[tuple[str, int]]:
    """Bytes read by part. A lookup reads its rows, an update not the buffer, attention the slots
    that are filled.
    """
    for number, (array, layout) in enumerate(zip(node.inputs, inputs, strict=True)):
        size = layout.distinct
        part = parts.get(array.name, "activations")
        if number == 0 and node.name in WRITES:
            continue
        if number == 0 and node.name == "Gather":
            size = node.outputs[0].size
        if node.name == "ScaledDotProductAttention" and number in (1, 2):
            size = (
                size * traced.context // traced.capacity
                if array.shape[2] == traced.capacity
                else size
            )
            part = "kv"
        yield part, size * array.dtype.size


def label(node: Node) -> str:
    """A primitive's name as printed; a fused one by its arithmetic."""
    if not node.parts:
        return node.name
    return (
        "Compiled("
        + " ".join(p.name for p in node.parts if p.name not in ("Broadcast", "AsType"))
        + ")"
    )


def purpose_of(node: Node, traced: Traced) -> str:
    """What a kernel is for, told by the parameters it reads and by its arithmetic."""
    reads = [traced.parameters[a.name] for a in node.inputs if a.name in traced.parameters]
    reads += [weight for a in node.inputs for weight in [weight_behind(a.name, traced)] if weight]
    module = reads[0].rsplit(".", 1)[0] if reads else ""
    inside = {part.name for part in node.parts} or {node.name}
    if module.endswith("token_embeddings"):
        return "embedding row" if node.name in ("Gather", "Dequantize") else "logits"
    if module.endswith("lm_head"):
        return "logits"
    if module.endswith(("_norm", "transformer.norm")):
        own = module.rsplit(".", 1)[-1]
        return {
            "attn_norm": "norm before attention",
            "ffn_norm": "norm before FFN",
            "norm": "last norm",
        }.get(own, "query and key norm")
    if "proj" in module:
        return ".".join(module.rsplit(".", 2)[-2:])
    match node.name:
        case "RMSNorm":
            return "query and key norm"
        case "RoPE":
            return "rotate query and key"
        case "ScaledDotProductAttention":
            return "attention"
        case "ArgReduce":
            return "next token"
        case "LogSumExp" | "Subtract":
            return "log-probabilities"
        case "Dequantize":
            return "embedding row"
        case "Gather":
            return "copy of keys or values"
    if node.name in WRITES:
        return "store key and value"
    if "Select" in inside and len(inside) > 3 and "Cos" not in inside:
        return "scale and rotate query and key"
    if inside & {"Cos", "Sin", "Exp"}:
        return "angles of the position"
    if "Sigmoid" in inside or (node.name == "Compiled" and not node.parts):
        return "gate"
    if "LessEqual" in inside or node.outputs[0].dtype == mx.bool_:
        return "mask"
    if node.name == "Add" and not whole_numbers(node):
        return "residual"
    if node.name == "AsType":
        return "logits to float32"
    if whole_numbers(node):
        return "slots and positions"
    return "other"


def whole_numbers(node: Node) -> bool:
    return not any("float" in str(out.dtype) for out in node.outputs) or node.name == "Arange"


def weight_behind(name: str, traced: Traced) -> str | None:
    """The parameter of which the array is a view, as a transposed weight is."""
    while name not in traced.parameters:
        maker = traced.makers.get(name)
        if maker is None or maker.name not in VIEWS or not maker.inputs:
            return None
        name = maker.inputs[0].name
    return traced.parameters[name]


def both(config: OpenELMConfig, form: Form, context: int, rows: int) -> list[Ledger]:
    """Ours, and mlx-lm's for one row; that of several is another cache, which is not counted
    here.
    """
    ours = ledger(trace_ours(config, form, context, rows))
    return [ours] if rows > 1 else [ours, ledger(trace_mlx_lm(config, form, context))]


def main(arguments: list[str] | None = None) -> int:
    from openelm_mlx.benchmarks.ledger.host import host_times
    from openelm_mlx.benchmarks.ledger.table import show

    parser = argparse.ArgumentParser(
        prog="python -m openelm_mlx.benchmarks.ledger.count",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("size", nargs="?", default="270m", help="a published size (default: 270m)")
    parser.add_argument("--bits", type=int, help="of the weights (default: unquantized)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help=f"of the activations: {', '.join(DTYPES)} (default: bfloat16)",
    )
    parser.add_argument("--context", type=int, default=64, help="tokens attended to (default: 64)")
    parser.add_argument(
        "--rows",
        type=int,
        choices=range(1, 6),
        default=1,
        help="sequences stepped together, 1 to 5",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="steps timed on the host, of one row; 0 times none (default: 100)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        config = OpenELMConfig.from_name(options.size)
        form = Form(
            options.dtype,
            {"group_size": options.group_size, "bits": options.bits} if options.bits else None,
        )
        ledgers = both(config, form, options.context, options.rows)
        times = (
            host_times(config, form, options.steps) if options.steps and options.rows == 1 else {}
        )
    except OpenELMError as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    if options.json:
        host = {name: asdict(t) for name, t in times.items()}
        print(json.dumps({"ledgers": [entry.as_dict() for entry in ledgers], "host_seconds": host}))
    else:
        show(f"{options.size}, {form}", options.context, options.rows, ledgers, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
