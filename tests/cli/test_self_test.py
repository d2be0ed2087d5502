"""The self test of `openelm doctor` knows what whole passes give, and sees what is wrong in any of
the ways in which a device runs the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from openelm_mlx import load
from openelm_mlx.benchmarks.doctor import Sections, self_test
from openelm_mlx.benchmarks.doctor.self_test import PROMPT, TOKENS, WAYS, results
from openelm_mlx.cli import main
from openelm_mlx.device import mx
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.model.cache import Place
from openelm_mlx.model.kernels.kernel import choice
from openelm_mlx.settings import float32_products

pytestmark = pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")


@pytest.fixture
def tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "WAYS", ())


def test_the_expected_tokens_are_those_of_whole_passes_and_no_other_comes_near():
    engine = load("openelm-tiny", dtype="float32")
    ids = prompt_tokens(engine, PROMPT)
    for token in TOKENS:
        logits = engine.model(mx.array([ids]))[0, -1, : engine.vocab]
        second, first = mx.sort(logits)[-2:].tolist()
        assert int(mx.argmax(logits).item()) == token and first - second > 0.2
        ids.append(token)


def test_what_is_right_is_said_with_what_it_was_compared_with(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "16 of 16 greedy tokens" in shown and "wrong" not in shown
    assert all(way.name in shown for way in WAYS)
    assert "with the CPU itself" in shown or "compared with float32 on the CPU" in shown


def test_a_wrong_kernel_is_seen_and_said(capsys, monkeypatch, tokens_only):
    monkeypatch.setattr(
        "openelm_mlx.model.heads.rotate", lambda x, normed, swapped, weights, turn: x
    )
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "16 of 16" not in shown and "! this device computes wrong results; update" in shown


def forgetful(array: mx.array, size: int, axis: int = -2) -> mx.array:
    return mx.zeros((*array.shape[:axis], size, array.shape[-1]), array.dtype)


def four_bits_wrong(x, w, scales, biases, *, bits: int, **settings: Any) -> mx.array:
    return QUANTIZED(x, w, scales, scales if bits == 4 else biases, bits=bits, **settings)


def sees_later_rows(place: Place, length: int, heads: int = 1) -> mx.array:
    mask = MASK(place, length, heads)
    return mx.ones_like(mask) if heads > 1 else mask


QUANTIZED, MASK = mx.quantized_matmul, Place.mask
# what is broken, by the way that alone runs it
FAULTS: dict[int, tuple[str, Callable[..., Any]]] = {
    0: ("openelm_mlx.model.cache.resized", forgetful),
    1: ("openelm_mlx.model.cache_kinds.Place.mask", sees_later_rows),
    2: ("openelm_mlx.engine.decode.agreeing", lambda tokens, drafted: drafted.lengths),
    3: ("mlx.core.quantized_matmul", four_bits_wrong),
    4: ("openelm_mlx.model.cache.sdpa", lambda q, k, v, mask, scale: q),
}


def test_drafts_are_made_of_which_some_are_kept():
    engine, _ = self_test.models(None, self_test.STORED)
    way, prompt = WAYS[2], self_test.prompt_ids(engine, 12)
    (plain,) = self_test.run(engine, [prompt], way)
    draft = self_test.NearlyRight(prompt + [event.token for event in plain])
    (events,) = self_test.run(engine, [prompt], way, draft)
    assert [e.token for e in events] == [e.token for e in plain]
    stats = events[-1].stats
    assert stats is not None and 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize("way", FAULTS)
def test_each_way_sees_what_only_it_runs(way, monkeypatch):
    monkeypatch.setattr(*FAULTS[way])
    (found,) = results(ways=[WAYS[way]])
    assert not found.ok and found.off is not None and found.off > 4 * found.limit
    assert str(found).startswith(f"{WAYS[way].name}: log probabilities are off by ")


def test_the_facts_are_printed_whatever_fails(capsys, monkeypatch):
    def fail(*arrays):
        raise RuntimeError("[metal] no such kernel")

    monkeypatch.setattr("openelm_mlx.model.heads.rotate", fail)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: [metal] no such kernel; none of 16 greedy tokens" in shown
    assert f"! {WAYS[3].name}: RuntimeError: [metal] no such kernel" in shown
    assert "converted cache" in shown and "! this device" in shown
    monkeypatch.setattr("openelm_mlx.device.facts", fail)
    monkeypatch.setattr("openelm_mlx.engine.hub.hub_cache", fail)
    monkeypatch.setattr("openelm_mlx.benchmarks.doctor.self_test.results", fail)
    monkeypatch.setattr("openelm_mlx.model.kernels.self_check.forget", fail)
    assert main(["doctor", "--json"]) == 1
    page = json.loads(capsys.readouterr().out)
    parts = ("machine", "caches", "kernels", "self_test")
    assert all(page["facts"][part].startswith("failed: RuntimeError: [metal]") for part in parts)
    assert page["hints"][0].startswith("this device computes wrong results")
    assert main(["doctor"]) == 1 and "without 'system' what slows" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_a_setting_that_is_not_allowed_is_no_fault_of_the_device(
    flags, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENELM_KERNELS", "maybe")
    choice.cache_clear()
    assert main(["doctor", *flags]) == 2
    printed, said = capsys.readouterr()
    assert said.startswith("openelm: OPENELM_KERNELS is 'maybe'; allowed: on, off") and not printed


def test_a_way_that_gives_no_numbers_is_wrong_and_the_next_one_is_tried(monkeypatch):
    far = iter((math.nan, math.inf, 0.0))
    monkeypatch.setattr(self_test, "difference", lambda *how: next(far))
    monkeypatch.setattr(self_test, "WAYS", WAYS[:3])
    ways = [*Sections(True, lambda label, work: None).ways()]
    assert [way.ok for way in ways] == [False, False, True] and ways[0].off is None
    assert ways[0].error == ways[1].error == "log probabilities that are not finite"


def test_where_float32_is_multiplied_less_exactly():
    products = float32_products
    assert products("metal", "Apple M4 Max", {}) == products("cpu", "AMD EPYC", {}) == "float32"
    assert products("metal", "Apple M5", {}).startswith("TF32, about 3 digits")
    assert products("cuda", "NVIDIA H100", {}).startswith("TF32")
    assert products("metal", "Apple M5 Pro", {"MLX_ENABLE_TF32": "0"}) == "float32"
