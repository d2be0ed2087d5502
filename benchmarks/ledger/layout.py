"""Which primitives launch kernels on Metal, and how many.

Views launch none (graph/layout.py follows them); copies are counted. Each rule is that of MLX's
Metal backend (v0.32; the file is named beside it, under mlx/backend/). Assumed throughout: one new
token a row, at most 5 rows (from the 6th on it depends on the chip which kernel multiplies by a
quantized matrix) and no matrix units (M5). A buffer that a primitive of MLX updates counts as
overwritten in place; `count.Ledger.copies` says what is copied where it is not.
"""

from __future__ import annotations

import math

from openelm_mlx.errors import BenchmarkError
from openelm_mlx.graph.layout import VIEWS, Layout, broadcast, views
from openelm_mlx.graph.trace import FUSABLE, Node

ONE_KERNEL = FUSABLE | {"ArgReduce", "Arange", "Compiled", "Gather", "ScatterAxis", "SliceUpdate"}
ONE_KERNEL |= {"GatherAxis", "RandomBits"}
SORTS = ("Sort", "ArgSort", "Partition", "ArgPartition")


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
