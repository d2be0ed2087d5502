"""The graph of a function as plain data: primitives with the shapes they read and write, fused as
`mx.compile` fuses.

`trace` asks MLX itself (`mx.export_function` with a callback, which simplifies but does not fuse);
`fuse` then follows the rules of `compile_fuse` in mlx/compile.cpp. That both agree with MLX is held
by a test, on the names of the fused kernels that `mx.export_to_dot` shows of the compiled function.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.benchmarks.ledger.fake_fast_ops import NAMES
from openelm_mlx.device import mx

MAX_DEPTH, MAX_INPUTS = 11, 24  # max_compile_depth and max_compile_arrays of mlx/compile.cpp

UNARY = {
    "Abs",
    "ArcCos",
    "ArcCosh",
    "ArcSin",
    "ArcSinh",
    "ArcTan",
    "ArcTanh",
    "AsType",
    "Ceil",
    "Cos",
    "Conjugate",
    "Cosh",
    "Remainder",
    "Erf",
    "ErfInv",
    "Exp",
    "Floor",
    "Log",
    "Log1p",
    "LogicalNot",
    "Negative",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Square",
    "Sqrt",
    "Rsqrt",
    "Tan",
    "Tanh",
    "Expm1",
    "Real",
    "Imag",
    "BitwiseInvert",
}
BINARY = {
    "Add",
    "Divide",
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogicalAnd",
    "LogicalOr",
    "LogAddExp",
    "Maximum",
    "Minimum",
    "Multiply",
    "NotEqual",
    "Power",
    "Subtract",
    "BitwiseBinary",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "LeftShift",
    "RightShift",
    "ArcTan2",
}
FUSABLE = UNARY | BINARY | {"Select", "Broadcast"}


@dataclass(frozen=True)
class Array:
    """One array of a graph. `constant` is set when the function captured it: a weight, a table, a
    scalar.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    constant: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Node:
    """One primitive. A fused one holds the primitives it was fused from."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...] = ()
    parts: tuple[Node, ...] = ()

    @property
    def fused_name(self) -> str:
        return "Compiled" + "".join(part.name for part in self.parts) if self.parts else self.name


@dataclass
class Graph:
    """Primitives in an order in which they can run, and the arrays at the graph's ends."""

    nodes: list[Node]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    constants: dict[str, mx.array] = field(default_factory=dict)


def trace(function: Callable[..., Any], *arguments: mx.array) -> Graph:
    """The simplified graph of `function(*arguments)`. Nothing is computed; inner compiled functions
    are inlined.
    """
    ends: dict[str, tuple[Array, ...]] = {}
    constants: dict[str, mx.array] = {}
    nodes: list[Node] = []

    def array(entry: tuple[str, tuple[int, ...], mx.Dtype]) -> Array:
        name, shape, dtype = entry
        return Array(name, tuple(shape), dtype, name in constants)

    def visit(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind in ("inputs", "outputs"):
            ends[kind] = tuple(map(array, event[kind]))
        elif kind == "constants":
            constants.update(event["constants"])
        elif kind == "primitive":
            inputs, outputs = (tuple(map(array, event[side])) for side in ("inputs", "outputs"))
            nodes.append(
                untagged(Node(event["name"], inputs, outputs, tuple(event["arguments"])), constants)
            )

    mx.export_function(visit, function, *arguments)
    return Graph(nodes, ends["inputs"], ends["outputs"], constants)


def untagged(node: Node, constants: dict[str, mx.array]) -> Node:
    """A stand-in under the name of what it stands for, without its tag."""
    if node.name == "Depends" and node.inputs[-1].constant and not node.inputs[-1].shape:
        name = NAMES.get(float(constants[node.inputs[-1].name].item()))  # type: ignore[arg-type]
        if name is not None:
            template = name in (
                "Dequantize",
                "Compiled",
            )  # these read what follows; the first input only gives the shape
            return Node(name, node.inputs[template:-1], node.outputs)
    return node


def fuse(graph: Graph) -> Graph:
    """The graph after `mx.compile`: neighbouring elementwise primitives in one node (compile_fuse,
    mlx/compile.cpp).
    """
    made = {out.name: node for node in graph.nodes for out in node.outputs}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for read in node.inputs:
            readers[read.name].append(node.outputs[0].name)
    ends = {out.name for out in graph.outputs}
    gone: set[str] = set()
    result: list[Node] = []
    for node in reversed(graph.nodes):
        root = node.outputs[0]
        if root.name in gone:
            continue
        inside = collect(root, made, readers, ends) if node.name != "Broadcast" else {}
        if len(inside) <= 1:
            result.append(node)
            continue
        merged = merge(root, made, inside, ends)
        result.append(merged)
        for part in merged.parts[:-1]:
            out = part.outputs[0].name
            if out not in ends and set(readers[out]) <= inside.keys():
                gone.add(out)
        for read in merged.inputs:
            readers[read.name] = [r for r in readers[read.name] if r not in inside] + [root.name]
    result.reverse()
    return Graph(result, graph.inputs, graph.outputs, graph.constants)


def collect(
    root: Array, made: dict[str, Node], readers: dict[str, list[str]], ends: set[str]
) -> dict[str, None]:
    """Names of the arrays to be made inside one fused kernel that ends in `root`."""
    inside: dict[str, None] = {}
    outside: set[str] = set()

    def visit(array: Array, depth: int) -> None:
        name, node = array.name, made.get(array.name)
        if name in inside:
            return
        ends_elsewhere = name in ends and array.shape != root.shape
        if depth >= MAX_DEPTH or node is None or node.name not in FUSABLE or ends_elsewhere:
            outside.add(name)
            return
        read_elsewhere = depth and not all(reader in inside for reader in readers[name])
        if read_elsewhere and (
            node.name != "Broadcast" or len(outside) >= MAX_INPUTS
        ):  # a broadcast would be split off
            outside.add(name)
            return
        if name in ends:
            outside.add(name)
        else:
            outside.discard(name)
        if len(outside) >= MAX_INPUTS:
            return
        inside[name] = None
        for read in node.inputs:
            visit(read, depth + 1)

    visit(root, 0)
    return inside


def merge(root: Array, made: dict[str, Node], inside: dict[str, None], ends: set[str]) -> Node:
    parts: dict[str, Node] = {}
    inputs: dict[str, Array] = {}

    def visit(array: Array) -> None:
        if array.name not in inside:
            inputs.setdefault(array.name, array)
        elif array.name not in parts:
            for read in made[array.name].inputs:
                visit(read)
            parts[array.name] = made[array.name]

    visit(root)
    outputs = [
        part.outputs[0] for name, part in parts.items() if name in ends and name != root.name
    ]
    return Node("Compiled", tuple(inputs.values()), (*outputs, root), parts=tuple(parts.values()))
