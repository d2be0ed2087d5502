"""The picture of a report: that the figures of its cells are where they belong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from known_scores import Known, stated
from optional import hide

from openelm_mlx.drawing import LIGHT, new_figure, style
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.picture import APPLES, draw, figure, write_picture
from openelm_mlx.evaluate.report import Subject, report
from openelm_mlx.evaluate.suites import SUITES, TASKS, figures

pytestmark = pytest.mark.needs("matplotlib")
ROW = "OpenELM-450M-Instruct"


def made(name: str, row: str | None = ROW, suite: str = "openllm"):
    right = {"acc": 0.25, "acc_norm": 0.75, "pct_stereotype": 0.5}
    tasks = {
        task: Known(shots, {metric: right[metric] for metric in TASKS[task].metrics}, 400)
        for task, shots in SUITES[suite].shots.items()
    }
    return report(stated(tasks), Subject(name, row), suite)


def drawn(*reports):
    with style(LIGHT):
        ax = new_figure(4, 3).add_subplot()
        draw(ax, LIGHT, reports)
    return ax


def test_every_score_has_its_mark_with_two_standard_errors_and_apples_figures_theirs():
    found = made("m")
    ax = drawn(found)
    titles = [cell.title for cell in found.cells]
    (apples,) = [line for line in ax.get_lines() if line.get_label() == APPLES]
    table = figures("openllm", ROW)
    assert list(apples.get_xdata()) == [table[cell.task] for cell in found.cells]
    assert list(apples.get_ydata()) == list(range(len(titles)))
    assert [label.get_text() for label in ax.get_yticklabels()] == titles
    marks = {bars.get_label(): bars for bars in ax.containers}
    assert set(marks) == {"acc", "acc_norm", "pct_stereotype"}
    (score,) = found.cells[1].scores  # CrowS-Pairs
    points, _, (bars,) = marks["pct_stereotype"]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([50.0], [1.0])
    (left, right) = bars.get_segments()[0][:, 0]
    assert (left, right) == pytest.approx((50 - 2 * score.stderr, 50 + 2 * score.stderr))


def test_two_models_have_two_colours_and_one_shape_for_each_metric():
    ax = drawn(made("a/one", suite="zero-shot"), made("two", None, "zero-shot"))
    looks = {
        bars.get_label(): (bars[0].get_color(), bars[0].get_marker()) for bars in ax.containers
    }
    assert set(looks) == {"acc, one", "acc_norm, one", "acc, two", "acc_norm, two"}
    assert len({colour for colour, _ in looks.values()}) == 2
    assert looks["acc, one"][0] == looks["acc_norm, one"][0] != looks["acc, two"][0]
    assert looks["acc, one"][1] == looks["acc, two"][1] != looks["acc_norm, one"][1]
    twice = drawn(made("one", suite="zero-shot"), made("one", suite="zero-shot")).containers
    assert {"acc, one (1)", "acc, one (2)"} < {bars.get_label() for bars in twice}


def test_titles_and_the_names_of_marks_are_whole():
    long = "450m-instruct at 4 bits"
    with style(LIGHT):
        drawn = figure([made(long), made("450m-instruct")])
    (legend,) = drawn.legends
    texts = [text.get_text() for text in legend.get_texts()]
    metrics = ("acc", "pct_stereotype", "acc_norm")
    assert texts[0] == APPLES and legend._ncols == 2
    assert {f"{metric}, {long}" for metric in metrics} == set(texts[1:4])
    lines = drawn.get_suptitle().splitlines()
    assert " ".join(lines).endswith(f"Apple's {ROW}, against 450m-instruct")
    assert len(lines) == 2 and max(map(len, lines)) <= 72


def test_files_are_what_their_names_say(tmp_path):
    found = [made("a <model> of $mine$", suite="llm360")]
    assert write_picture(found, tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert write_picture(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_share_is_not_drawn_and_matplotlib_is_asked_for(tmp_path, monkeypatch):
    results = stated({"text": Known(0, {"acc": 0.5}, 10)})
    results["results"]["text"] = {"perplexity,none": 12.5, "perplexity_stderr,none": 1.0}
    assert write_picture([report(results, Subject("m"))], tmp_path / "a.png") is False
    hide(monkeypatch, "matplotlib")
    with pytest.raises(OptionError, match="pictures need matplotlib: `pip install 'openelm-mlx"):
        write_picture([made("m")], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
