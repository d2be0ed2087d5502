"""The rules of single primitives: strides, copies, kernels and fusion are those of MLX."""

from __future__ import annotations

import pytest

from openelm_mlx.benchmarks.ledger.layout import kernels
from openelm_mlx.device import mx
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.graph.layout import VIEWS, Layout, after
from openelm_mlx.graph.trace import Array, Node, fuse, trace

VIEWED = [
    lambda x: x.transpose(0, 2, 1, 3),
    lambda x: x[:, 2:5],
    lambda x: x[..., ::-1],
    lambda x: x.reshape(1, 6, 16),
    lambda x: x.transpose(0, 2, 1, 3)[:, :, 1:3].reshape(1, 2, 4, 4),
    lambda x: mx.split(x, 2, axis=1)[1],
    lambda x: mx.expand_dims(x, 2),
    lambda x: x[:1, :1].squeeze(0),
    lambda x: mx.broadcast_to(x[:, :1], (1, 6, 2, 8)),
    lambda x: x.swapaxes(1, 2).reshape(1, 96),
    lambda x: x.transpose(3, 2, 1, 0).reshape(8, 12),
]


@pytest.mark.parametrize("number", range(len(VIEWED)))
def test_strides_are_those_of_mlx(number: int) -> None:
    x = mx.random.normal((1, 6, 2, 8))
    real = VIEWED[number](x)
    mx.eval(x, real)
    graph = trace(lambda x: [VIEWED[number](x)], x)
    layouts: dict[str, Layout] = {}
    copies = 0
    for node in graph.nodes:
        inputs = [layouts.get(array.name, Layout.rows(array.shape)) for array in node.inputs]
        copies += kernels(node, inputs)
        layouts |= {
            out.name: layout for out, layout in zip(node.outputs, after(node, inputs), strict=True)
        }
    found = layouts[graph.outputs[0].name]
    strides = tuple(step // 4 for step in memoryview(real).strides or ())
    matter = [i for i, n in enumerate(real.shape) if n > 1]
    assert [found.strides[i] for i in matter] == [strides[i] for i in matter]
    assert copies == (number in (4, 9, 10))  # what lies apart cannot be merged in place


def test_a_primitive_without_a_rule_is_an_error() -> None:
    array = Array("A", (4, 4), mx.float32)
    with pytest.raises(
        BenchmarkError, match="does not know how many kernels FFT launches; add its rule"
    ):
        kernels(Node("FFT", (array,), (array,)), [Layout.rows((4, 4))])
    with pytest.raises(BenchmarkError, match="does not know Load without inputs"):
        kernels(Node("Load", (), (array,)), [])


def test_attention_copies_what_several_rows_do_not_lay_out_for_it() -> None:
    """mlx/backend/metal/scaled_dot_product_attention.cpp: q_copy_unless and mask_copy_unless, by
    hand.
    """

    def count(rows: int, mask_heads: int, sliced: bool) -> int:
        q = Layout(
            (rows, 4, 1, 64),
            (6 * 64 if sliced else 4 * 64, 64, 64, 1),
            rows * 6 * 64 if sliced else rows * 256,
        )
        kv = Layout((rows, 2, 256, 64), (2 * 256 * 64, 256 * 64, 64, 1), rows * 2 * 256 * 64)
        node = Node(
            "ScaledDotProductAttention",
            (Array("q", q.shape, mx.float32),),
            (Array("o", q.shape, mx.float32),),
        )
        return kernels(node, [q, kv, kv, Layout.rows((rows, mask_heads, 1, 256))])

    assert [
        count(1, 1, True),
        count(4, 4, False),
        count(4, 4, True),
        count(4, 1, False),
        count(4, 1, True),
    ] == [1, 1, 2, 2, 3]


def test_a_product_of_several_rows_is_split_where_the_inner_width_is_the_largest() -> None:
    """mlx/backend/metal/matmul.cpp, case 1 of steel_matmul_regular: two kernels; of one row always
    one.
    """

    def count(rows: int, inner: int, columns: int) -> int:
        shapes = [(rows, inner), (inner, columns), (rows, columns)]
        x, w, out = (
            Array(name, shape, mx.float32) for name, shape in zip("xwo", shapes, strict=True)
        )
        return kernels(Node("Matmul", (x, w), (out,)), [Layout.rows(x.shape), Layout.rows(w.shape)])

    assert [count(1, 1280, 512), count(4, 1280, 512), count(4, 1280, 5120), count(4, 64, 64)] == [
        1,
        2,
        1,
        1,
    ]


def test_elementwise_neighbours_fuse_and_other_readers_stop_it() -> None:
    def function(x: mx.array) -> list[mx.array]:
        y = mx.exp(x) + 1
        return [y * 2, y @ y]  # y is read by a product too, so it ends a kernel of its own

    names = [
        node.fused_name
        for node in fuse(trace(function, mx.ones((4, 4)))).nodes
        if node.name not in VIEWS
    ]
    assert sorted(names) == ["CompiledBroadcastMultiply", "CompiledExpBroadcastAdd", "Matmul"]
