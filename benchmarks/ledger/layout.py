"""Which primitives launch kernels on Metal, and how many.

Views launch none, so they are followed by their strides; copies are counted. Each rule is that of
MLX's Metal backend (v0.32; the file is named beside it, under mlx/backend/). Assumed throughout:
one new token a row, at most 5 rows (from the 6th on it depends on the chip which kernel multiplies
by a quantized matrix) and no matrix units (M5). A buffer that a primitive of MLX updates counts as
overwritten in place; `count.Ledger.copies` says what is copied where it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openelm_mlx.benchmarks.ledger.graph import FUSABLE, Node
from openelm_mlx.errors import BenchmarkError

Shape = tuple[int, ...]
VIEWS = {"Broadcast", "BroadcastAxes", "Transpose", "Slice", "Split", "ExpandDims", "Squeeze"}
VIEWS |= {"Reshape", "Flatten", "Unflatten"}  # these copy if the new shape cannot be a view
VIEWS |= {"StopGradient", "Copy", "Depends", "NumberOfElements"}
ONE_KERNEL = FUSABLE | {"ArgReduce", "Arange", "Compiled", "Gather", "ScatterAxis", "SliceUpdate"}
ONE_KERNEL |= {"GatherAxis", "RandomBits"}
SORTS = ("Sort", "ArgSort", "Partition", "ArgPartition")
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
    def rows(cls, shape: Shape) -> Layout:
        """Return the layout of an array whose rows follow each other without gaps."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(shape, strides, math.prod(shape))

    @property
    def row_contiguous(self) -> bool:
        plain = Layout.rows(self.shape).strides
        return all(
            size == 1 or stride == expected
            for size, stride, expected in zip(self.shape, self.strides, plain, strict=True)
        )

    @property
    def contiguous(self) -> bool:
        """True if there are no holes: the elements that differ fill the extent."""
        return self.elements == self.distinct

    @property
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
    found = views(node, inputs[0]) if node.name in VIEWS and inputs else None
    if found is not None:
        return found
    if node.name in KEEPS_LAYOUT:
        shape = node.outputs[0].shape
        full = [x for x in inputs if x.shape == shape]
        if full and full[0].contiguous and all(x.strides == full[0].strides for x in full):
            return [full[0]] * len(node.outputs)
    return [Layout.rows(out.shape) for out in node.outputs]


def kernels(node: Node, inputs: list[Layout]) -> int:
    """Return how many kernels a node launches on Metal, copies of its inputs included.

    Raises `BenchmarkError` for a primitive without a rule.
    """
    if node.kernel is not None:  # metal/custom_kernel.cpp
        return 1 + sum(not x.row_contiguous for x in inputs)
    if node.name in VIEWS:
        return int(bool(inputs) and views(node, inputs[0]) is None)
    if node.name in ONE_KERNEL:
        return 1
    if not inputs:
        raise BenchmarkError(f"the ledger does not know {node.name} without inputs")
    first = inputs[0]
    match node.name:
        case "RMSNorm":  # metal/normalization.cpp: the last axis contiguous, rows without gaps
            return 1 + (not norm_reads(first))
        case "RoPE":  # metal/rope.cpp: heads and positions transposed are read as they are
            return 1 + (not (first.row_contiguous or first.shape[-2] == 1 and first.contiguous))
        case "ScaledDotProductAttention":
            return 1 + attention_copies(*inputs)
        case "Matmul" | "AddMM":
            return 1 + matmul_splits(first, inputs[1]) + matmul_copies(inputs[:2])
        case "QuantizedMatmul":  # metal/quantized.cpp
            # one row and a transposed matrix take qmv; qvm_split_k adds up in a second kernel
            split = not node.arguments[-1] and inputs[1].shape[-2] >= 1024
            return 1 + split + sum(not last_two_rows(x) for x in inputs)
        case "Dequantize":  # metal/quantized.cpp: contiguous inputs
            return 1 + sum(not x.row_contiguous for x in inputs)
        case "LogSumExp" | "Softmax":  # metal/logsumexp.cpp, softmax.cpp: the last axis contiguous
            return 1 + (not (first.contiguous and first.strides[-1] == 1))
        case "Scan":  # metal/scan.cpp
            return 1 + (not first.contiguous)
        case "Reduce" if list(node.arguments[1]) == [len(first.shape) - 1] != [0]:
            return 1 + (first.strides[-1] != 1)  # metal/reduce.cpp: of several rows, or of one
        case name if name in SORTS:
            return sorting(node.inputs[0].shape[-1], node.inputs[0].dtype.size)
    raise BenchmarkError(
        f"the ledger does not know how many kernels {node.name} launches; add its rule to layout.py"
    )


def passes(node: Node, inputs: list[Layout]) -> int:
    """Return how many of a node's kernels are its own work, and not copies of inputs."""
    if node.name in SORTS:
        return kernels(node, inputs)
    return 1 + (node.name in ("Matmul", "AddMM") and matmul_splits(*inputs[:2]))


def sorting(size: int, itemsize: int) -> int:
    """Return the kernels of a sort (metal/sort.cpp): one within a block, else blocks are merged."""
    blocks = -(-size // (2048 if itemsize <= 4 else 1024))
    return 1 if blocks == 1 else 2 + 2 * (blocks - 1).bit_length()


def norm_reads(x: Layout) -> bool:
    gapless = len(x.shape) < 2 or x.strides[-2] in (0, x.shape[-1]) or x.shape[-2] == 1
    return x.contiguous and x.strides[-1] == 1 and gapless


def attention_copies(q: Layout, k: Layout, v: Layout, *masks: Layout) -> int:
    """Count the copies of one query's inputs (metal/scaled_dot_product_attention.cpp).

    Queries are read in rows, keys, values and the mask by head.
    """
    reads = [query_reads(q), *(x.strides[-1] == 1 and side_by_side(x) for x in (k, v))]
    for mask in masks:
        seen = broadcast(mask, (*q.shape[:3], k.shape[2]))
        reads.append(seen.row_contiguous or side_by_side(seen))
    return reads.count(False)


def query_reads(q: Layout) -> bool:
    if q.row_contiguous:
        return True
    if 1 not in q.shape[:2]:
        return False
    axis = 1 if q.shape[0] == 1 else 0
    head = q.shape[3]
    return (q.strides[axis], *q.strides[2:]) == (head, head * q.shape[axis], 1)


def side_by_side(x: Layout) -> bool:
    """Return whether batch and heads can be walked through as one axis."""
    return 1 in x.shape[:2] or x.strides[0] == x.strides[1] * x.shape[1]


def matmul_splits(x: Layout, w: Layout) -> bool:
    """Return whether a second kernel adds up parts of the product (metal/matmul.cpp)."""
    rows, columns, inner = math.prod(x.shape[:-1]), w.shape[-1], x.shape[-1]
    tiles = -(-rows // 16) * -(-columns // 16)
    return rows > 1 and inner >= max(rows, columns, 128) and tiles <= 1024


def matmul_copies(factors: list[Layout]) -> int:
    """Count the factors whose rows or columns do not follow each other (metal/matmul.cpp)."""
    vectors = (factors[0].shape[-2] == 1, factors[1].shape[-1] == 1)
    return sum(not matrix_reads(x, v) for x, v in zip(factors, vectors, strict=True))


def matrix_reads(x: Layout, vector: bool) -> bool:
    rows, columns = x.strides[-2:]
    plain = columns == 1 and (not vector or rows == x.shape[-1])
    return plain or (rows == 1 and (not vector or columns == x.shape[-2]))


def last_two_rows(x: Layout) -> bool:
    return len(x.shape) < 2 or (x.strides[-1] == 1 and x.strides[-2] == x.shape[-1])
