"""The ledger with our kernels in use: what they save of a step, and what is copied without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kept import KINDS

from openelm_mlx.benchmarks.ledger.count import SAMPLED, ledger, main
from openelm_mlx.benchmarks.ledger.graph import Traced, one_primitive_each, trace
from openelm_mlx.benchmarks.ledger.layout import kernels, sorting
from openelm_mlx.benchmarks.ledger.steps import (
    WeightSpec,
    our_model,
    our_state,
    trace_mlx_lm,
    trace_ours,
)
from openelm_mlx.device import mx
from openelm_mlx.engine.decode import forward
from openelm_mlx.engine.draft_model import make_drafter
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.graph.layout import VIEWS, Layout, after
from openelm_mlx.graph.trace import Graph, fuse
from openelm_mlx.model.cache_kinds import CacheKind, Plain, resized
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.kernels.kernel import Kernel

M270 = OpenELMConfig.from_name("270m")
SMALL = replace(M270, num_transformer_layers=3)
PLAIN = WeightSpec("bfloat16")
FOUR_BITS = WeightSpec("bfloat16", {"group_size": 64, "bits": 4})
STORE = Kernel("norm_rope_store", ("x", "buffer"), ("q",), "", in_place=("buffer",))


def traced(graph: Graph) -> Traced:
    return Traced("a test", graph, {}, frozenset({graph.inputs[-1].name}), 64, 256)


def test_a_kernel_is_one_launch_and_a_copy_of_each_input_that_is_not_in_rows():
    def function(x: mx.array, buffer: mx.array) -> list[mx.array]:
        launch = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
        shapes, dtypes = [(4, 8)], [mx.float32]
        (q,) = STORE(x, buffer, **launch, shapes=shapes, dtypes=dtypes)
        (p,) = STORE(x.T, buffer, **launch, shapes=shapes, dtypes=dtypes)
        return [q, p, *mx.depends([buffer], [q])]

    with one_primitive_each(tagged=True):
        graph = trace(function, mx.zeros((4, 16)), mx.zeros((2, 1, 3, 256, 8)))
    entry = ledger(traced(graph))
    assert entry.by_primitive == {"norm_rope_store": 2, "copy of an input": 1}
    assert entry.by_purpose == {"norm, rotate and store heads": 2, "copy": 1}
    # of the buffer nothing is read, and one of its 256 slots written
    assert entry.bytes_read == {"activations": 2 * 4 * 16 * 4}
    assert entry.bytes_written == {"activations": 2 * 4 * 8 * 4, "kv": 2 * 2 * 3 * 8 * 4}
    assert entry.copies == 0


@pytest.mark.parametrize("spec", [PLAIN, FOUR_BITS], ids=str)
def test_a_sum_costs_nothing_where_the_norm_that_reads_it_adds(spec):
    mine, twins = (ledger(trace_ours(M270, spec, kernels=on)) for on in (True, False))
    assert mine.by_purpose["residual"] == 0
    assert twins.by_purpose["residual"] == (32 if spec.quantization else 0)
    assert mine.by_primitive["add_rms_norm"] == twins.by_purpose["residual"]
    for part in ("norm before attention", "norm before FFN", "last norm"):
        assert mine.by_purpose[part] == twins.by_purpose[part] > 0
    assert mine.bytes_written["kv"] == twins.bytes_written["kv"]


@pytest.mark.parametrize(
    ("spec", "context", "count"),
    [(PLAIN, 64, 9 * 16 + 7), (FOUR_BITS, 64, 9 * 16 + 10), (FOUR_BITS, 768, 9 * 16 + 10)],
    ids=str,
)
def test_kernels_of_270m_counted_by_hand(spec, context, count):
    """A layer: 4 projections, heads with storing, attention, gate, and 2 norms. Plain projections
    add the residual, quantized ones leave it to the norms. Once a token: embedding (4 quantized),
    angles, position, mask, norm, head, argmax.
    """
    mine = ledger(trace_ours(M270, spec, context))
    assert mine.kernels == count <= (160 if spec.quantization else 152)
    assert mine.by_purpose["copy"] == mine.by_purpose["other"] == mine.copies == 0


def check_order(graph: Graph) -> None:
    """Whatever reads a buffer, or writes to it again, is computed from outputs of the kernel that
    wrote to it, too: MLX, which does not know of the writing, orders the two by those.
    """
    written: dict[str, str] = {}  # the output that came with a buffer, by the name of its view
    sources: dict[str, set[str]] = {}  # the outputs of such kernels that an array is computed from
    for node in graph.nodes:
        names = [array.name for array in node.inputs]
        if node.name == "Depends":
            written |= {out.name: names[-1] for out in node.outputs}
        elif node.name in VIEWS and names[0] in written:
            written |= {out.name: written[names[0]] for out in node.outputs}
        else:
            others = [sources.get(name, set()) for name in names if name not in written]
            found = set().union(*others)
            assert {written[name] for name in names if name in written} <= found, node
            if node.name == STORE.name:
                found = found | {out.name for out in node.outputs}
            sources |= {out.name: found for out in node.outputs}
    assert written


def test_tokens_that_a_model_drafts_are_stored_in_order():
    model, start = our_model(SMALL, PLAIN), our_state(SMALL, 2, 64, mx.bfloat16)
    draft = make_drafter(model, CacheKind(), Filters(), SMALL.vocab_size, 4)

    def step(pairs: mx.array, position: mx.array, *flat: mx.array) -> list[mx.array]:
        buffers = [[array] for array in flat]
        more = (start.key, start.controls, None)
        tokens, after = draft(pairs, position, buffers, *more)
        return [tokens, *(array for arrays in after for array in arrays)]

    pairs = mx.ones((2, 2), mx.uint32)
    with one_primitive_each(tagged=True):
        graph = fuse(trace(step, pairs, start.position, *(array for (array,) in start.buffers)))
    assert sum(node.name == STORE.name for node in graph.nodes) == 3 * 4
    check_order(graph)


@pytest.mark.parametrize(("rows", "drafts"), [(1, 0), (4, 3)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_buffer_is_copied(kind, rows, drafts):
    """What reads or writes one is a view of it, attention, or the kernel that stores; none of them
    copies it. What a step returns are the buffers that it was given.
    """
    model = our_model(SMALL, FOUR_BITS)
    start = our_state(SMALL, rows, 64, mx.bfloat16)
    kept = [kind.store.pack(mx.zeros(arrays[0].shape, mx.bfloat16)) for arrays in start.buffers]
    slots = kind.layout.slots_for(64, 256)
    kept = [[resized(array, slots) for array in arrays] for arrays in kept]
    draft = mx.ones((rows, drafts), mx.uint32) if drafts else None

    def step(position: mx.array, *flat: mx.array) -> list[mx.array]:
        each = len(kept[0])
        buffers = [list(flat[i : i + each]) for i in range(0, len(flat), each)]
        logits, after = forward(
            model, kind, start._replace(position=position, buffers=buffers), draft
        )
        return [logits, *(array for arrays in after for array in arrays)]

    with one_primitive_each(tagged=True):
        graph = fuse(trace(step, start.position, *(array for arrays in kept for array in arrays)))
    views, readers = {array.name for array in graph.inputs[1:]}, set()
    layouts: dict[str, Layout] = {}
    check_order(graph)
    for node in graph.nodes:
        inputs = [layouts.get(array.name, Layout.rows(array.shape)) for array in node.inputs]
        layouts |= zip((out.name for out in node.outputs), after(node, inputs), strict=True)
        if views & {array.name for array in node.inputs}:
            assert kernels(node, inputs) == (node.name not in VIEWS), node
            if node.name in VIEWS:
                views |= {out.name for out in node.outputs}
            else:
                readers.add(node.name)
    attention = "ScaledDotProductAttention" if kind.store == Plain() else "QuantizedMatmul"
    assert readers == {"norm_rope_store", attention}
    assert {out.name for out in graph.outputs[1:]} <= views


def test_parts_of_a_product_that_are_added_up_are_no_copies():
    """Of four rows a product is split where it is deeper than wide: qkv_proj in the 5 layers of 12
    heads (1280 to 1152), out_proj in the 4 of 20 (1280 to 1280), proj_2 where ffn_dim is at least
    1280, in 14 of 16.
    """
    entry = ledger(trace_ours(M270, PLAIN, rows=4))
    products = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
    assert [entry.by_purpose[product] - 16 for product in products] == [5, 4, 0, 14]
    assert entry.by_primitive["further passes"] == 23 and entry.by_purpose["copy"] == 0


def test_four_rows_take_no_more_than_a_mask_for_each_number_of_heads():
    one, four = (ledger(trace_ours(M270, FOUR_BITS, rows=rows)) for rows in (1, 4))
    assert (one.by_purpose["mask"], four.by_purpose["mask"]) == (1, 3)
    assert four.kernels - one.kernels == 2


@pytest.mark.parametrize("spec", [PLAIN, FOUR_BITS], ids=str)
def test_primitives_of_mlx_copy_each_buffer_while_the_device_is_behind(spec):
    twins, peer = (
        ledger(trace_ours(SMALL, spec, kernels=False)),
        ledger(trace_mlx_lm(SMALL, spec)),
    )
    elements = sum(array.size for array in trace_ours(SMALL, spec).graph.inputs[2:])
    assert (twins.copies, peer.copies) == (3, 6)  # keys and values of ours are one buffer
    assert twins.bytes_copied == peer.bytes_copied == 2 * 2 * elements


def test_kernels_of_sampling_without_kernels_of_our_own_counted_by_hand():
    """To float32, maximum, gaps; 10 of a sort of 32,000, 1 of one of 64; weights, their sum, what
    is short of the mass and how many; 6 small ones for the widest gap and its equals; equals,
    as numbers, and their sum; key, bits, and noise of the random numbers; all together; the draw.
    """
    mine = ledger(trace_ours(M270, FOUR_BITS, sampling=SAMPLED, kernels=False))
    drawn = ("logits to float32", "sampling", "random numbers", "next token")
    assert [mine.by_purpose[what] for what in drawn] == [1, 26, 3, 1]
    greedy = ledger(trace_ours(M270, FOUR_BITS, kernels=False))
    assert mine.kernels - greedy.kernels == 30


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("more", [{}, {"min_p": 0.05}, {"top_k": 0}], ids=str)
def test_a_sampled_token_costs_what_a_greedy_one_does(rows, more):
    """The kernel that filters and draws takes the place of the maximum: at most 4 were allowed."""
    sampled = ledger(trace_ours(M270, FOUR_BITS, rows=rows, sampling=replace(SAMPLED, **more)))
    greedy = ledger(trace_ours(M270, FOUR_BITS, rows=rows))
    assert sampled.by_primitive["sample"] == 1 and sampled.kernels == greedy.kernels


@pytest.mark.parametrize(
    ("size", "itemsize", "count"),
    [(64, 4, 1), (2048, 4, 1), (2049, 4, 4), (32000, 4, 10), (32000, 2, 10), (32000, 8, 12)],
)
def test_a_sort_merges_blocks(size, itemsize, count):
    """mlx/backend/metal/sort.cpp: blocks, two kernels a round of merging, and a copy."""
    assert sorting(size, itemsize) == count


def test_the_command_counts_a_sampled_step(capsys):
    assert main(["270m", "--sample", "--rows", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of each of 2 rows at 64 tokens, sampled" in shown and "mlx-lm" not in shown
    assert "no kernels: while the device is behind the host, 16 buffers are copied" in shown
