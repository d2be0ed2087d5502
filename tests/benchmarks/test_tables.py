"""A result document in words: the table for a terminal, as Markdown and as CSV, and short names."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from bench_document import CASE, DECODE, RATE, rich_document, small_document
from rich.console import Console

from openelm_mlx.benchmarks.results import tables
from openelm_mlx.benchmarks.results.compare import merge
from openelm_mlx.benchmarks.results.document import METRICS, Case, Document, Machine, Metric, Row


def test_markdown_says_all():
    text = tables.markdown(small_document(partial=True))
    assert text.startswith(
        "**partial: A chip, 2 cores, 16 GiB, Linux, cpu backend, BLAS: MLX's own,"
    )
    assert "`openelm benchmark --peers mlx-lm,torch`" in text
    assert "openelm-tiny, float32, 8-bit weights, prompt of 64 tokens, 64 new tokens" in text
    assert "| engine      | decode t/s | bound | peak MB |" in text
    assert "| ----------- | ---------: | ----: | ------: |" in text
    assert "| openelm-mlx |   100 (2%) |  50 % |    15.0 |" in text
    assert "parts at 7" in text and "| mlx-lm        | 2.01 (1.99-2.03) |" in text
    assert (
        "- a note\n" in text
        and "- bound: share of the rate at which a copy moves the bytes" in text
    )
    assert "torch openelm-tiny 8-bit 64+64: not timed: token 7 is 3, in" in text
    assert tables.markdown(Document("", "", ())).count("no model was timed") == 1


def test_every_metric_has_a_column_and_every_fact_that_differs():
    metrics = {name: Metric.of([1, 2, 3], unit) for name, unit in METRICS.items()}
    rows = [Row(replace(CASE, prompt_tokens=n), metrics, percent_of_bound=12.0) for n in (64, 2048)]
    grid = tables.grid(rows)
    assert grid.keys == 2 and grid.head[:2] == ["engine", "prompt"]
    assert [row[1] for row in grid.rows] == ["64", "2,048"]
    assert tables.COLUMNS.keys() == METRICS.keys()
    assert len(grid.head) == 2 + len(METRICS) + 1
    assert grid.head[grid.head.index("bound") - 1] == "decode t/s"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_the_same_cells_at_any_width(width):
    console = Console(width=width, file=io.StringIO(), record=True)
    tables.show(small_document(), console)
    text = console.export_text()
    words = set(text.split())
    cells = [cell for row in tables.grid(small_document().rows).rows for cell in row]
    assert {word for cell in cells for word in cell.split()} <= words
    assert max(map(len, text.splitlines())) <= width


def test_a_terminal_of_80_columns_holds_the_quick_suite():
    """All metrics that it measures, beside the longest names."""
    names = [
        name for name in METRICS if name not in ("startup_seconds", "kl_mean", "top_1_agreement")
    ]
    values = {"tokens/s": 1200, "s": 0.3, "bytes": 2e7, "tokens": 1.5}
    metrics = {
        name: Metric.of([0.9 * values[unit], values[unit], 1.1 * values[unit]], unit)
        for name, unit in METRICS.items()
        if name in names
    }
    rows = tuple(
        Row(replace(CASE, speculation=kind), metrics, percent_of_bound=4.0)
        for kind in (None, "prompt-lookup")
    )
    console = Console(width=80, file=io.StringIO(), record=True)
    tables.show(Document("", "", rows), console)
    text = console.export_text()
    assert "openelm-mlx prompt-lookup" in text and "…" not in text


def test_processes_and_the_commit_are_said():
    document = merge([small_document()] * 3)
    text = tables.markdown(replace(document, commit="0123456789abcdef", dirty=True))
    assert "95 % interval over the processes in brackets" in text
    assert "mlx 0.32.4, commit 0123456789ab with changes**" in text
    assert "over the trials of one process" in tables.markdown(small_document())


def test_csv_has_one_line_a_case():
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(small_document()))))
    assert [line["engine"] for line in lines] == ["openelm-mlx", "mlx-lm", "torch"]
    assert float(lines[0][DECODE]) == RATE.median and lines[0][f"{DECODE}_trials"] == "5"
    assert lines[0][f"{DECODE}_processes"] == "1" and float(lines[0][f"{DECODE}_q1"]) == RATE.q1
    assert lines[0]["percent_of_bound"] == "50.0"
    assert lines[2][DECODE] == lines[2][f"{DECODE}_q1"] == "" and lines[2]["parts_at"] == "7"
    assert tables.csv_text(Document("", "", ())).startswith("engine,model")


def test_weights_settings_and_numbers_in_words():
    case = Case("openelm-mlx", "270m", "bfloat16", None, None, 1, 1)
    assert tables.weights(case) == "bfloat16" and tables.weights(replace(case, bits=4)) == "4-bit"
    assert tables.weights(replace(case, bits_per_weight=4.62)) == "4.62 bits/weight"
    assert tables.weights(replace(case, bits_per_weight=16.0)) == "bfloat16"
    assert tables.setting(case) == "plain"
    every = replace(case, batch_size=4, cache="kv8", speculation="prompt-lookup")
    assert tables.setting(every) == "batch 4, kv8, prompt-lookup"
    numbers = [0, 0.25, 0.0123, 12.345, 1234.5, 2e-5, -3.21]
    told = ["0.0000", "0.250", "0.0123", "12.3", "1,234", "2.00e-05", "-3.21"]
    assert [tables.digits(value) for value in numbers] == told


def test_the_machine_is_one_line_with_its_exact_processor():
    machine = Machine("AMD EPYC", "family 25", "x86_64", 2, system="Linux", backend="cpu")
    assert tables.machine_line(machine) == "AMD EPYC (family 25), 2 cores, Linux, cpu backend"
    assert tables.not_a_mac(machine) == "Linux CPU result, not Apple silicon"
    gpu = Machine(system="Linux", backend="cuda")
    assert tables.not_a_mac(gpu) == "NVIDIA GPU result, not Apple silicon"
    assert tables.not_a_mac(Machine(system="Darwin")) == tables.not_a_mac(Machine()) == ""
    assert tables.machine_line(Machine()) == ""
    assert tables.machine_line(Machine(kernels="add_rms_norm, sample")) == (
        "kernels: add_rms_norm, sample"
    )


def test_a_verdict_knows_what_is_better():
    document = rich_document()
    found = [tables.verdict(document, number) for number in range(4)]
    assert found == ["better", "better", "worse", "no difference"]
