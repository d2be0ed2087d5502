"""Pictures of a result document: that the right ones are drawn, with the figures of its rows."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from bench_document import (
    DECODE,
    NASTY,
    metric,
    rich_document,
    row,
    sparse_document,
    startup_document,
)
from optional import hide

from openelm_mlx.benchmarks.results.document import Document, Machine, Metric, completed
from openelm_mlx.benchmarks.results.plots import COPY, pictures, svg, write_plot
from openelm_mlx.benchmarks.results.tables import caption
from openelm_mlx.drawing import DARK, LIGHT, new_figure, style
from openelm_mlx.errors import BenchmarkError, OptionError

pytestmark = pytest.mark.needs("matplotlib")


def axes_of(picture):
    with style(LIGHT):
        ax = new_figure(4, 3).add_subplot()
        picture.draw(ax, LIGHT)
    return ax


def named(document: Document, kind: str):
    return next(picture for picture in pictures(document) if picture.kind == kind)


def points(ax, label: str) -> list[tuple[float, float]]:
    """Return the dots of the lines with a label."""
    lines = [line for line in ax.get_lines() if line.get_label() == label]
    return [tuple(at) for line in lines for at in zip(*line.get_data(), strict=True)]


def segments(ax) -> list[tuple[float, float]]:
    """Return the ends of all vertical lines."""
    paths = [path for found in ax.collections for path in found.get_segments()]
    return [(path[0][1], path[1][1]) for path in paths if path[0][0] == path[1][0]]


def test_pictures_are_those_that_the_rows_can_fill():
    kinds = [(picture.kind, picture.model) for picture in pictures(rich_document())]
    expected = [(kind, "openelm-tiny") for kind in ("speed", "context", "loss")]
    assert kinds == [*expected, ("speed", "1.1b (random weights)"), ("ratios", "")]
    assert [picture.kind for picture in pictures(sparse_document())] == ["speed"]
    assert pictures(replace(rich_document(), rows=(), ratios=())) == []
    assert pictures(startup_document()) == []


def test_speed_holds_medians_quartiles_and_the_rate_of_a_copy():
    document = rich_document()
    ax = axes_of(named(document, "speed"))
    ours, theirs = (sorted(y for _, y in points(ax, name)) for name in ("openelm-mlx", "mlx-lm"))
    assert ours == pytest.approx([210, 480, 610, 640]) and theirs == pytest.approx([150, 560])
    first = document.rows[0].metrics[DECODE]
    assert (first.q1, first.q3) in segments(ax)
    bars = [found for found in ax.collections if found.get_label() == COPY]
    assert sorted(bar.get_segments()[0][0][1] for bar in bars) == pytest.approx(
        sorted(row.bound_tokens_per_second for row in document.rows[:4])
    )
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "float32",
        "8-bit",
        "4-bit",
        "3-bit",
    ]
    assert {text.get_text() for text in ax.texts} == {"49 %", "32 %", "23 %", "19 %"}
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == [
        "openelm-mlx",
        "mlx-lm",
        COPY,
    ]


def test_context_loss_and_ratios_hold_their_figures():
    document = rich_document()
    line = points(axes_of(named(document, "context")), "openelm-mlx, 4-bit")
    assert [x for x, _ in line] == [64, 256, 512, 960] and line[-1][1] == pytest.approx(370)
    ax = axes_of(named(document, "loss"))
    dots = [tuple(at[0] for at in line.get_data()) for line in ax.get_lines()]
    assert dots == [(8.5, 2e-4), (4.5, 3.1e-2), (3.5, 0.22)]  # full precision has none
    ax = axes_of(named(document, "ratios"))
    # a longer time to the first token is worse
    assert {label: [y for _, y in points(ax, label)] for label in ("better", "worse")} == {
        "better": [0, 1],
        "worse": [2],
    }
    assert points(ax, "no difference") == [(document.ratios[3].ratio, 3)]
    assert [text.get_text() for text in ax.get_yticklabels()][:2] == [
        "decode over mlx-lm\nfloat32",
        "decode over mlx-lm\n4-bit",
    ]


def test_cases_that_stand_in_one_place_are_all_drawn():
    rows = tuple(
        row(bits=4, decode=rate, bits_per_weight=bpw) for rate, bpw in ((9, 4.5), (8, 5.0))
    )
    ax = axes_of(named(completed(replace(rich_document(), rows=rows, ratios=())), "speed"))
    assert sorted(points(ax, "openelm-mlx")) == [(0, 8), (0, 9)]


def test_of_many_ratios_those_of_decode_are_drawn():
    document = rich_document()
    picture = named(replace(document, ratios=document.ratios * 5), "ratios")
    labels = [text.get_text() for text in axes_of(picture).get_yticklabels()]
    assert len(labels) == 10 and all(label.startswith("decode") for label in labels)
    ticks = axes_of(named(document, "ratios")).get_xticks()
    assert any(tick == pytest.approx(1) for tick in ticks)


@pytest.mark.parametrize(("low", "middle", "high"), [(1e-6, 1.5, 3e6), (1.0, 1.0, 1.0)])
def test_intervals_of_any_width_are_drawn(low, middle, high):
    document = rich_document()
    ratio = replace(document.ratios[0], ratio=middle, low=low, high=high)
    picture = named(replace(document, ratios=(ratio,)), "ratios")
    assert svg(picture, LIGHT).startswith(b"<?xml")


def test_lines_far_below_their_bound_are_drawn_on_a_logarithmic_axis():
    rows = tuple(row(bits=4, prompt=prompt, decode=3.0) for prompt in (64, 256, 512))
    slow = completed(replace(rich_document(), rows=rows, ratios=()))
    ax = axes_of(named(slow, "context"))
    assert ax.get_yscale() == "log" and "log scale" in ax.get_ylabel()
    low, high = ax.get_ylim()
    assert low < 3.0 and high > slow.rows[0].bound_tokens_per_second


def test_a_median_of_processes_beside_the_quartiles_of_trials_is_drawn():
    apart = Metric.of_processes([[1.0] * 9, [5.0], [6.0]], "tokens/s")
    assert apart.median > apart.q3
    rows = (replace(row(), metrics={DECODE: apart}),)
    assert svg(pictures(replace(rich_document(), rows=rows, ratios=()))[0], LIGHT)


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_a_picture_replaces_an_older_file_and_leaves_nothing_beside_it(name, magic, tmp_path):
    (tmp_path / name).write_text("old")
    write_plot(rich_document(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_are_text_and_never_mathematics(tmp_path):
    """`$x^2$&` in a name: no formula, whose x would be oblique, and no broken XML."""
    write_plot(sparse_document(), tmp_path / "a.svg")
    named = replace(rich_document(), rows=(row(engine=NASTY[-9:]), row()), ratios=())
    for picture in ((tmp_path / "a.svg").read_bytes(), svg(pictures(named)[0], DARK)):
        ids = [part.get("id", "") for part in ElementTree.fromstring(picture).iter()]
        assert any("DejaVuSans" in one for one in ids) and not any("Oblique" in one for one in ids)


def test_the_caption_tells_machine_date_and_that_it_is_no_mac():
    machine, versions, marks = caption(rich_document()).splitlines()
    assert machine == (
        "Linux CPU result, not Apple silicon · Made-up chip, 2 cores, 24 GiB, Linux 6.1, "
        "cpu backend, BLAS: MLX's own"
    )
    assert versions.startswith("openelm-mlx 0.1.0, mlx 0.32.4") and "2026-01-02" in marks
    mac = Machine(chip="Some Mac", system="Darwin")
    told = caption(replace(rich_document(), machine=mac, partial=True))
    assert told.startswith("Some Mac, Darwin\n") and "PARTIAL RUN" in told


def test_what_cannot_be_drawn_or_written_says_why(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"a\.pdf: give a name that ends in \.png or \.svg"):
        write_plot(rich_document(), tmp_path / "a.pdf")
    with pytest.raises(BenchmarkError, match="nothing to draw: no row of this result has a decode"):
        write_plot(replace(rich_document(), rows=(), ratios=()), tmp_path / "a.png")
    with pytest.raises(BenchmarkError, match="cannot write .*; give a file in a folder that exist"):
        write_plot(sparse_document(), tmp_path / "none" / "a.png")
    hide(monkeypatch, "matplotlib")
    with pytest.raises(OptionError, match="pictures need matplotlib: `pip install 'openelm-mlx"):
        write_plot(sparse_document(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_rows_without_times_draw_nothing():
    rows = (replace(row(), metrics={"load_seconds": metric(1, "s")}),)
    assert pictures(replace(rich_document(), rows=rows, ratios=())) == []


def test_engines_keep_their_colour_and_three_prompts_make_a_line():
    peer = [row(bits=4, prompt=n, decode=90.0, engine="mlx-lm") for n in (8, 64, 256, 512)]
    ours = [row(bits=4, prompt=n, decode=99.0) for n in (64, 256, 512)]
    document = completed(replace(rich_document(), rows=(*peer, *ours), ratios=()))
    for kind, label in (("speed", "mlx-lm"), ("context", "mlx-lm, 4-bit")):
        lines = axes_of(named(document, kind)).get_lines()
        colours = {line.get_color() for line in lines if line.get_label() == label}
        assert colours == {LIGHT.engines[1]}
    same = [row(bits=4, decode=9.0), row(bits=4, decode=8.0), row(bits=4, prompt=65, decode=7.0)]
    assert [p.kind for p in pictures(replace(document, rows=tuple(same)))] == ["speed"]
