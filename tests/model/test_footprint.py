"""What a pass takes on a GPU, and evaluations within a pass, which change no logits.

The functions are pure, so chips that are not here are tested.
"""

from __future__ import annotations

from typing import Any

import pytest

from openelm_mlx import device
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.model import decoder, footprint
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.model.footprint import activations, layers_at_once, layers_between
from openelm_mlx.settings import LIMITS, Limits, command_limits, gpu_flops


def elements(config: OpenELMConfig, bits: int) -> int:
    """Return the elements of the arrays of quantized weights: words of 32 bits, and scales."""
    total = 0
    for shape in expected_tensors(config).values():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        total += count * bits // 32 + 2 * count // 64 if len(shape) == 2 else count
    return total


@pytest.mark.parametrize(
    ("size", "chip", "tokens", "raised", "between"),
    [
        ("270m", "Apple M1", 512, False, None),
        ("1.1b", "Apple M1", 512, False, 1),
        ("3b", "Apple M1", 256, False, 1),
        ("3b", "Apple M1", 4096, False, None),  # MLX's own limits cut a layer in pieces
        ("3b", "Apple M3 Max", 512, False, None),
        ("270m", "Apple M1", 512, True, 4),
        ("3b", "Apple M3 Max", 256, True, 5),
        ("3b", "Apple M3 Ultra", 512, True, 5),
        ("3b", "Apple M3 Ultra", 64, True, None),
        ("3b", "AMD Radeon", 512, True, None),
    ],
)
def test_passes_are_cut_where_a_command_buffer_would_last_too_long(
    size: str, chip: str, tokens: int, raised: bool, between: int | None
) -> None:
    config = OpenELMConfig.from_name(size)
    limits = Limits(1000, 400 << 20) if raised else command_limits(chip, LIMITS)
    flops = gpu_flops(chip)
    assert layers_between(config, elements(config, 4), tokens, flops, limits) == between
    if between is not None and flops is not None:  # about 50 ms, or a single layer
        layer = 2 * config.num_parameters / config.num_transformer_layers * tokens / flops
        assert between == 1 or between * layer <= 0.05 < (between + 1) * layer


def test_a_few_kernels_end_a_command_buffer_as_well() -> None:
    config = OpenELMConfig.from_name("3b")
    how: Any = (elements(config, 4), 64, gpu_flops("Apple M1"))
    assert layers_between(config, *how, Limits(1000, 400 << 20)) == 6
    assert layers_between(config, *how, Limits(40, 400 << 20)) is None


@pytest.mark.parametrize("size", ["270m", "1.1b"])
def test_activations_are_the_sum_of_what_a_layer_makes(size: str) -> None:
    config = OpenELMConfig.from_name(size)
    shapes = expected_tensors(config)
    total = 0
    for number in range(config.num_transformer_layers):
        rows = {
            part: shapes[f"transformer.layers.{number}.{part}.weight"]
            for part in ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
        }
        total += 3 * rows["attn.qkv_proj"][0] + rows["attn.out_proj"][1]
        total += rows["ffn.proj_1"][0] + rows["ffn.proj_2"][1] + 4 * config.model_dim
    assert activations(config) == total


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"kv_window": 24}])
@pytest.mark.parametrize("every", [1, 3])
def test_evaluations_within_a_pass_change_no_logits(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], every: int
) -> None:
    model, config = tiny.model, tiny.config
    tokens = mx.arange(3, 43)[None]
    kind = CacheKind.of(config, EngineOptions(**options))

    def logits() -> mx.array:
        cache = KVCache(config, kind)
        model.hidden(tokens[:, :20], cache)
        return model.logits(model.hidden(tokens[:, 20:], cache, last=True))

    expected = logits()
    evaluated, evaluate = [], mx.eval
    monkeypatch.setattr(decoder, "layers_at_once", lambda model, tokens: every)
    monkeypatch.setattr(mx, "eval", lambda *trees: (evaluated.append(trees), evaluate(*trees)))
    found = logits()
    assert len(evaluated) == 2 * (config.num_transformer_layers // every)
    assert mx.array_equal(found, expected)
    model.hidden(tokens)  # without a cache it may be traced
    assert len(evaluated) == 2 * (config.num_transformer_layers // every)


def test_only_long_passes_on_metal_ask(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "chip_name", lambda: "Apple M1")
    monkeypatch.setattr(footprint, "LONGEST_SECONDS", 1e-12)
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    assert layers_at_once(tiny.model, 512) is None
    monkeypatch.setattr(device, "kind", lambda: "metal")
    assert layers_at_once(tiny.model, 512) == 1
    assert layers_at_once(tiny.model, 15) is None
