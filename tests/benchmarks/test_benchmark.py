"""The result document and its tables; suites and options; random weights and narrower widths."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from bench_document import ratio
from small import random_engine

from openelm_mlx import load
from openelm_mlx.benchmarks.hardware.roofline import bytes_per_token
from openelm_mlx.benchmarks.measure import weights
from openelm_mlx.benchmarks.measure.loaded import Weights, bounded
from openelm_mlx.benchmarks.measure.suites import (
    SUITES,
    BenchmarkOptions,
    Point,
    cache_settings,
    settings,
    speculation_settings,
)
from openelm_mlx.benchmarks.peers.openelm import OurSession, prompt_ids
from openelm_mlx.benchmarks.results import document as results
from openelm_mlx.benchmarks.results import tables
from openelm_mlx.benchmarks.results.document import METRICS, Case, Document, Metric, Row
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import parameters
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError, OpenELMError, OptionError
from openelm_mlx.evaluate.score import compare, own_text
from openelm_mlx.model.config import OpenELMConfig

CASE = Case("openelm-mlx", "openelm-tiny", "float32", 8, 9.02, 64, 64)
SLOWER = Metric.of([50, 51, 49, 50.5, 49.5], "tokens/s")
RATE = Metric.of([100, 104, 98, 101, 99], "tokens/s")


def document(**changes):
    rows = (
        Row(
            CASE,
            {
                "decode_tokens_per_second": RATE,
                "peak_memory_bytes": Metric.of([1.5e7] * 5, "bytes"),
            },
            {"embedding": 10.0, "kv": 5.5},
            200.0,
            50.0,
        ),
        Row(replace(CASE, engine="mlx-lm"), {"decode_tokens_per_second": SLOWER}, agrees=True),
        Row(
            replace(CASE, engine="torch"),
            agrees=False,
            parts_at=7,
            notes=("not timed: token 7 is 3, in openelm-mlx 4",),
        ),
    )
    plain = Document(
        "2026-01-01T00:00:00Z",
        "openelm benchmark --peers mlx-lm,torch",
        rows,
        "quick",
        False,
        {
            "chip": "A chip",
            "cores": 2,
            "memory_bytes": 16 * 2**30,
            "system": "Linux",
            "backend": "cpu",
            "blas": "MLX's own",
        },
        {"mlx": "0.32.4"},
        ("a note",),
        (ratio(rows, "decode_tokens_per_second", 0, 1),),
    )
    return replace(plain, **changes)


def test_median_and_quartiles():
    metric = Metric.of([5, 1, 4, 2, 3], "s")
    assert (metric.median, metric.q1, metric.q3, metric.spread) == (
        3,
        2,
        4,
        2 / 3,
    ) and not metric.higher_is_better
    one = Metric.of([2.5], "tokens/s")
    assert (one.median, one.q1, one.q3) == (2.5, 2.5, 2.5) and one.higher_is_better
    with pytest.raises(BenchmarkError, match="at least one trial"):
        Metric.of([], "s")


def test_a_document_survives_its_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    results.save(document(), file)
    assert results.load(file) == document() and [p.name for p in tmp_path.iterdir()] == [
        "result.json"
    ]
    with pytest.raises(
        BenchmarkError, match="cannot write .*: .*; give a file in a folder that exists"
    ):
        results.save(document(), tmp_path / "none" / "x.json")


def rate(**changes):
    """A change to the second row's only metric."""
    return lambda d: d["rows"][1]["metrics"]["decode_tokens_per_second"].update(changes)


def case(**changes):
    return lambda d: d["rows"][0]["case"].update(changes)


def broken(change):
    data = json.loads(results.to_json(document()))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", "schema is None; this version reads 'openelm-mlx benchmark 1'"),
        (broken(lambda d: d.update(schema="x 9")), "schema is 'x 9'"),
        (broken(lambda d: d.pop("created")), "created is missing"),
        (
            broken(lambda d: d.update(extra=1)),
            "the document has an unknown key 'extra'; known: created",
        ),
        (broken(lambda d: d.update(rows={})), r"rows is \{\}; expected a list"),
        (broken(lambda d: d.update(partial=1)), "partial is 1; expected true or false"),
        (broken(lambda d: d.update(machine=[])), r"machine is \[\]; expected an object"),
        (broken(lambda d: d["rows"].__setitem__(1, 5)), r"rows\[1\] is 5; expected an object"),
        (
            broken(case(prompt_tokens="64")),
            r"rows\[0\].case.prompt_tokens is '64'; expected a whole",
        ),
        (broken(case(batch_size=0)), r"rows\[0\].case.batch_size is 0; allowed is a number from 1"),
        (broken(case(model=None)), "case.model is None; expected a text"),
        (
            broken(
                lambda d: d["rows"][2].update(
                    metrics={"speed": d["rows"][1]["metrics"].popitem()[1]}
                )
            ),
            "speed is no metric of",
        ),
        (broken(rate(unit="s")), "unit is 's'; this metric is in tokens/s"),
        (broken(rate(values=[])), "values is empty"),
        (broken(rate(values=[1, True])), r"values\[1\] is True; expected a fin"),
        (broken(rate(q3=float("nan"))), "q3 is nan; expected a finite"),
        (broken(rate(median=60)), "median is 60.0, but that of its values is 50.0"),
        (
            broken(lambda d: d["rows"][0].update(percent_of_bound=99)),
            r"rows\[0\].percent_of_bound is 99.0, but that of .* 50.0",
        ),
        (
            broken(lambda d: d["rows"][1].update(percent_of_bound=9)),
            r"rows\[1\].percent_of_bound needs a decode rate and a",
        ),
        (
            broken(lambda d: d["machine"].update(bandwidth_bytes_per_second=1.55e6)),
            r"rows\[0\].bound_.* is 200.0, but .* 1000",
        ),
        (
            broken(lambda d: d["ratios"][0].update(ratio=9.99)),
            r"ratios\[0\].ratio is 9.99, but that of its values is 2.0",
        ),
        (
            broken(lambda d: d["ratios"][0].update(low=1.0)),
            r"ratios\[0\].low is 1.0, but that of its values is 1.9",
        ),
        (
            broken(lambda d: d["ratios"][0].update(high=3)),
            r"ratios\[0\].high is 3.0, but that of its values is 2.0",
        ),
        (
            broken(rate(values=[50], q1=50, q3=50)),
            r"ratios\[0\] needs two trials above 0 of either row",
        ),
        (
            broken(lambda d: d["ratios"][0].update(against=9)),
            r"ratios\[0\].against is 9; the document has 3 rows",
        ),
        (
            broken(lambda d: d["ratios"][0].update(against=2)),
            r"ratios\[0\].metric is 'decode_.*', which rows\[2\] has not",
        ),
    ],
)
def test_a_damaged_document_is_refused_by_file_and_place(tmp_path, text, message):
    file = tmp_path / "damaged.json"
    file.write_text(text)
    with pytest.raises(BenchmarkError, match=message) as error:
        results.load(file)
    assert str(file) in str(error.value)
    with pytest.raises(
        BenchmarkError, match="cannot read .*No such file.*openelm benchmark --output"
    ):
        results.load(tmp_path / "none.json")


def test_markdown_fits_80_columns_and_says_all(tmp_path):
    text = tables.markdown(document(partial=True))
    assert max(map(len, text.splitlines())) <= 80
    assert (
        "**partial: A chip, 2 cores, 16 GiB, Linux, cpu backend" in text
        and "`openelm benchmark --peers mlx-lm,torch`" in text
    )
    assert "openelm-tiny, float32, 8-bit weights, prompt of 64 tokens, 64 new tokens" in text
    assert (
        "| engine      | decode t/s | bound | peak MB |" in text
        and "| openelm-mlx |   100 (2%) |  50 % |    15.0 |" in text
    )
    assert "parts at 7" in text and "2.00 (1.98-2.02)" in text and "- a note" in text
    assert "torch openelm-tiny 8-bit 64+64: not timed: token 7 is 3, in" in text
    assert tables.markdown(Document("", "", ())).count("nothing was measured") == 1


def test_wide_tables_are_split_with_their_keys_repeated():
    metrics = {name: Metric.of([1, 2, 3], unit) for name, unit in METRICS.items()}
    rows = tuple(
        Row(replace(CASE, prompt_tokens=n), metrics, percent_of_bound=12.0) for n in (64, 512)
    )
    text = tables.markdown(Document("", "", rows))
    heads = [line for line in text.splitlines() if line.startswith("| engine")]
    assert (
        len(heads) > 1
        and all("prompt" in head for head in heads)
        and any("bound" in head for head in heads)
    )
    assert max(map(len, text.splitlines())) <= 80
    assert tables.COLUMNS.keys() == METRICS.keys()


def test_rows_without_a_figure_are_not_shown_in_that_part_of_the_table():
    rows = [["a", "1", ""], ["b", "2", "3"]]
    first, second = tables.split(tables.Grid(["engine", "one", "x" * 70], rows, 1), 80)
    assert first.rows == [["a", "1"], ["b", "2"]] and second.rows == [["b", "3"]]


def test_the_terminal_shows_the_same_cells():
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    tables.show(document(), console)
    text = console.export_text()
    assert all(cell in text for cells in tables.grid(document()).rows for cell in cells)
    assert max(map(len, text.splitlines())) <= 80


def test_csv_has_one_line_a_case():
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(document()))))
    assert [line["engine"] for line in lines] == ["openelm-mlx", "mlx-lm", "torch"]
    assert (
        float(lines[0]["decode_tokens_per_second"]) == RATE.median
        and lines[0]["decode_tokens_per_second_trials"] == "5"
    )
    assert lines[2]["decode_tokens_per_second"] == "" and lines[2]["parts_at"] == "7"


def test_suites_and_grids():
    assert set(SUITES) == {"quick", "standard", "paper", "context", "bits", "startup", "soak"}
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
        ({"prompt_tokens": (0,)}, "prompt_tokens is 0; allowed is a number from 1 up"),
        ({"bits": (7,)}, "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
        ({"trials": 4}, "trials is 4; allowed is a number from 5 up"),
        ({"minutes": 0}, "minutes is 0.0; allowed is a number above 0"),
        (
            {"minutes": 5},
            "minutes is 5, but only the soak suite runs by the clock; give --suite soak too",
        ),
        ({"group_size": 32}, "group_size is 32, but nothing is quantized here; give bits too"),
        (
            {"bits": (4.5,)},
            r"bits is \(4.5,\); allowed is a whole number, or a list of such numbers",
        ),
        ({"models": 5}, "models is 5; allowed is a text of at least one character, or a list"),
        ({"caches": ("kv5",)}, "cache is 'kv5'; allowed: plain, kv8, kv4, window-N"),
        ({"speculations": ("draft ",)}, "speculation is 'draft '; allowed: none, prompt-lookup"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        BenchmarkOptions(**changes)


def test_kinds_become_generation_options():
    assert cache_settings("kv8") == {"kv_bits": 8} and cache_settings("window-256") == {
        "kv_window": 256
    }
    assert speculation_settings("draft my model") == ({}, "my model") and speculation_settings(
        None
    ) == ({}, None)
    assert settings(Point(1, 1, 1, "kv4", "prompt-lookup")) == {"kv_bits": 4, "prompt_lookup": 3}
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
    monkeypatch.setattr(weights, "published", lambda size: two)


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
    assert weights.bits_per_weight(engine) == pytest.approx(32 if bits is None else 5, rel=0.02)
    assert weights.dtype_name(engine) == "float32"


def test_random_weights_have_unit_gain(small):
    engine = weights.random_engine("270m", "bfloat16")
    matrix = parameters(engine.model)["transformer.layers.0.ffn.proj_2.weight"].astype(mx.float32)
    assert float(matrix.std().item()) * matrix.shape[1] ** 0.5 == pytest.approx(1, abs=0.02)
    assert weights.dtype_name(engine) == "bfloat16"


def test_a_size_that_was_not_published_is_refused():
    with pytest.raises(
        BenchmarkError, match="no size '2b' was published; --random-weights takes one of 270m"
    ):
        weights.random_engine("2b")
    with pytest.raises(OpenELMError, match="unknown model '2b'"):
        weights.facts_of("2b", random=False)
    assert weights.facts_of("openelm-tiny", random=False).bits == 8


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
def test_a_reader_as_fast_as_the_copy_reaches_the_bound_and_a_faster_one_is_explained(
    tiny, slower, share
):
    """A step that takes as long as a copy of its bytes is at 100 %; of a faster one the row says
    so.
    """
    bandwidth = 8e9
    loaded = Weights(tiny, 0.1, 8, random=False, stored=True)
    case = loaded.case(Point(64, 64))
    seconds = (
        slower
        * sum(bytes_per_token(tiny.config, "float32", tiny.quantization, 64 + 32).values())
        / bandwidth
    )
    row = bounded(
        Row(case, {"decode_tokens_per_second": Metric.of([1 / seconds] * 5, "tokens/s")}),
        [loaded],
        bandwidth,
    )
    assert row.percent_of_bound == pytest.approx(share)
    assert sum(row.bytes_per_token.values()) == pytest.approx(seconds * bandwidth / slower)
    assert (
        "200 % of the bound: reading was faster here than the copy it stands on" in row.notes
    ) == (share > 100)


def test_cache_kinds_change_the_bytes_and_batches_have_no_bound(tiny):
    loaded = Weights(tiny, 0.1, 8, random=False, stored=True)
    plain, packed, window, batch, lookup = (
        bounded(Row(loaded.case(point)), [loaded], 1e9)
        for point in (
            Point(512, 64),
            Point(512, 64, cache="kv8"),
            Point(512, 64, cache="window-64"),
            Point(512, 64, 4),
            Point(512, 64, speculation="prompt-lookup"),
        )
    )
    assert (
        plain.bytes_per_token["kv"]
        > 3 * packed.bytes_per_token["kv"]
        > window.bytes_per_token["kv"]
    )
    assert (
        plain.percent_of_bound is None
        and plain.bound_tokens_per_second < packed.bound_tokens_per_second
    )
    assert batch.bytes_per_token is None and lookup.bound_tokens_per_second is None


def test_answers_of_a_plain_cache_part_in_no_way_and_wrong_ones_are_seen(tiny, monkeypatch):
    from openelm_mlx.benchmarks.scripts import kv_loss

    engine = random_engine(tiny, seed=4)
    pieces = [[1, *range(5, 25)], [1, *range(30, 50)]]
    found = kv_loss.partings(engine, pieces, EngineOptions(), 6)
    assert found == {"in chunks of 7": 0, "in a batch": 0, "with prompt lookup": 0}
    monkeypatch.setattr(
        kv_loss,
        "answer",
        lambda engine, prompt, how: [how["prefill_chunk"]] if "prefill_chunk" in how else [],
    )
    assert kv_loss.partings(engine, pieces, EngineOptions(), 6) == dict.fromkeys(found, 2)
