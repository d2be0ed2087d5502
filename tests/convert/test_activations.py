"""The largest number that a model computes is found when it is converted, whatever computes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from golden_set import NANO, load_golden

from openelm_mlx.convert import ConvertOptions, activations, convert
from openelm_mlx.convert.activations import activation_text, measure_activations
from openelm_mlx.convert.opening import open_model
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.model.decoder import parameters

Arrays = dict[str, np.ndarray]


def values(config: OpenELMConfig, w: Arrays, ids: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all that the model of the paper computes on ids [rows, length], in float64."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name]

    def rotated(x: np.ndarray) -> np.ndarray:
        half = config.head_dim // 2
        base = config.rope_freq_constant ** (-np.arange(half) / half)
        turn = np.exp(1j * np.arange(x.shape[-2])[:, None] * base)
        pairs = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    yield from (("weights", array) for array in w.values())
    x = w["transformer.token_embeddings.weight"][ids]
    for number, shape in enumerate(layer_shapes(config)):
        at = f"transformer.layers.{number}."
        yield "norm", (h := norm(x, at + "attn_norm.weight"))
        yield "qkv", (h := h @ w[at + "attn.qkv_proj.weight"].T)
        heads = h.reshape(*ids.shape, -1, config.head_dim).swapaxes(1, 2)
        q, k, v = np.split(heads, [shape.q_heads, shape.q_heads + shape.kv_heads], 1)
        if config.normalize_qk_projections:
            yield "norm", (q := norm(q, at + "attn.q_norm.weight"))
            yield "norm", (k := norm(k, at + "attn.k_norm.weight"))
        yield "rotated", (q := rotated(q))
        yield "rotated", (k := rotated(k))
        k, v = (part.repeat(shape.q_heads // shape.kv_heads, 1) for part in (k, v))
        scores = q @ k.swapaxes(-1, -2) / config.head_dim**0.5
        yield "scores", scores
        scores = np.where(np.tri(ids.shape[1], dtype=bool), scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        out = chances / chances.sum(-1, keepdims=True) @ v
        out = out.swapaxes(1, 2).reshape(*ids.shape, -1) @ w[at + "attn.out_proj.weight"].T
        yield "out_proj", out
        yield "after attention", (x := x + out)
        inner = norm(x, at + "ffn_norm.weight") @ w[at + "ffn.proj_1.weight"].T
        yield "proj_1", inner
        gate, up = np.split(inner, 2, -1) if config.ffn_with_glu else (inner, 1)
        yield "product", (inner := gate * (1 + np.tanh(gate / 2)) / 2 * up)
        yield "proj_2", (out := inner @ w[at + "ffn.proj_2.weight"].T)
        yield "after ffn", (x := x + out)
    yield "norm", (x := norm(x, "transformer.norm.weight"))
    head = "transformer.token_embeddings" if config.share_input_output_layers else "lm_head"
    yield "logits", x @ w[f"{head}.weight"].T


@pytest.mark.parametrize(
    ("name", "factors", "largest"),
    [
        ("untied-mha", {"transformer.token_embeddings": 1e3}, "weights"),
        ("untied-mha", {"0.attn.qkv_proj": 1e-6, "0.attn.out_proj": 1e4}, "weights"),
        ("untied-mha", {"transformer.norm": 1e-6, "lm_head": 1e4}, "weights"),
        ("untied-mha", {"1.attn_norm": 300}, "norm"),
        ("tied-gqa4", {"transformer.norm": 300}, "norm"),
        ("untied-mha", {"0.attn.qkv_proj": 1e4}, "qkv"),
        ("noglu-gqa2", {"4.attn.q_norm": 1e3, "4.attn.k_norm": 1e-3}, "rotated"),
        ("untied-mha", {"2.attn.q_norm": 30}, "scores"),
        ("noqknorm-gqa2", {"0.attn.qkv_proj": 1e3}, "scores"),
        ("noglu-gqa2", {"2.attn.qkv_proj": 30, "transformer.token_embeddings": 1e-3}, "out_proj"),
        ("noglu-gqa2", {"5.attn.out_proj": 1e-6}, "after attention"),
        ("noglu-gqa2", {"0.ffn.proj_1": 1e4}, "proj_1"),
        ("tied-gqa4", {"2.ffn.proj_1": 1e3}, "product"),
        ("untied-mha", {"3.ffn.proj_2": 30, "1.attn_norm": 1e-3}, "proj_2"),
        ("untied-mha", {"2.ffn.proj_2": 30}, "after ffn"),
        ("untied-mha", {"lm_head": 30}, "logits"),
    ],
)
def test_every_value_counts(
    name: str, factors: dict[str, float], largest: str, tmp_path: Path
) -> None:
    """In each case another value is the largest, so that none can be forgotten."""
    model, ids, _ = load_golden(name, tmp_path)
    weights = parameters(model)
    for short, factor in factors.items():
        stem = f"transformer.layers.{short}" if short[0].isdigit() else short
        weights[f"{stem}.weight"] = weights[f"{stem}.weight"] * factor
    plain = {name: np.array(array, np.float64) for name, array in weights.items()}
    expected = [(abs(x).max(), what) for what, x in values(model.args, plain, np.array(ids))]
    assert max(expected)[1] == largest
    found = measure_activations(model.args, weights, [ids, ids[:1, :3]])
    assert found["largest"] == pytest.approx(max(expected)[0], rel=1e-4)
    assert found["tokens"] == ids.size + 3


def test_a_model_that_overflows_has_no_record(tmp_path: Path) -> None:
    model, ids, _ = load_golden("tied-gqa4", tmp_path)
    weights = parameters(model)
    name = "transformer.layers.0.ffn.proj_1.weight"
    weights[name] = weights[name] * 1e30
    assert measure_activations(model.args, weights, [ids]) == {}


def test_the_text_has_2000_tokens_each_row_after_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(ConvertOptions(NANO / "checkpoint.pt", NANO / "unused"))
    monkeypatch.setattr(activations, "TOKENS", 2000)
    batches = activation_text(opened)
    assert all((batch[:, 0] == 1).all().item() for batch in batches)
    assert sum(batch.size - len(batch) for batch in batches[:-1]) == 2000
    assert batches[-1].tolist() == [[1, 2]]


def convert_nano(tmp_path: Path, name: str = "m", **options: object) -> dict[str, object]:
    source = options.pop("source", NANO / "checkpoint.pt")
    report = convert(ConvertOptions(source, tmp_path / name, **options))  # type: ignore[arg-type]
    assert dict(report.activations) == (record := read(tmp_path / name)).get("activations", {})
    return record


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / "conversion.json").read_text())  # type: ignore[no-any-return]


def test_conversions_record_it_where_norms_are_float32(tmp_path: Path) -> None:
    whole = convert_nano(tmp_path)["activations"]
    assert whole["tokens"] == 16 + 1 + 2 and 1 < whole["largest"] < 4094  # type: ignore[index]
    quantized = convert_nano(tmp_path, "q", source=tmp_path / "m", bits=4)
    assert quantized["activations"] == whole
    again = convert_nano(tmp_path, "a", source=tmp_path / "q")["activations"]
    assert again["largest"] == pytest.approx(whole["largest"], rel=0.5)  # type: ignore[index]
    assert "activations" not in convert_nano(tmp_path, "b", dtype="bfloat16")
    unmeasured = convert_nano(tmp_path, "n", measure=False)
    assert "activations" not in unmeasured and "--no-measure" in str(unmeasured["command"])


def test_progress_is_told(tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    options = ConvertOptions(NANO / "checkpoint.pt", tmp_path / "m")
    convert(options, lambda *step: said.append(step))
    measuring = [step for step in said if "measuring activations" in step[2]]
    assert [done for done, *_ in measuring] == list(range(1, measuring[0][1] + 1))
