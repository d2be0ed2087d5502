"""Which primitives launch kernels on Metal, and how many: views are followed by their strides,
copies are counted.

Each rule is that of MLX's Metal backend (v0.32; the file is named beside it, under mlx/backend/).
Assumed throughout: one new token a row, at most 5 rows (from the 6th on it depends on the chip
which kernel multiplies by a quantized matrix), no matrix units (M5), and buffers that may be
overwritten in place (the caches are donated, see decode.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openelm_mlx.benchmarks.ledger.graph import BINARY, FUSABLE, UNARY, Node
from openelm_mlx.errors import BenchmarkError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How an array lies in memory. `elements` is the extent it is spread over, 1 for a broadcast
    scalar.
    """

    shape: Shape
    strides: Shape
    elements: int

    @classmethod
    def rows(cls, shape: Shape) -> Layout:
        return cls(
            shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), math.prod(shape)
        )

    @property
    def row_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def contiguous(self) -> bool:
        """No holes: the elements that differ fill the extent."""
        return self.elements == self.distinct

    @property
    def distinct(self) -> int:
        return math.prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride)


def reshaped(x: Layout, shape: Shape) -> Layout | None:
    """The view of x under another shape, or None where only a copy has it (prepare_reshape,
    common/common.cpp).
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
    """Every steps-th element (slice, common/slicing.cpp)."""
    strides = tuple(stride * step for stride, step in zip(x.strides, steps, strict=True))
    extent = 1 + sum(abs(stride) * (n - 1) for stride, n in zip(strides, shape, strict=True))
    return Layout(shape, strides, extent)


def broadcast(x: Layout, shape: Shape) -> Layout:
    pad = len(shape) - len(x.shape)
    strides = (0,) * pad + tuple(
        0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True)
    )
    return Layout(shape, strides, x.elements)


def view(node: Node, x: Layout) -> list[Layout] | None:
    """Layouts of a view's outputs; None for a reshape that must copy."""
    shapes = [out.shape for out in node.outputs]
    match node.name:
        case "Broadcast" | "BroadcastAxes":
            return [broadcast(x, shapes[0])]
        case "Transpose":
            return [
                Layout(shapes[0], tuple(x.strides[axis] for axis in node.arguments[0]), x.elements)
            ]
        case "Slice":
            return [sliced(x, shapes[0], tuple(node.arguments[2]))]
        case "Split":
            return [sliced(x, shape, (1,) * len(shape)) for shape in shapes]
        case "ExpandDims":
            strides = list(x.strides)
            for axis in node.arguments[0]:
                strides.insert(axis, 1)
            return [Layout(shapes[0], tuple(strides), x.elements)]
        case "Squeeze":
            dropped = set(node.arguments[0])
            return [
                Layout(
                    shapes[0],
                    tuple(s for i, s in enumerate(x.strides) if i not in dropped),
                    x.elements,
                )
            ]
        case "Reshape" | "Flatten" | "Unflatten":
            result = reshaped(x, shapes[0])
            return None if result is None else [result]
        case _:  # StopGradient, Copy, Depends: the same buffer
            return [x]


VIEWS = {
    "Broadcast",
    "BroadcastAxes",
    "Transpose",
    "Slice",
    "Split",
    "ExpandDims",
    "Squeeze",
    "StopGradient",
    "Copy",
    "Depends",
    "Reshape",
    "Flatten",
    "Unflatten",
    "NumberOfElements",
}
SIMPLE = {  # one kernel, whatever the layout of the inputs
    "Arange",
    "ArgReduce",
    "AsType",
    "Compiled",
    "Gather",
    "GatherAxis",
    "Scatter",
    "ScatterAxis",
    "SliceUpdate",
    "RandomBits",
    "Full",
    "Select",
}
ELEMENTWISE = FUSABLE | {"Compiled", "RMSNorm", "RoPE"}


def kernels(node: Node, inputs: list[Layout]) -> int:
    """Kernels that a node launches on Metal, copies of inputs included. Raises `BenchmarkError` for
    what it does not know.
    """
    first = inputs[0] if inputs else None
    if node.name in VIEWS:
        return int(first is not None and view(node, first) is None)
    if node.name in SIMPLE or node.name in UNARY or node.name in BINARY:
        return 1
    if first is None:
        raise BenchmarkError(f"the ledger does not know {node.name} without inputs")
    match node.name:
        case "RMSNorm":  # metal/normalization.cpp: the last axis contiguous, rows without gaps
            return 1 + (not norm_reads(first))
        case "RoPE":  # metal/rope.cpp: heads and positions transposed are read as they are
            return 1 + (not (first.row_contiguous or first.shape[-2] == 1 and first.contiguous))
        case (
            "ScaledDotProductAttention"
        ):  # metal/scaled_dot_product_attention.cpp, one query: queries in rows, keys by head
            q, *held = inputs
            keys = [k.strides[-1] == 1 and side_by_side(k) for k in held[:2]]
            masks = [
                mask_reads(broadcast(mask, (*q.shape[:3], held[0].shape[2]))) for mask in held[2:]
            ]
            return 1 + (not query_reads(q)) + (keys + masks).count(False)
        case "Matmul" | "AddMM":  # metal/matmul.cpp, check_transpose: rows or columns contiguous
            rows, columns, inner = math.prod(first.shape[:-1]), inputs[1].shape[-1], first.shape[-1]
            tiles = -(-rows // 16) * -(-columns // 16)
            split = (
                rows > 1 and inner >= max(rows, columns, 128) and tiles <= 1024
            )  # a second kernel adds up the parts
            return (
                1
                + split
                + sum(
                    not matrix_reads(x, x.shape[-2 + number] == 1)
                    for number, x in enumerate(inputs[:2])
                )
            )
        case (
            "QuantizedMatmul"
        ):  # metal/quantized.cpp: one row and a transposed matrix take qmv, without split
            split = (
                not node.arguments[-1] and inputs[1].shape[-2] >= 1024
            )  # qvm_split_k adds up in a second kernel
            return 1 + split + sum(not last_two_rows(x) for x in inputs)
        case "Dequantize" | "Quantize":  # metal/quantized.cpp: contiguous inputs
            return 1 + sum(not x.row_contiguous for x in inputs)
        case (
            "LogSumExp" | "Softmax"
        ):  # metal/logsumexp.cpp, metal/softmax.cpp: the last axis contiguous
            return 1 + (not (first.contiguous and first.strides[-1] == 1))
        case "Reduce":  # metal/reduce.cpp: over everything, more than 4096 elements take two passes
            return 1 + (node.outputs[0].size == 1 and node.inputs[0].size > 4096)
        case "Concatenate":  # metal/slicing.cpp: one copy an input
            return len(inputs)
        case "DynamicSlice" | "DynamicSliceUpdate":  # gpu/primitives.cpp: the offset, then the copy
            return 2
        case "Contiguous":
            return int(not first.row_contiguous)
    raise BenchmarkError(
        f"the ledger does not know how many kernels {node.name} launches; add its rule to layout.py"
    )


def norm_reads(x: Layout) -> bool:
    gapless = len(x.shape) < 2 or x.strides[-2] in (0, x.shape[-1]) or x.shape[-2] == 1
    return x.contiguous and x.strides[-1] == 1 and gapless


def query_reads(q: Layout) -> bool:
    if q.row_contiguous:
        return True
    if 1 not in q.shape[:2]:
        return False
    axis = 1 if q.shape[0] == 1 else 0
    return (
        q.strides[3] == 1
        and q.strides[2] == q.shape[3] * q.shape[axis]
        and q.strides[axis] == q.shape[3]
    )


def side_by_side(x: Layout) -> bool:
    """Batch and heads can be walked through as one axis."""
    return 1 in x.shape[:2] or x.strides[0] == x.strides[1] * x.shape[1]


def mask_reads(mask: Layout) -> bool:
    return mask.row_contiguous or side_by_side(mask)


def matrix_reads(x: Layout, vector: bool) -> bool:
    rows, columns = x.strides[-2:]
    plain = columns == 1 and (not vector or rows == x.shape[-1])
    return plain or (rows == 1 and (not vector or columns == x.shape[-2]))


def last_two_rows(x: Layout) -> bool:
    return len(x.shape) < 2 or (x.strides[-1] == 1 and x.strides[-2] == x.shape[-1])


def after(node: Node, inputs: list[Layout]) -> list[Layout]:
    """Layouts of a node's outputs: a view's own, an elementwise kernel's as its inputs lie
    (common/compiled.cpp), else rows.
    """
    if node.name in VIEWS and inputs:
        found = view(node, inputs[0])
        if found is not None:
            return found
    if node.name in ELEMENTWISE:
        whole = [
            x
            for x, read in zip(inputs, node.inputs, strict=True)
            if read.shape == node.outputs[0].shape
        ]
        if whole and whole[0].contiguous and all(x.strides == whole[0].strides for x in whole):
            return [whole[0]] * len(node.outputs)
    return [Layout.rows(out.shape) for out in node.outputs]
