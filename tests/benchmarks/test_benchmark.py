"""Suites and options; random weights and fewer bits; what a copy bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_sessions import CASE

from openelm_mlx import load
from openelm_mlx.benchmarks.hardware import bytes_per_token
from openelm_mlx.benchmarks.measure import weights
from openelm_mlx.benchmarks.measure.suites import (
    SUITES,
    BenchmarkOptions,
    Point,
    cache_settings,
    speculation_settings,
)
from openelm_mlx.benchmarks.measure.weights import Weights
from openelm_mlx.benchmarks.peers.on_mlx import OurSession, prompt_ids
from openelm_mlx.benchmarks.results import PROCESSES
from openelm_mlx.benchmarks.results.document import Document, Machine, Metric, Row, completed
from openelm_mlx.device import mx
from openelm_mlx.errors import BenchmarkError, ConfigError, OpenELMError, OptionError
from openelm_mlx.evaluate.compare import compare, own_text
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.decoder import parameters


def test_suites_and_grids():
    measured = {"quick", "standard", "paper", "context", "bits", "startup", "first-run", "soak"}
    assert set(SUITES) == measured
    paper = BenchmarkOptions(suite="paper").chosen()
    assert (
        paper.models == ("270m", "450m", "1.1b", "3b")
        and paper.bits == (None, 4)
        and paper.dtype == "bfloat16"
    )
    assert BenchmarkOptions(suite="paper").points() == [Point(36, 1024)]
    quick = BenchmarkOptions().points()
    assert (
        quick[0] == Point(64, 64)
        and Point(64, 64, batch_size=4) in quick
        and Point(64, 64, cache="kv8") in quick
    )
    assert BenchmarkOptions(prompt_tokens=(8, 16)).points() == [Point(8, 64), Point(16, 64)]
    grid = BenchmarkOptions(
        batch_sizes=(1, 2), caches=("plain", "kv4"), generation_tokens=(4, 5)
    ).points()
    assert len(BenchmarkOptions(batch_sizes=(1, 4), caches=("plain", "window-64")).points()) == 4
    assert (
        len(grid) == 8 and Point(64, 5, 2, "kv4") in grid and not any(p.speculation for p in grid)
    )
    assert BenchmarkOptions(random_weights=("1.1b",), bits=(4,), trials=9).chosen().models == (
        "1.1b",
    )
    assert (
        max(
            p.prompt_tokens + p.generation_tokens
            for p in BenchmarkOptions(suite="context").points()
        )
        == 2049
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "fast"}, "suite is 'fast'; allowed: quick, standard"),
        (
            {"models": ("a",), "random_weights": ("270m",)},
            "a model and --random-weights exclude each other",
        ),
        (
            {"prompt_tokens": (0,)},
            r"prompt_tokens is \(0,\); allowed is a whole number, or a list of .* from 1 up",
        ),
        ({"bits": (7,)}, "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
        ({"trials": 4}, "trials is 4; allowed is a whole number from 5 up, or None"),
        ({"minutes": 0}, "minutes is 0; allowed is a number from 0.01 up"),
        (
            {"minutes": 5},
            "minutes is 5.0, but only the soak suite runs by the clock; give --suite soak too",
        ),
        ({"group_size": 32}, "group_size is 32, but nothing is quantized here; give bits too"),
        (
            {"bits": (4.5,)},
            r"bits is \(4.5,\); allowed: 2, 3, 4, 5, 6, 8",
        ),
        ({"models": 5}, "models is 5; allowed is a text of at least one character, or a list"),
        ({"processes": 0}, "processes is 0; allowed is a whole number from 1 to 100, or None"),
        (
            {"processes": 2, "suite": "soak"},
            "processes is 2, but the soak suite runs in one; leave it out",
        ),
        ({"peers": ("vllm",)}, r"peers is 'vllm'; allowed: mlx-lm, llama.cpp, torch"),
        ({"caches": ("kv5",)}, "cache is 'kv5'; allowed: plain, kv8, kv4, window-N"),
        ({"speculations": ("draft ",)}, "speculation is 'draft '; allowed: none, prompt-lookup"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        BenchmarkOptions(**changes)


def test_trials_are_spread_over_the_processes_and_none_has_fewer_than_two():
    for trials, processes, each in ((9, 3, 3), (7, 3, 3), (5, 1, 5), (5, 4, 2), (6, 6, 2)):
        suite = BenchmarkOptions(trials=trials, processes=processes).chosen()
        assert suite.trials_of_a_process == each
    assert SUITES["quick"].processes == PROCESSES and SUITES["soak"].processes == 1


def test_kinds_become_generation_options():
    assert cache_settings("kv8") == {"kv_bits": 8} and cache_settings("window-256") == {
        "kv_window": 256
    }
    assert speculation_settings("draft my model") == ({}, "my model") and speculation_settings(
        None
    ) == ({}, None)
    point = Point(1, 1, 1, "kv4", "prompt-lookup")
    assert point.settings == {"kv_bits": 4, "prompt_lookup": 3}
    with pytest.raises(OptionError, match="speculation is 'magic'"):
        speculation_settings("magic")


@pytest.fixture
def small(monkeypatch):
    """A published size cut to two narrow layers, so that its random weights are made in no time."""
    config = OpenELMConfig.from_name("270m")
    two = replace(
        config,
        num_transformer_layers=2,
        model_dim=128,
        qkv_multipliers=(1.0, 1.0),
        ffn_multipliers=(0.5, 4.0),
    )
    monkeypatch.setattr(OpenELMConfig, "from_name", lambda size: two)


@pytest.mark.parametrize("bits", [None, 4])
def test_random_weights_are_the_same_each_time_and_as_a_folder(small, tmp_path, bits):
    engine, again = (weights.random_engine("270m", "float32", bits) for _ in range(2))
    assert engine.vocab == 32000 and engine.name == "270m"
    theirs = parameters(again.model)
    assert all(
        mx.array_equal(array, theirs[name]) for name, array in parameters(engine.model).items()
    )
    folder = weights.write_folder(engine, tmp_path / "folder")
    prompt = prompt_ids(engine, 12)
    one, two = OurSession(engine), OurSession(load(folder))
    assert (
        one.generate(prompt, 6).tokens == two.generate(prompt, 6).tokens
        and two.model.vocab == 32000
    )
    made = Weights(engine, None, bits, True, False, tmp_path)
    assert made.bits_per_weight == pytest.approx(32 if bits is None else 5, rel=0.02)
    assert made.dtype == "float32"


def test_random_weights_have_unit_gain(small, tmp_path):
    engine = weights.random_engine("270m", "bfloat16")
    matrix = parameters(engine.model)["transformer.layers.0.ffn.proj_2.weight"].astype(mx.float32)
    assert float(matrix.std().item()) * matrix.shape[1] ** 0.5 == pytest.approx(1, abs=0.02)
    assert Weights(engine, None, None, True, False, tmp_path).dtype == "bfloat16"


def test_a_size_that_was_not_published_is_refused():
    with pytest.raises(ConfigError, match="'2b' is not a published OpenELM size; known: 270m"):
        weights.random_engine("2b")
    with pytest.raises(OpenELMError, match="unknown model '2b'"):
        weights.facts_of("2b", random=False)
    assert weights.facts_of("openelm-tiny", random=False)[1] == 8


def test_weights_that_cannot_be_written_are_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        BenchmarkError, match="cannot write the weights for the peers into .*; free some disk"
    ):
        weights.write_folder(tiny, tmp_path / "file")


def test_narrower_widths_lose_more(tiny):
    text = own_text(tiny.model, [[1]], 48, seed=0)
    engines = [weights.open_engine("openelm-tiny", None, bits)[0] for bits in (6, 3)]
    six, three = (compare(tiny.model, engine.model, [text]) for engine in engines)
    assert 0 < six.mean_kl_divergence < three.mean_kl_divergence
    assert six.top_1_agreement >= three.top_1_agreement


def test_unquantized_weights_are_what_the_quantized_ones_stood_for(tiny):
    engine, _ = weights.open_engine("openelm-tiny", None, None)
    weights.unquantize(engine.model)
    text = mx.array([prompt_ids(tiny, 20)])
    assert mx.allclose(engine.model(text), tiny.model(text), atol=1e-3)
    assert not [name for name in parameters(engine.model) if name.endswith("scales")]


@pytest.mark.parametrize(("slower", "share"), [(1.0, 100.0), (1.25, 80.0), (0.5, 200.0)])
def test_a_step_that_takes_as_long_as_a_copy_of_its_bytes_reaches_the_bound(tiny, slower, share):
    point, copied = Point(64, 64), 8e9
    moved = Weights(tiny, 0.1, 8, False, True, tiny.path).moved(point)
    assert moved == bytes_per_token(tiny.config, "float32", tiny.quantization, 64 + 32)
    rate = copied / sum(moved.values()) / slower
    metrics = {"decode_tokens_per_second": Metric.of([rate] * 5, "tokens/s")}
    row = Row(CASE, metrics, bytes_per_token=moved)
    document = Document("", "", (row,), machine=Machine(copy_bytes_per_second=copied))
    assert completed(document).rows[0].percent_of_bound == pytest.approx(share)


def test_kinds_of_cache_change_the_bytes_and_batches_have_no_bound(tiny):
    plain, packed, window, batch, lookup = (
        Weights(tiny, 0.1, 8, False, True, tiny.path).moved(point)
        for point in (
            Point(512, 64),
            Point(512, 64, cache="kv8"),
            Point(512, 64, cache="window-64"),
            Point(512, 64, 4),
            Point(512, 64, speculation="prompt-lookup"),
        )
    )
    assert plain["kv"] > 3 * packed["kv"] > window["kv"]
    assert batch is None and lookup is None
