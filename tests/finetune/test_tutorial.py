"""The tutorial: its data are as their page says, and a model learns from them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

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
