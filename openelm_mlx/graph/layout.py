"""Where the elements of the arrays of a graph lie in memory: views are followed by their strides.

Each rule is that of MLX's backends (v0.32; the file is named beside it, under mlx/backend/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

from openelm_mlx.graph.trace import FUSABLE, Node

Shape = tuple[int, ...]
VIEWS = {"Broadcast", "BroadcastAxes", "Transpose", "Slice", "Split", "ExpandDims", "Squeeze"}
VIEWS |= {"Reshape", "Flatten", "Unflatten", "Contiguous"}  # these copy if there is no such view
VIEWS |= {"StopGradient", "Copy", "Depends", "CustomTransforms", "NumberOfElements"}
KEEPS_LAYOUT = FUSABLE | {"Compiled", "RMSNorm", "RoPE"}


@dataclass(frozen=True)
class Layout:
    """The places of an array's elements in memory.

    `elements` is the extent it is spread over, 1 for a broadcast scalar.
    """

    shape: Shape
    strides: Shape
    elements: int

    @classmethod
    @cache
    def rows(cls, shape: Shape) -> Layout:
        """Return the layout of an array whose rows follow each other without gaps."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(shape, strides, math.prod(shape))

    @cached_property
    def row_contiguous(self) -> bool:
        plain = Layout.rows(self.shape).strides
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(self.shape, self.strides, plain, strict=True)
        )

    @cached_property
    def contiguous(self) -> bool:
        """True if there are no holes: the elements that differ fill the extent."""
        return self.elements == self.distinct

    @cached_property
    def distinct(self) -> int:
        return math.prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride)


def reshaped(x: Layout, shape: Shape) -> Layout | None:
    """Return the view of x under another shape, None if only a copy can have it.

    The rule is `prepare_reshape` of common/common.cpp.
    """
    if x.row_contiguous:
        return Layout.rows(shape)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape, x.strides, strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:  # collapse_contiguous_dims
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    result: list[int] = []
    at = 0
    for size in shape:
        if at < len(sizes) and sizes[at] % size == 0:
            sizes[at] //= size
            result.append(sizes[at] * strides[at])
            at += sizes[at] == 1
        elif size == 1 and result:
            result.append(result[-1])
        else:
            return None
    return Layout(shape, tuple(result), x.elements)


def sliced(x: Layout, shape: Shape, steps: Shape) -> Layout:
    """Return the layout of every steps-th element (slice, common/slicing.cpp)."""
    strides = tuple(stride * step for stride, step in zip(x.strides, steps, strict=True))
    extent = 1 + sum(abs(stride) * (n - 1) for stride, n in zip(strides, shape, strict=True))
    return Layout(shape, strides, extent)


def broadcast(x: Layout, shape: Shape) -> Layout:
    strides = [s if n > 1 else 0 for n, s in zip(x.shape, x.strides, strict=True)]
    return Layout(shape, (0,) * (len(shape) - len(x.shape)) + tuple(strides), x.elements)


def views(node: Node, x: Layout) -> list[Layout] | None:
    """Return the layouts of a view's outputs, None for a reshape that must copy."""
    shape = node.outputs[0].shape
    match node.name:
        case "Broadcast" | "BroadcastAxes":
            return [broadcast(x, shape)]
        case "Slice":
            return [sliced(x, shape, tuple(node.arguments[2]))]
        case "Split":
            return [sliced(x, out.shape, (1,) * len(out.shape)) for out in node.outputs]
        case "Reshape" | "Flatten" | "Unflatten":
            found = reshaped(x, shape)
            return None if found is None else [found]
        case "Contiguous":
            return [x] if x.row_contiguous else None
        case "Transpose":
            strides = [x.strides[axis] for axis in node.arguments[0]]
        case "ExpandDims":
            strides = list(x.strides)
            for axis in node.arguments[0]:
                strides.insert(axis, 1)
        case "Squeeze":
            strides = [s for axis, s in enumerate(x.strides) if axis not in node.arguments[0]]
        case _:  # the same buffer
            return [x]
    return [Layout(shape, tuple(strides), x.elements)]


def after(node: Node, inputs: list[Layout]) -> list[Layout]:
    """Return the layouts of a node's outputs.

    A view has its own, an elementwise kernel writes as its inputs lie (common/compiled.cpp), and
    every other kernel writes rows.
    """
    if node.name == "Depends":
        return inputs[: len(node.outputs)]
    if node.name == "CustomTransforms":
        return inputs[-len(node.outputs) :]
    found = views(node, inputs[0]) if node.name in VIEWS and inputs else None
    if found is not None:
        return found
    if node.name in KEEPS_LAYOUT:
        shape = node.outputs[0].shape
        full = [x for x in inputs if x.shape == shape]
        if full and full[0].contiguous and all(x.strides == full[0].strides for x in full):
            return [full[0]] * len(node.outputs)
    return [Layout.rows(out.shape) for out in node.outputs]
