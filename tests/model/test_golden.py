"""Logits of CoreNet's own PyTorch class, float32, against every way of running the model here."""

from __future__ import annotations

import numpy as np
import pytest
from golden_set import GOLDEN, NANO, load_golden

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.pipeline import convert
from openelm_mlx.device import mx
from openelm_mlx.model.cache import KVCache, step_caches

TOLERANCE = 1e-4
pytestmark = pytest.mark.with_or_without("OpenBLAS", "a C++ compiler")


@pytest.mark.parametrize(
    "name",
    [
        "tied-gqa4",
        "untied-mha",
        "noqknorm-gqa2",
        "noglu-gqa2",
        "gpt-test",
        "openelm-nano",
        "openelm-tiny",
    ],
)
def test_logits_equal_the_reference(name, tmp_path):
    model, tokens, expected = load_golden(name, tmp_path)

    def distance(logits: mx.array, wanted=expected) -> float:
        return float(np.abs(np.array(logits) - wanted).max())

    assert distance(model(tokens)) < TOLERANCE
    for chunk in (1, 3, 7):
        cache = KVCache(model.args)
        parts = [model(tokens[:, i : i + chunk], cache) for i in range(0, tokens.shape[1], chunk)]
        assert distance(mx.concatenate(parts, axis=1)) < TOLERANCE
    assert distance(model.logits(model.hidden(tokens, last=True)), expected[:, -1]) < TOLERANCE
    rows = np.arange(tokens.shape[0])
    ends = tokens.shape[1] - 1 - rows  # of prompts of different lengths, padded at the end
    logits = model.logits(model.hidden(tokens, last=mx.array(ends)))
    assert distance(logits, expected[rows, ends]) < TOLERANCE
    cache = KVCache(model.args)
    model.hidden(tokens[:, :5], cache, last=True)
    assert distance(model(tokens[:, 5:], cache), expected[:, 5:]) < TOLERANCE
    cache = KVCache(model.args)
    model(tokens[:, :-4], cache.layers)
    start = mx.array([tokens.shape[1] - 4] * tokens.shape[0])
    fixed = step_caches(cache.arrays, start, cache.kind)
    assert distance(model(tokens[:, -4:], fixed), expected[:, -4:]) < TOLERANCE


def test_greedy_tokens_of_the_trained_model_equal_the_reference(tmp_path):
    from openelm_mlx import load, stream_generate

    folder = tmp_path / "tiny"
    convert(
        ConvertOptions(
            source=GOLDEN / "openelm-tiny" / "checkpoint.pt",
            target=folder,
            tokenizer=NANO / "tokenizer.model",
        )
    )
    golden = np.load(GOLDEN / "openelm-tiny" / "golden.npz")
    prompt, wanted = golden["input_ids"][0].tolist(), golden["greedy_ids"][0].tolist()
    events = stream_generate(load(folder), prompt, max_tokens=len(wanted), ignore_eos=True)
    assert [event.token for event in events] == wanted
