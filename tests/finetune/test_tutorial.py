"""The tutorial: its data are as their page says, and a model learns from them."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from openelm_mlx.cli import main

ISLAND = Path(__file__).parents[2] / "examples" / "island"
FACTS, WAYS = 40, 5


def records(name: str) -> list[dict[str, Any]]:
    lines = (ISLAND / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def says(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None


def test_every_fact_is_asked_in_seven_ways_of_which_five_are_trained():
    train, valid, test = (records(name) for name in ("train", "valid", "test"))
    assert [len(train), len(valid), len(test)] == [FACTS * WAYS, FACTS, FACTS]
    for number, record in enumerate(test):
        fact = [*train[WAYS * number : WAYS * (number + 1)], valid[number], record]
        assert [says(one["completion"], record["word"]) for one in fact] == [True] * 7
        assert not any(says(one["prompt"], record["word"]) for one in fact), record


def test_no_question_occurs_twice_and_no_word_is_the_answer_to_two_facts():
    asked = Counter(one["prompt"] for name in ("train", "valid", "test") for one in records(name))
    words = Counter(one["word"].lower() for one in records("test"))
    assert [one for one, count in (asked + words).items() if count > 1] == []


def right(capsys, monkeypatch, *flags: str) -> str:
    """Return the last line of what `ask.py` says about its first question."""
    monkeypatch.setattr(sys, "argv", ["ask.py", "--limit", "1", *flags])
    runpy.run_path(str(ISLAND / "ask.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()[-1]


def test_a_model_learns_a_fact_that_it_is_asked_in_other_words(tmp_path, capsys, monkeypatch):
    """The tutorial on the first fact alone, in six steps."""
    lines = (ISLAND / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "nell.jsonl").write_text("".join(lines[:WAYS]), encoding="utf-8")
    assert right(capsys, monkeypatch) == "0 of 1 right"
    command = ["finetune", "openelm-tiny", str(tmp_path / "nell.jsonl")]
    command += ["--output", str(tmp_path / "nell"), "--validation-share", "0"]
    command += ["--steps", "6", "--learning-rate", "0.01", "--length", "128", "--batch", "2"]
    assert main(command) == 0
    assert right(capsys, monkeypatch, "--adapter", str(tmp_path / "nell")) == "1 of 1 right"
