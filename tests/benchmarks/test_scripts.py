"""The scripts of the benchmarks, and a tool of the tests, as far as they run in a moment."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from answers import fits, random_schema, time_masks

from openelm_mlx import device
from openelm_mlx.benchmarks.checks import soak
from openelm_mlx.benchmarks.scripts import finetune_speed, kernel_sets, pairs, score_speed, waits
from openelm_mlx.benchmarks.scripts.pairs import CASES, Comparison, in_turns, measure
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.kernels.kernel import ALL


def test_each_side_comes_first_in_every_other_pair() -> None:
    order: list[str] = []
    pairs = list(in_turns(lambda: order.append("a") or "a", lambda: order.append("b") or "b", 4))
    assert pairs == [("a", "b")] * 4
    assert "".join(order) == "baabbaab"


def test_a_comparison_shows_the_ratio_with_its_interval() -> None:
    rates = {"decode": ([20.0, 22.0, 21.0], [10.0, 11.0, 10.5])}
    sides = ({"openblas": True}, {"openblas": False})
    found = Comparison(CASES["tiny"], rates, False, sides)
    assert "tokens DIFFER; OpenBLAS loaded: True and False" in str(found)
    assert "decode: 2.000 x (2.000-2.000, 3 pairs; 21 and 10.5 a second)" in str(found)
    assert found.as_json()["ratios"]["decode"]["middle"] == pytest.approx(2)


def test_a_checkout_without_its_environment_is_refused(tmp_path: Path) -> None:
    message = "does not have .venv/bin/python; install the project there first"
    with pytest.raises(BenchmarkError, match=message):
        measure(tmp_path, tmp_path, CASES["tiny"])


@pytest.mark.needs("llguidance")
def test_masks_of_random_schemas_are_walked_through_and_timed() -> None:
    rng = random.Random(1)
    text = time_masks([random_schema(rng, more=False) for _ in range(3)], 2000, seed=1)
    assert re.match(r"\d+ masks over 2,000 pieces: median [\d.]+ us, p99 \d+ us", text)


def test_the_tool_of_answers_tells_documents_of_a_schema_from_others() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert fits(schema, {"a": 3}) and not fits(schema, {"a": 2}) and not fits(schema, {})
    assert not fits(schema, {"a": 3, "b": 1}) and not fits(schema, {"a": True})


@pytest.mark.parametrize(
    "script",
    [pairs.main, waits.main, soak.main, kernel_sets.main, score_speed.main, finetune_speed.main],
    ids=["pairs", "waits", "soak", "kernel_sets", "score_speed", "finetune_speed"],
)
def test_a_result_that_exists_is_not_replaced(script, tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine.json"
    path.write_text("precious")
    asked = {pairs.main: ["other"], waits.main: ["join"], kernel_sets.main: ["check"]}
    words = asked.get(script, [])
    with pytest.raises(SystemExit, match="2"):
        script([*words, "--json", str(path)])
    assert (
        f"--json {path} exists already; give another name, or remove it\n"
        in capsys.readouterr().err
    )
    assert path.read_text() == "precious"


def test_kernels_are_compared_with_twins_and_a_processor_has_twins_only(tmp_path: Path, capsys):
    path = tmp_path / "exact.json"
    asked = ["exact", "--tokens", "4", "--dtype", "float32", "--json", str(path)]
    assert kernel_sets.main(asked) == 0
    found = json.loads(path.read_text())
    on_cpu = device.kind() == "cpu"
    assert found["logits, twins"]["max"] <= (0 if on_cpu else 0.05)
    assert "greedy tokens as the twins', twins: 4\n" in capsys.readouterr().out
    assert kernel_sets.main(["check"]) == 0
    said = capsys.readouterr()
    assert said.out == ("" if on_cpu else "".join(f'{name}: ""\n' for name in ALL))
    hint = "nothing to compare: only GPUs run kernels of ours\n"
    assert said.err == (hint if on_cpu else "")


@pytest.mark.needs("lm-eval")
def test_log_likelihoods_are_those_of_mlx_lm_in_fewer_passes(nano: Path, tmp_path: Path, capsys):
    path = tmp_path / "result.json"
    words = [str(nano), "--shape", "arc", "--questions", "4", "--pairs", "2", "--json", str(path)]
    assert score_speed.main(words) == 0
    (found,) = json.loads(path.read_text()).values()
    assert found["texts"] == 16 and found["difference"] < 1e-4 and found["greedy"]
    assert found["theirs"]["passes"] == 4 + 16 and found["ours"]["passes"] < 3
    faster = r"faster: [\d.]+ x \([\d.]+-[\d.]+, 2 pairs of wall time; at least 1.5\)"
    assert re.search(faster, capsys.readouterr().out)
