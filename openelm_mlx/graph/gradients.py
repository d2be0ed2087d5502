"""Functions with gradients of their own, whose graph can be traced all the same.

`with_vjp`, `recomputed`, `vjp` and `value_and_grad` are those of MLX (`mx.custom_function`,
`mx.checkpoint` and so on), but MLX does not tell the graph of what the first two make. So `trace`
leaves a hole in it for each call, and fills it afterwards:

    x -> f -> y -> loss          y and dx are inputs of the graph that MLX tells,
    dx <- g <- dy <- loss        f(x) and g(x, dy, y) are further outputs of it

Reverse differentiation with the cotangent dx of x gives what the whole would: for one function
after another as for any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.graph.memory import evaluation_order
from openelm_mlx.graph.trace import Array, Graph, Node, blank
from openelm_mlx.graph.trace import trace as trace_without

Arrays = Sequence[mx.array]
Function = Callable[..., Any]  # of arrays; it returns an array, or several
Backward = Callable[[Arrays, Arrays, Arrays], Arrays]
"""Returns the cotangents of arguments: of these, the cotangents of outputs, and the outputs."""


class Call(NamedTuple):
    """One call of a function that has its own gradient."""

    function: Function
    backward: Backward
    arguments: Arrays
    outputs: Arrays


@dataclass
class Tracing:
    """What stands for calls while a graph is traced."""

    given: Iterator[mx.array] | None = None  # arrays for the holes; None to find which are needed
    leaves: list[mx.array] = field(default_factory=list)  # that stand in holes
    calls: list[Call] | None = None  # of the function that is differentiated; None if none is
    answers: Iterator[Arrays] | None = None  # of these calls
    filled: list[tuple[slice, list[mx.array], list[mx.array]]] = field(default_factory=list)
    """The leaves, what they are, and what must be computed before."""

    def stand_ins(self, like: Arrays) -> slice:
        """Make a leaf for each array; return which they are."""
        start = len(self.leaves)
        for array in like:
            new = blank(array.shape, array.dtype) if self.given is None else next(self.given)
            self.leaves.append(new)
        return slice(start, len(self.leaves))

    @contextmanager
    def recording(self, calls: list[Call] | None, answers: Any = None) -> Iterator[None]:
        before = self.calls, self.answers
        self.calls, self.answers = calls, answers
        try:
            yield
        finally:
            self.calls, self.answers = before

    def outputs(self, function: Function, arguments: Arrays) -> Arrays:
        """Return the outputs of a call, which is recorded."""
        if self.answers is None:
            with self.recording(None):
                outputs = several(function(*arguments))
        else:
            outputs = next(self.answers)
        return outputs


_tracing: Tracing | None = None


def with_vjp(function: Function, backward: Backward) -> Function:
    """Return a function of arrays whose gradient is `backward`."""
    real = mx.custom_function(function)

    @real.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        found = backward(several(primals), several(cotangents), several(outputs))
        return tuple(found) if isinstance(primals, (tuple, list)) else found[0]

    def call(*arguments: mx.array) -> Any:
        if _tracing is None:
            return real(*arguments)
        if _tracing.calls is None:
            return function(*arguments)
        outputs = _tracing.outputs(function, arguments)
        _tracing.calls.append(Call(function, backward, arguments, outputs))
        return outputs if len(outputs) > 1 else outputs[0]

    return call


def copied(x: mx.array) -> mx.array:
    if _tracing is None:
        return mx.contiguous(x)
    where = _tracing.stand_ins([x])
    _tracing.filled.append((where, [], [x]))
    return _tracing.leaves[where][0]


contiguous = with_vjp(copied, lambda _, cotangents, __: cotangents)
"""Return an array whose elements lie in rows: `mx.contiguous`, of which MLX does not tell either"""


def recomputed(module: nn.Module, function: Function) -> Function:
    """Return a function of arrays that is computed again for its gradients, and for those of the
    parameters of `module`, which it reads.
    """

    def inner(parameters: Any, *arguments: mx.array) -> Any:
        kept: Any = module.parameters()
        if _tracing is not None:  # MLX would tell what is made of weights alone as made once
            first = [mx.stop_gradient(arguments[0])]
            module.update(utils.tree_map(lambda array: mx.depends(array, first), kept))
        module.update(parameters)
        try:
            return function(*arguments)
        finally:
            module.update(kept)

    def call(*arguments: mx.array) -> Any:
        parameters: Any = module.trainable_parameters()
        if _tracing is None:
            return mx.checkpoint(inner)(parameters, *arguments)
        leaves = leaves_of(parameters)

        def flat(*arrays: mx.array) -> Any:
            return inner(like(parameters, arrays), *arrays[len(leaves) :])

        def backward(before: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
            return vjp(flat, mx.depends(list(before), list(outputs)), cotangents)[1]

        return with_vjp(flat, backward)(*leaves, *arguments)

    return call


def vjp(function: Function, primals: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
    """Return the outputs of a function, and the cotangents of `primals`."""
    tracing = _tracing
    if tracing is None:
        return mx.vjp(function, list(primals), list(cotangents))
    found: list[Call] = []
    with tracing.recording(found):
        function(*primals)
    holes = [tracing.stand_ins(call.outputs) for call in found]
    wanted = [tracing.stand_ins([a for a in call.arguments if floating(a)]) for call in found]
    calls: list[Call] = []

    def whole(*arrays: mx.array) -> list[mx.array]:
        left = iter(arrays[len(primals) :])
        answers = (list(islice(left, len(call.outputs))) for call in found)
        calls.clear()
        with tracing.recording(calls, answers):
            outputs = several(function(*arrays[: len(primals)]))
        arguments = [array for call in calls for array in call.arguments]
        return [*outputs, *(a if floating(a) else mx.stop_gradient(a) for a in arguments)]

    leaves = [leaf for hole in holes for leaf in tracing.leaves[hole]]
    theirs = [leaf for want in wanted for leaf in tracing.leaves[want]]
    outputs, grads = mx.vjp(whole, [*primals, *leaves], [*cotangents, *theirs])
    own, rest = grads[: len(primals)], iter(grads[len(primals) :])
    of_outputs = [list(islice(rest, len(call.outputs))) for call in found]
    count = len(outputs) - sum(len(call.arguments) for call in found)
    left = iter(outputs[count:])
    arguments = [list(islice(left, len(call.arguments))) for call in found]
    columns = zip(calls, holes, wanted, arguments, of_outputs, strict=True)
    for call, hole, want, reads, given in reversed(list(columns)):
        with tracing.recording(None):
            tracing.filled.append((hole, list(several(call.function(*reads))), reads))
        back = call.backward(reads, given, tracing.leaves[hole])
        pairs = zip(call.arguments, back, strict=True)
        tracing.filled.append((want, [array for old, array in pairs if floating(old)], []))
    return outputs[:count], own


def value_and_grad(function: Function) -> Function:
    """Return a function of a tree of arrays, and of more, that returns what `function` does, and
    the gradient of the first array of that for the tree.
    """

    def call(tree: Any, *rest: Any) -> Any:
        if _tracing is None:
            return mx.value_and_grad(function)(tree, *rest)
        result: list[Any] = []

        def first(*arrays: mx.array) -> list[mx.array]:
            result[:] = [function(like(tree, arrays), *rest)]
            total, *others = leaves_of(result[0])
            return [total, *map(mx.stop_gradient, others)]

        outputs, grads = vjp(first, leaves_of(tree), [mx.array(1.0)])
        return like(result[0], outputs), like(tree, grads)

    return call


def trace(function: Function, *arguments: mx.array) -> Graph:
    """Return `graph.trace.trace` of a function whose gradients are made by those of this file.

    `function` returns a list of arrays. Nothing is computed.
    """
    global _tracing
    last: list[Any] = []
    mx.disable_compile()  # a compiled function must not keep what it does here
    try:
        _tracing = Tracing()
        mx.export_function(lambda _: None, lambda *given: function(*given)[:1], *arguments)
        holes = [blank(leaf.shape, leaf.dtype) for leaf in _tracing.leaves]

        def run(*arrays: mx.array) -> list[mx.array]:
            global _tracing
            _tracing = Tracing(iter(arrays[len(arguments) :]))
            outputs = list(function(*arrays[: len(arguments)]))
            last[:] = [len(outputs), _tracing.filled]
            more = [array for _, made, reads in _tracing.filled for array in (*made, *reads)]
            return [*outputs, *more]

        graph = trace_without(run, *arguments, *holes)
    finally:
        _tracing = None
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
    return stitched(graph, len(arguments), *last)


def stitched(graph: Graph, inputs: int, outputs: int, filled: Sequence[Any]) -> Graph:
    """Return the graph with its holes filled."""
    leaves, left = graph.inputs[inputs:], iter(graph.outputs[outputs:])
    nodes = list(graph.nodes)
    same: dict[str, Array] = {}
    for hole, made, reads in filled:
        found = tuple(islice(left, len(made)))
        before = tuple(islice(left, len(reads)))
        if before:
            name = "CustomTransforms" if found else "Contiguous"
            nodes.append(Node(name, (*before, *found), leaves[hole]))
        else:
            same |= {leaf.name: array for leaf, array in zip(leaves[hole], found, strict=True)}

    def real(array: Array) -> Array:
        while array.name in same:
            array = same[array.name]
        return array

    named = [Node(n.name, tuple(map(real, n.inputs)), n.outputs, n.arguments) for n in nodes]
    ends = tuple(map(real, graph.outputs[:outputs]))
    whole = Graph(named, graph.inputs[:inputs], ends, graph.constants)
    return Graph(evaluation_order(whole), whole.inputs, whole.outputs, whole.constants)


def several(arrays: Any) -> Arrays:
    return arrays if isinstance(arrays, (list, tuple)) else (arrays,)


def leaves_of(tree: Any) -> list[mx.array]:
    leaves: Any = utils.tree_flatten(tree)
    return [array for _, array in leaves]


def like(tree: Any, arrays: Arrays) -> Any:
    """Return a tree with these arrays in the places of its own."""
    left = iter(arrays)
    return utils.tree_map(lambda _: next(left), tree)


def floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
