"""The graph of a step of decoding: primitives with the shapes they read and write, by name.

On the CPU backend `mx.fast.rms_norm` and its kin expand into many primitives (mlx/fast.cpp:
`use_fallback`). Inside `one_primitive_each` each of them becomes one `mx.depends`, which has the
right shape, reads what the call reads and computes nothing; so does each kernel of our own
(openelm_mlx/model/kernels), which no CPU runs. Graphs made so are for counting and for timing the
host; their numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.graph.trace import Graph, Node, blank
from openelm_mlx.graph.trace import trace as trace_as_it_is
from openelm_mlx.model.kernels.kernel import NAMES, Kernel, Launch, running

UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
SHAPED = ("Dequantize", "Compiled")  # their first input only gives the shape and is not read


def trace(function: Callable[..., Any], *arguments: mx.array) -> Graph:
    """Return the graph of `function(*arguments)`, stand-ins as what they stand for."""
    graph = trace_as_it_is(function, *arguments)
    graph.nodes = [untagged(node, graph.constants) for node in graph.nodes]
    return graph


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


constant = cache(blank)  # what is written into must be an array of its own instead


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
