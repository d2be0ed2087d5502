"""Options of an evaluation: what contradicts is refused, and flags say what the fields say."""

from __future__ import annotations

from pathlib import Path

import pytest

from openelm_mlx.cli.options import Parser, add_flags, from_args
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.options import EvaluateOptions


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"suite": "glue"},
            "suite is 'glue'; allowed: zero-shot, openllm, llm360, commonsense, or None",
        ),
        (
            {"suite": "openllm", "tasks": ("piqa",)},
            "tasks is piqa, but the suite openllm has its own; give a suite or tasks",
        ),
        (
            {"suite": "openllm", "shots": 5},
            "shots is 5, but the suite openllm has its own; name its tasks instead of it",
        ),
        ({"shots": 5}, "shots is 5, but no task is named; give tasks too"),
        ({"tasks": "piqa", "shots": -1}, "shots is -1; allowed is a whole number from 0 up"),
        ({"limit": 0}, "limit is 0; allowed is a whole number from 1 up, or None"),
        ({"batch_tokens": 0}, "batch_tokens is 0; allowed is a whole number from 1 up"),
        (
            {"system": "Be brief."},
            "system is Be brief., but there is no chat to put it into; give chat_template too",
        ),
        (
            {"system": "\ud800", "chat_template": True},
            "system is '\\ud800'; allowed is a text in UTF-8",
        ),
    ],
)
def test_what_contradicts_is_refused(given, text):
    with pytest.raises(OptionError) as caught:
        EvaluateOptions(**given)
    assert str(caught.value).startswith(text)


def test_tasks_are_given_with_blanks_or_commas():
    parser = Parser(prog="openelm")
    add_flags(parser, EvaluateOptions)
    words = [
        "--tasks",
        "arc_easy",
        "piqa,sciq",
        "--tasks",
        "boolq,",
        "--limit",
        "5",
        "--include",
        "~/mine",
    ]
    asked = from_args(EvaluateOptions, parser.parse_args(words))
    assert asked.tasks == ("arc_easy", "piqa", "sciq", "boolq")
    assert asked.include == Path("~/mine").expanduser() and asked.limit == 5
    help = " ".join(parser.format_help().split())
    assert "comes with the package; blanks or commas between them" in help
