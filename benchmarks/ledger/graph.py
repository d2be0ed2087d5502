"""The graph of a function as plain data: primitives with the shapes they read and write.

`trace` asks MLX itself (`mx.export_function` with a callback, which simplifies but does not fuse);
`fuse` then follows the rules of `compile_fuse` in mlx/compile.cpp. A test compares both with MLX,
by the names of the fused kernels that `mx.export_to_dot` shows of the compiled function.

On the CPU backend `mx.fast.rms_norm` and its kin expand into many primitives (mlx/fast.cpp:
`use_fallback`). Inside `one_primitive_each` each of them becomes one `mx.depends`, which has the
right shape, reads what the call reads and computes nothing; so does each kernel of our own
(openelm_mlx/model/kernels), which no CPU runs. Graphs made so are for counting and for timing the
host; their numbers mean nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.model.kernels.kernel import NAMES, Kernel, Launch, running

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
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
SHAPED = ("Dequantize", "Compiled")  # their first input only gives the shape and is not read


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
            node = Node(event["name"], inputs, outputs, tuple(event["arguments"]))
            nodes.append(untagged(node, constants))

    mx.export_function(visit, function, *arguments)
    return Graph(nodes, ends["inputs"], ends["outputs"], constants)


def untagged(node: Node, constants: dict[str, mx.array]) -> Node:
    """Return a stand-in under the name of what it stands for, without its tag."""
    if node.name != "Depends" or not node.inputs[-1].constant or node.inputs[-1].shape:
        return node
    number: Any = constants[node.inputs[-1].name].item()
    found = next((what for what, own in TAGS.items() if own.item() == number), None)
    if isinstance(found, Kernel):
        inputs = node.inputs[len(node.outputs) : -1]
        return Node(found.name, inputs, node.outputs, kernel=found)
    if found is None:
        return node
    return Node(found, node.inputs[found in SHAPED : -1], node.outputs)


@contextmanager
def one_primitive_each(tagged: bool = False, kernels: bool = True) -> Iterator[None]:
    """Replace `mx.fast`, `mx.dequantize` and our kernels by stand-ins of one primitive each.

    `tagged` adds the tag that `trace` reads. It is one more input, so leave it out if the host
    is timed. Without `kernels`, their twins are in use.
    """

    def one(name: str, out: mx.array, *reads: Any) -> mx.array:
        arrays = [array for array in reads if isinstance(array, mx.array)]
        return mx.depends(out, arrays + [tag(name)] * tagged)

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return one("RMSNorm", x, weight)

    def rope(x: mx.array, dims: int, *, offset: Any = None, **_: Any) -> mx.array:
        return one("RoPE", x, offset)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: Any) -> mx.array:
        return one("ScaledDotProductAttention", q, k, v, mask)

    def dequantize(
        w: mx.array,
        scales: mx.array,
        biases: Any = None,
        group: Any = None,
        bits: Any = 4,
        **_: Any,
    ) -> mx.array:
        dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
        out = constant((*w.shape[:-1], w.shape[-1] * 32 // bits), dtype)
        return one("Dequantize", out, w, scales, biases)

    def launched(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        pairs = zip(launch.shapes, launch.dtypes, strict=True)
        outputs = [constant(tuple(shape), dtype) for shape, dtype in pairs]
        return mx.depends(outputs, inputs + [tag(kernel)] * tagged)

    with ExitStack() as stack:
        stack.enter_context(running(launched, frozenset(NAMES) if kernels else frozenset()))
        stack.enter_context(patch.object(mx, "dequantize", dequantize))
        stack.enter_context(patch.object(mx.fast, "rms_norm", rms_norm))
        stack.enter_context(patch.object(mx.fast, "rope", rope))
        stack.enter_context(patch.object(mx.fast, "scaled_dot_product_attention", attention))
        yield


def fused(out: mx.array, *reads: mx.array) -> mx.array:
    """Stand in for a function that is compiled by itself: one kernel with the shape of `out`."""
    return mx.depends(out, [*reads, tag("Compiled")])


TAGS: dict[str | Kernel, mx.array] = {}


def tag(what: str | Kernel) -> mx.array:
    if what not in TAGS:
        TAGS[what] = mx.array(7001.0 + len(TAGS))  # no step has such a constant
    return TAGS[what]


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an evaluated array of this shape that takes no memory: not a kernel of a graph."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


constant = cache(blank)  # what is written into must be an array of its own instead


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


def named(model: nn.Module) -> list[tuple[str, mx.array]]:
    return utils.tree_flatten(model.parameters())  # type: ignore[return-value]


def mark(number: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return a parameter that takes no memory: its bits tell it from others among constants."""
    scalar = mx.array(number % 256**dtype.size, UNSIGNED[dtype.size]).view(dtype)
    array = mx.broadcast_to(scalar, shape)
    mx.eval(array)
    return array


def marked_as(array: mx.array, names: list[tuple[str, mx.array]]) -> str | None:
    """Return the parameter that a constant is, as it is or transposed; None if it is not one."""
    if array.dtype.size not in UNSIGNED or array.ndim == 0:
        return None
    number: Any = array[(0,) * array.ndim].view(UNSIGNED[array.dtype.size]).item()
    for name, parameter in names[number :: 256**array.dtype.size]:
        shapes = (parameter.shape, parameter.shape[::-1])
        if parameter.dtype == array.dtype and array.shape in shapes:
            return name
    return None


@dataclass(frozen=True)
class Traced:
    """The graph of one token, with names for the parameters and caches in it."""

    engine: str
    graph: Graph
    parameters: dict[str, str]  # name of a constant in the graph -> parameter
    caches: frozenset[str]  # names in the graph of keys and values
    context: int  # tokens that the new one attends to, itself included
    capacity: int

    @classmethod
    def of(cls, engine: str, graph: Graph, model: nn.Module, first: int, context: int) -> Traced:
        """Name the parameters among the graph's constants; inputs from `first` on are caches."""
        names, caches = named(model), graph.inputs[first:]
        found = {name: marked_as(array, names) for name, array in graph.constants.items()}
        parameters = {name: parameter for name, parameter in found.items() if parameter}
        capacity = caches[0].shape[-2]
        return cls(engine, graph, parameters, frozenset(a.name for a in caches), context, capacity)
