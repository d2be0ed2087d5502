"""Tables of a result document: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from bench_document import CASE, RATE, small_document

from openelm_mlx.benchmarks.results import tables
from openelm_mlx.benchmarks.results.document import METRICS, Document, Metric, Row


def test_markdown_fits_80_columns_and_says_all(tmp_path):
    text = tables.markdown(small_document(partial=True))
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
    assert "parts at 7" in text and "2.01 (1.99-2.03)" in text and "- a note" in text
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
    tables.show(small_document(), console)
    text = console.export_text()
    assert all(cell in text for cells in tables.grid(small_document()).rows for cell in cells)
    assert max(map(len, text.splitlines())) <= 80


def test_csv_has_one_line_a_case():
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(small_document()))))
    assert [line["engine"] for line in lines] == ["openelm-mlx", "mlx-lm", "torch"]
    assert (
        float(lines[0]["decode_tokens_per_second"]) == RATE.median
        and lines[0]["decode_tokens_per_second_trials"] == "5"
    )
    assert lines[2]["decode_tokens_per_second"] == "" and lines[2]["parts_at"] == "7"
