"""The graph of a function as plain data: primitives with the shapes they read and write.

`trace` asks MLX itself (`mx.export_function` with a callback, which simplifies but does not fuse);
`fuse` then follows the rules of `compile_fuse` in mlx/compile.cpp. A test compares both with MLX,
by the names of the fused kernels that `mx.export_to_dot` shows of the compiled function.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.model.kernels.kernel import Kernel

MAX_DEPTH, MAX_INPUTS = 11, 24  # max_compile_depth and max_compile_arrays of mlx/compile.cpp
# is_unary and is_binary of mlx/compile.cpp, and the two that it fuses besides
ELEMENTWISE = (
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Conjugate Cosh Remainder Erf "
    "ErfInv Exp Floor Log Log1p LogicalNot Negative Round Sigmoid Sign Sin Sinh Square Sqrt Rsqrt "
    "Tan Tanh Expm1 Real Imag BitwiseInvert "
    "Add Divide Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogAddExp Maximum "
    "Minimum Multiply NotEqual Power Subtract BitwiseBinary BitwiseAnd BitwiseOr BitwiseXor "
    "LeftShift RightShift ArcTan2 Select Broadcast"
)
FUSABLE = frozenset(ELEMENTWISE.split())


@dataclass(frozen=True)
class Array:
    """An array of a graph; a `constant` is one that the function captured, as a weight is."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    constant: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size


@dataclass(frozen=True)
class Node:
    """One primitive. A fused one keeps the primitives it was fused from."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...] = ()
    parts: tuple[Node, ...] = ()
    kernel: Kernel | None = None  # one of our own

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
    """Return the simplified graph of `function(*arguments)`.

    Nothing is computed; inner compiled functions are inlined.
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
            nodes.append(Node(event["name"], inputs, outputs, tuple(event["arguments"])))

    mx.export_function(visit, function, *arguments)
    return Graph(nodes, ends["inputs"], ends["outputs"], constants)


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an evaluated array of this shape that takes no memory: not a kernel of a graph."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


def fuse(graph: Graph) -> Graph:
    """Return the graph after `mx.compile`: neighbouring elementwise primitives are one node."""
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
    """Return the names of the arrays that are made inside one fused kernel that ends in `root`."""
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
        # a broadcast that others read too is split off, if there is an input left for it
        if read_elsewhere and (node.name != "Broadcast" or len(outside) >= MAX_INPUTS):
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
    """Return the fused node of the arrays `inside`, its parts in an order in which they can run."""
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
    kept = [part.outputs[0] for name, part in parts.items() if name in ends and name != root.name]
    return Node("Compiled", tuple(inputs.values()), (*kept, root), parts=tuple(parts.values()))
