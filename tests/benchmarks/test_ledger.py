"""The ledger of a decoded token: what our rules count is what MLX's own graph and strides say."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optional import compiles
from small import random_adapter

from openelm_mlx.benchmarks.hardware import bytes_per_token
from openelm_mlx.benchmarks.ledger import steps
from openelm_mlx.benchmarks.ledger.count import ledger, main
from openelm_mlx.benchmarks.ledger.graph import one_primitive_each
from openelm_mlx.benchmarks.ledger.steps import (
    WeightSpec,
    host_times,
    trace_mlx_lm,
    trace_ours,
    undisturbed,
)
from openelm_mlx.device import mx, nn
from openelm_mlx.errors import BenchmarkError, ConfigError
from openelm_mlx.graph.layout import VIEWS
from openelm_mlx.model.adapters import adapted, prepare
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.model.kernels.kernel import NAMES

M270 = OpenELMConfig.from_name("270m")
SMALL = replace(M270, num_transformer_layers=3)
FOUR_BITS = {"group_size": 64, "bits": 4}
SPECS = [WeightSpec("float32"), WeightSpec("bfloat16"), WeightSpec("bfloat16", FOUR_BITS)]


def primitives_of(outputs: Any, path: Path) -> Counter[str]:
    """Return the names of the primitives of a graph as MLX itself gives them."""
    mx.export_to_dot(str(path), *outputs)
    return Counter(re.findall(r'label ="(\w+)"', path.read_text()))


def kernels_only(names: Counter[str]) -> Counter[str]:
    stand_ins = {"Depends", "RMSNorm", "RoPE", "ScaledDotProductAttention", "Dequantize", *NAMES}
    return Counter({name: count for name, count in names.items() if name not in VIEWS | stand_ins})


@pytest.mark.with_or_without("a C++ compiler")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "twins"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernels_of_the_compiled_step_are_those_mlx_fuses(
    spec: WeightSpec, rows: int, kernels: bool, tmp_path: Path
) -> None:
    """Without a compiler MLX runs the step unfused: then its primitives are those the fused nodes
    were made from.
    """
    counted = trace_ours(SMALL, spec, rows=rows, kernels=kernels)
    with one_primitive_each(kernels=kernels):
        step = steps.our_step(steps.our_model(SMALL, spec), compiled=True)
        after = step(steps.our_state(SMALL, rows, 64, spec.mlx))
        kept = [array for arrays in after.buffers for array in arrays]
        real = primitives_of([after.token, after.position, *kept], tmp_path / "g.dot")
    parts = Counter(part.name for node in counted.graph.nodes for part in node.parts or (node,))
    fused = Counter(node.fused_name for node in counted.graph.nodes)
    assert kernels_only(fused if compiles() else parts) == kernels_only(real)
    assert any(len(node.parts) > 5 for node in counted.graph.nodes)
    depends = ("RMSNorm", "ScaledDotProductAttention", "Dequantize", "Depends", *NAMES)
    assert real["Depends"] == sum(node.name in depends for node in counted.graph.nodes)


@pytest.mark.with_or_without("a C++ compiler")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernels_of_mlx_lm_are_those_of_its_eager_graph(spec: WeightSpec, tmp_path: Path) -> None:
    counted = Counter(node.fused_name for node in trace_mlx_lm(SMALL, spec).graph.nodes)
    with one_primitive_each():
        caches = steps.mlx_lm_caches(SMALL, 64, spec.mlx)
        outputs = steps.mlx_lm_step(steps.mlx_lm_model(SMALL, spec), caches)(
            mx.array([1], mx.uint32)
        )
        real = primitives_of(
            [*outputs, *(c.keys for c in caches), *(c.values for c in caches)], tmp_path / "g.dot"
        )
    if compiles():
        real["Compiled"] = real.pop(next(name for name in real if name.startswith("Compiled")))
    else:
        gates = counted.pop("Compiled")  # silu(gate) * up, which mlx-lm compiles by itself
        counted += Counter({"Sigmoid": gates, "Multiply": 2 * gates})
    assert kernels_only(counted) == kernels_only(real)


@pytest.mark.parametrize(
    ("spec", "ours", "peer"),
    [
        (SPECS[0], 11 * 16 + 7, 16 * 16 + 6),
        (SPECS[1], 11 * 16 + 7, 16 * 16 + 6),
        (SPECS[2], 13 * 16 + 10, 17 * 16 + 9),
    ],
    ids=lambda value: str(value),
)
def test_kernels_of_270m_counted_by_hand(spec: WeightSpec, ours: int, peer: int) -> None:
    """A layer of ours: 2 norms, 4 projections (2 of them with the residual), norm and rotation of q
    and k, storing, attention, gate; quantized 2 residuals more. Once a token: embedding (4
    quantized), angles, mask, position, norm, head, argmax.
    """
    mine, other = (
        ledger(trace_ours(M270, spec, kernels=False)),
        ledger(trace_mlx_lm(M270, spec)),
    )
    assert (mine.kernels, other.kernels) == (ours, peer)
    assert (
        mine.by_purpose["copy"]
        == mine.by_purpose["copy of keys or values"]
        == mine.by_purpose["other"]
        == 0
    )
    assert sum(mine.by_primitive.values()) == sum(mine.by_purpose.values()) == mine.kernels
    assert mine.kernels <= (218 if spec.quantization else 183)
    every_layer = {purpose for purpose, count in mine.by_purpose.items() if count == 16}
    assert every_layer == {
        "norm before attention",
        "attn.qkv_proj",
        "query and key norm",
        "scale and rotate query and key",
        "store key and value",
        "attention",
        "attn.out_proj",
        "norm before FFN",
        "ffn.proj_1",
        "gate",
        "ffn.proj_2",
    }


@pytest.mark.parametrize("spec", SPECS[1:], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_costs_two_kernels_a_matrix_and_dora_one_more(dora, spec, monkeypatch) -> None:
    """a x, and its product with b added to W x; the length of a row. Nothing else changes."""
    plain, counts, one_layer = steps.our_model, [], replace(M270, num_transformer_layers=1)

    def model(config: OpenELMConfig, spec: WeightSpec) -> OpenELM:
        made = plain(config, spec)
        made = adapted(made, random_adapter(made, 1, dora=dora, only="layers"))
        prepare(made)
        return steps.ready(made)

    for make in (plain, model):
        monkeypatch.setattr(steps, "our_model", make)
        counts.append(ledger(trace_ours(one_layer, spec)).kernels)
    assert counts[1] - counts[0] == (3 if dora else 2) * 4


def test_kernels_of_four_rows_of_270m_counted_by_hand() -> None:
    """Without kernels of our own they are those of one row, and more: queries are copied in each
    layer, and there is a mask for each number of heads, not one for all.
    """
    one, four = (ledger(trace_ours(M270, SPECS[2], rows=rows, kernels=False)) for rows in (1, 4))
    heads = len({shape.q_heads for shape in layer_shapes(M270)})
    assert four.kernels == one.kernels + M270.num_transformer_layers + heads - 1 <= 238
    assert (four.by_purpose["copy"], four.by_purpose["mask"], four.by_purpose["residual"]) == (
        16,
        heads,
        32,
    )


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_rows_share_the_bytes_of_the_weights(spec: WeightSpec) -> None:
    one, four = (ledger(trace_ours(SMALL, spec, 96, rows)) for rows in (1, 4))
    row = SMALL.model_dim * (
        4 if spec.quantization is None else 0.5
    )  # each looks up its own embedding
    assert four.bytes_read["embedding"] == one.bytes_read["embedding"] + 3 * row
    assert four.bytes_read["kv"] == 4 * one.bytes_read["kv"]
    assert all(
        four.bytes_read[part] == one.bytes_read[part] for part in ("attention", "ffn", "norms")
    )


def test_a_split_gate_is_copied_for_a_quantized_projection() -> None:
    """mlx-lm's gate keeps the row stride of what it was split from, and the quantized product of
    one row asks for its own.
    """
    assert ledger(trace_mlx_lm(SMALL, SPECS[2])).by_purpose["copy"] == 3
    x = mx.zeros((1, 1, 128))
    gate, up = mx.split(x, 2, axis=-1)
    product = mx.compile(lambda a, b: nn.silu(a) * b, shapeless=True)(gate, up)
    mx.eval(product)
    assert memoryview(product).strides == (512, 512, 4)


@pytest.mark.parametrize("name", ["270m", "3b"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bytes_on_the_graph_are_those_of_the_roofline(name: str, spec: WeightSpec) -> None:
    config, context = replace(OpenELMConfig.from_name(name), num_transformer_layers=4), 96
    expected = bytes_per_token(config, spec.dtype, spec.quantization, context)
    mine, peer = (
        ledger(trace_ours(config, spec, context)),
        ledger(trace_mlx_lm(config, spec, context)),
    )
    for part in ("embedding", "attention", "ffn", "scales", "kv"):
        assert mine.bytes_read[part] == peer.bytes_read[part] == expected[part], part
    assert peer.bytes_read["norms"] == expected["norms"]
    assert mine.bytes_read["norms"] == expected["norms"]
    twins = ledger(trace_ours(config, spec, context, kernels=False))
    per_head = 2 * config.head_dim * spec.mlx.size * config.num_transformer_layers
    # q_norm and k_norm lie in tables of ours
    assert twins.bytes_read == mine.bytes_read | {
        "norms": expected["norms"] - per_head,
        "activations": twins.bytes_read["activations"],
    }


def test_single_layers_may_be_quantized_their_own_way() -> None:
    spec = WeightSpec(
        "bfloat16",
        FOUR_BITS
        | {
            "transformer.layers.0.ffn.proj_2": {"bits": 8, "group_size": 32},
            "transformer.layers.1.ffn.proj_2": False,
        },
    )
    entry = ledger(trace_ours(SMALL, spec, kernels=False))
    expected = bytes_per_token(SMALL, "bfloat16", spec.quantization, 64)
    assert entry.kernels == 13 * 3 + 10 - 1  # one residual is added by its unquantized projection
    assert {part: entry.bytes_read[part] for part in ("ffn", "scales")} == {
        part: expected[part] for part in ("ffn", "scales")
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "4 bits in groups of 48, which MLX"),
        ({"quantization": {"bits": "4"}}, "has a quantization without group_size"),
    ],
)
def test_specs_that_cannot_be(spec: dict[str, Any], message: str) -> None:
    with pytest.raises((BenchmarkError, ConfigError), match=message):
        trace_ours(SMALL, WeightSpec(**spec))


def test_rows_that_do_not_divide_into_groups() -> None:
    spec = WeightSpec(quantization={"bits": 4, "group_size": 128})
    with pytest.raises(BenchmarkError, match="cannot quantize to {'bits': 4"):
        trace_ours(replace(SMALL, model_dim=21 * 64), spec)


def test_the_host_is_timed_for_both_engines_and_the_stand_ins_are_gone_then() -> None:
    times = host_times(SMALL, SPECS[2], steps=1)
    assert times.keys() == {"openelm-mlx, compiled", "openelm-mlx, eager", "mlx-lm"}
    assert all(0 < time.build < time.total and time.submit > 0 for time in times.values())
    assert mx.fast.rms_norm(mx.array([[3.0]]), None, 1e-6).item() == pytest.approx(1)


def test_command_prints_both_ledgers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["270m", "--bits", "4", "--steps", "0", "--json"]) == 0
    ours, twins, peer = json.loads(capsys.readouterr().out)["ledgers"]
    assert ours["engine"] == "openelm-mlx" and twins["engine"] == "no kernels"
    assert ours["kernels"] < twins["kernels"] < peer["kernels"]
    assert main(["270m", "--rows", "4"]) == 0
    shown = capsys.readouterr().out
    assert "one token of each of 4 rows" in shown and "mlx-lm" not in shown
    assert main(["270m", "--steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in ("by purpose", "RoPE", "of mlx-lm's", "not run on Metal", "norm_rope_store")
    )
    assert main(["7b"]) == 2 and "not a published OpenELM size" in capsys.readouterr().err


@pytest.mark.needs("Linux")  # nothing else lets a process choose its cores
def test_the_clock_has_one_core_for_itself_and_gives_the_others_back() -> None:
    before = os.sched_getaffinity(0), os.sched_getscheduler(0)
    with pytest.raises(ZeroDivisionError), undisturbed():
        mx.eval(mx.zeros(3) + 1)
        threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert len(threads) > 1 and {tuple(os.sched_getaffinity(thread)) for thread in threads} == {
            (max(before[0]),)
        }
        raise ZeroDivisionError
    assert (os.sched_getaffinity(0), os.sched_getscheduler(0)) == before
