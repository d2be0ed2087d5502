"""Pictures of a result document: that the right ones are drawn, with the figures of its rows."""

from __future__ import annotations

import builtins
from dataclasses import replace

import pytest
from bench_document import NASTY, metric, rich_document, row, sparse_document, startup_document

from openelm_mlx.benchmarks.results.byte_panels import known_config, layer_megabytes
from openelm_mlx.benchmarks.results.document import Case, Document, Machine, Row, completed
from openelm_mlx.benchmarks.results.drawing import DARK, LIGHT, PARTS
from openelm_mlx.benchmarks.results.labels import number, width
from openelm_mlx.benchmarks.results.panels import panels
from openelm_mlx.benchmarks.results.plot import caption, new_figure, panel_svg, style, write_plot
from openelm_mlx.errors import BenchmarkError, OptionError
from openelm_mlx.model.config import expected_tensors

pytestmark = pytest.mark.needs("matplotlib")


def axes_of(panel):
    with style(LIGHT):
        ax = new_figure(4, 3).add_subplot()
        panel.draw(ax, LIGHT)
    return ax


def named(document: Document, kind: str):
    return next(panel for panel in panels(document) if panel.kind == kind)


def test_panels_are_those_that_the_rows_can_fill():
    kinds = [(panel.kind, panel.model) for panel in panels(rich_document())]
    tiny = ["speed", "parts", "layers", "context", "loss", "settings"]
    large = ["speed", "parts", "layers"]
    expected = [(kind, "openelm-tiny") for kind in tiny] + [
        (kind, "1.1b (random weights)") for kind in large
    ]
    assert kinds == [*expected, ("ratios", "")]
    assert [panel.kind for panel in panels(sparse_document())] == ["speed"]
    assert panels(replace(rich_document(), rows=(), ratios=())) == []


def test_speed_holds_medians_quartiles_and_the_bound():
    document = rich_document()
    lines = axes_of(named(document, "speed")).get_lines()
    shown = {
        label: sorted(y for line in lines if line.get_label() == label for y in line.get_ydata())
        for label in ("openelm-mlx", "mlx-lm", "memory bound")
    }
    assert shown["openelm-mlx"] == pytest.approx([210, 480, 610, 640]) and shown[
        "mlx-lm"
    ] == pytest.approx([150, 560])
    assert shown["memory bound"][::2] == pytest.approx(
        sorted(row.bound_tokens_per_second for row in document.rows[:4])
    )
    spans = [
        tuple(line.get_ydata())
        for line in lines
        if len(line.get_ydata()) == 2 and line.get_label() != "memory bound"
    ]
    first = document.rows[0].metrics["decode_tokens_per_second"]
    assert spans[0] == (first.q1, first.q3)
    assert "49 % of the memory bound" in named(document, "speed").words


def test_bytes_of_a_bar_add_up_and_stand_in_one_order():
    document = rich_document()
    ax = axes_of(named(document, "parts"))
    widths = [label.get_text() for label in ax.get_yticklabels()]
    assert widths == ["float32", "8-bit", "4-bit", "3-bit"]
    top = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == 0]
    assert sum(bar.get_width() for bar in top) * 1e6 == pytest.approx(
        sum(document.rows[0].bytes_per_token.values())
    )
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == list(PARTS)


@pytest.mark.parametrize("model", ["270m", "3b", "openelm-tiny"])
def test_bytes_by_layer_are_those_of_the_tensors(model):
    """Shared out by shape, against the sizes of the tensors themselves."""
    config = known_config(model)
    sizes = {"attention": 0.0, "ffn": 0.0, "kv": 1e6}
    by_hand = {part: [0.0] * config.num_transformer_layers for part in ("attention", "ffn")}
    for name, shape in expected_tensors(config).items():
        if ".layers." in name and len(shape) == 2:
            part = "attention" if ".attn." in name else "ffn"
            sizes[part] += 2 * shape[0] * shape[1]
            by_hand[part][int(name.split(".")[2])] += 2 * shape[0] * shape[1] / 1e6
    found = layer_megabytes(config, sizes)
    assert found["attention"] == pytest.approx(by_hand["attention"]) and found[
        "ffn"
    ] == pytest.approx(by_hand["ffn"])
    assert sum(found["kv"]) == pytest.approx(1)
    assert known_config(NASTY) is None and known_config("/etc") is None


def test_context_and_loss_and_settings_and_ratios_hold_their_figures():
    document = rich_document()
    line = axes_of(named(document, "context")).get_lines()[0]
    assert list(line.get_xdata()) == [64, 256, 512, 960] and line.get_ydata()[-1] == pytest.approx(
        370
    )
    dots = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes_of(named(document, "loss")).get_lines()
    ]
    assert dots == [
        (8.5, 2e-4),
        (4.5, 3.1e-2),
        (3.5, 0.22),
    ]  # full precision has no loss and no dot
    labels = [label.get_text() for label in axes_of(named(document, "settings")).get_yticklabels()]
    assert labels == ["plain", "batch 8", "quantized 8-bit cache", "prompt-lookup"]
    marks = [
        line.get_label()
        for line in axes_of(named(document, "ratios")).get_lines()
        if len(line.get_xdata()) == 1
    ]
    assert marks == [
        "better",
        "better",
        "worse",
        "no difference",
    ]  # a longer time to the first token is worse


def test_first_tokens_of_new_and_warm_processes_stand_beside_each_other():
    ax = axes_of(named(startup_document(), "first"))
    single = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    dots = {(line.get_label(), round(line.get_ydata()[0])): line.get_xdata()[0] for line in single}
    assert dots == pytest.approx(
        {
            ("openelm-mlx", 0): 210,
            ("mlx-lm", 0): 1400,
            ("openelm-mlx", 1): 11,
            ("mlx-lm", 1): 19,
            ("openelm-mlx", 2): 4,
        }
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "new process",
        "warm",
        "reused prefix",
    ]


def test_of_many_ratios_those_of_decode_are_drawn():
    document = rich_document()
    ratios = document.ratios * 5
    panel = named(replace(document, ratios=ratios), "ratios")
    assert panel.words.count("decode") == 10 and "prefill" not in panel.words
    ticks = axes_of(named(document, "ratios")).get_xticks()
    assert any(tick == pytest.approx(1) for tick in ticks)


def test_a_ratio_whose_interval_reaches_nothing_is_drawn_all_the_same():
    document = rich_document()
    wide = replace(document.ratios[0], low=-0.5, high=3.0)
    assert panel_svg(named(replace(document, ratios=(wide,)), "ratios"), LIGHT).startswith(b"<?xml")
    equal = replace(document.ratios[0], ratio=1.0, low=1.0, high=1.0)
    assert panel_svg(named(replace(document, ratios=(equal,)), "ratios"), LIGHT).startswith(
        b"<?xml"
    )


def test_lines_far_below_their_bound_are_drawn_on_a_logarithmic_axis():
    rows = [row(bits=4, prompt=prompt, decode=3.0) for prompt in (64, 256, 512)]
    slow = completed(replace(rich_document(), rows=tuple(rows), ratios=()))
    ax = axes_of(named(slow, "context"))
    assert ax.get_yscale() == "log" and "log scale" in ax.get_ylabel()
    low, high = ax.get_ylim()
    assert low < 3.0 and high > slow.rows[0].bound_tokens_per_second


def test_widths_and_numbers_in_words():
    case = Case("openelm-mlx", "270m", "bfloat16", None, None, 1, 1)
    assert width(case) == "bfloat16" and width(replace(case, bits=4)) == "4-bit"
    assert width(replace(case, bits_per_weight=4.62)) == "4.62 bits/weight"
    assert width(replace(case, bits_per_weight=16.0)) == "bfloat16"
    assert [number(value) for value in (0, 0.25, 12.345, 1234.5, 2e-5)] == [
        "0",
        "0.25",
        "12.3",
        "1,234",
        "2.0e-05",
    ]


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_picture_replaces_an_older_file_and_leaves_nothing_beside_it(name, magic, tmp_path):
    (tmp_path / name).write_text("old")
    write_plot(rich_document(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic) and [
        path.name for path in tmp_path.iterdir()
    ] == [name]


def test_names_are_text_and_never_mathematics(tmp_path):
    """`$x^2$&` in a name: no formula, no broken XML."""
    from xml.etree import ElementTree

    write_plot(sparse_document(), tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")
    svg = panel_svg(
        panels(replace(rich_document(), rows=(row(engine=NASTY), row()), ratios=()))[0], DARK
    )
    ElementTree.fromstring(svg)


def test_the_caption_tells_machine_date_and_that_it_is_no_mac():
    text = caption(rich_document())
    assert text.startswith(
        "Linux CPU result, not Apple silicon: Made-up chip, 24 GB, Linux 6.1 · openelm-mlx 0.1.0"
    )
    assert "2026-01-02" in text
    mac = replace(rich_document(), machine=Machine(chip="Some Mac", system="Darwin"), partial=True)
    assert caption(mac).startswith("Some Mac, Darwin") and "PARTIAL RUN" in caption(mac)


def test_what_cannot_be_drawn_or_written_says_why(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"--plot .*a\.pdf: a picture ends in \.png or \.svg"):
        write_plot(rich_document(), tmp_path / "a.pdf")
    with pytest.raises(BenchmarkError, match="nothing to draw"):
        write_plot(replace(rich_document(), rows=(), ratios=()), tmp_path / "a.png")
    with pytest.raises(
        BenchmarkError, match="cannot write .*; give a file in a folder that exists"
    ):
        write_plot(sparse_document(), tmp_path / "none" / "a.png")
    monkeypatch.setattr(builtins, "__import__", without_matplotlib(builtins.__import__))
    with pytest.raises(
        BenchmarkError, match=r"pictures need matplotlib: `pip install 'openelm-mlx\[plot\]'`"
    ):
        write_plot(sparse_document(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def without_matplotlib(real):
    def guarded(name, *more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *more)

    return guarded


def test_rows_without_times_draw_their_bytes_only():
    case = Case("openelm-mlx", "270m", "bfloat16", 4, 4.5, 64, 64)
    only = Row(
        case,
        bytes_per_token={"ffn": 2e6, "attention": 1e6},
        metrics={"load_seconds": metric(1, "s")},
    )
    document = replace(rich_document(), rows=(only,), ratios=())
    assert [panel.kind for panel in panels(document)] == ["parts", "layers"]
