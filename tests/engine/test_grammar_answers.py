"""Answers of the bundled model in an asked form: alone, in a batch, in a conversation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from languages import made

from openelm_mlx import (
    BatchEngine,
    Conversation,
    GenerationOptions,
    batch_generate,
    generate,
    load,
    stream_generate,
)
from openelm_mlx.cli import main
from openelm_mlx.cli.options import Parser, add_flags, from_args
from openelm_mlx.engine import grammar
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import OptionError, PromptError

pytestmark = pytest.mark.needs("llguidance")


def test_flags_of_a_form(tmp_path: Path) -> None:
    parser = Parser(prog="openelm")
    add_flags(parser, GenerationOptions)
    (tmp_path / "schema.json").write_text('{"type": "null"}', encoding="utf-8")

    def read(*words: str) -> GenerationOptions:
        return from_args(GenerationOptions, parser.parse_args(words))

    assert read("--json-schema", str(tmp_path / "schema.json")).json_schema == '{"type": "null"}'
    assert read("--regex", "a,b").regex == "a,b"
    assert read("--choices", "yes,no").choices == ("yes", "no")
    assert read("--choices", "yes, sir", "--choices", "no").choices == ("yes, sir", "no")
    with pytest.raises(PromptError, match="cannot read .*none: No such file or directory"):
        read("--json-schema", str(tmp_path / "none"))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


FORMS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"temperature": 1.0, "seed": 4},
    {"regex": r"\d{3}-[a-z]{2,5}", "temperature": 1.0, "seed": 5},
    {"choices": ("the king", "the queen"), "temperature": 1.0, "seed": 6, "logprobs": 2},
    {"json_schema": SCHEMA, "temperature": 1.0, "seed": 7, "repetition_penalty": 1.1},
]


def has_form(text: str, form: dict[str, Any]) -> bool:
    if "json_schema" in form:
        found = json.loads(text)
        kinds = {key: type(value) for key, value in found.items()}
        fits = kinds == {"name": str, "age": int, "kind": str} and len(found["name"]) <= 12
        return fits and found["kind"] in ("cat", "dog")
    return bool(re.fullmatch(form["regex"], text)) if "regex" in form else text in form["choices"]


@pytest.fixture(scope="module")
def alone(tiny: Engine) -> list[tuple[str, list[int | None]]]:
    """Text and tokens of each form after the same prompt."""
    runs = [
        list(stream_generate(tiny, "There was a cat; as JSON:", max_tokens=48, **form))
        for form in FORMS
    ]
    return [("".join(event.text for event in run), [event.token for event in run]) for run in runs]


def test_answers_have_their_form_and_end(
    tiny: Engine, alone: list[tuple[str, list[int | None]]]
) -> None:
    for form, (text, tokens) in zip(FORMS, alone, strict=True):
        if len(form) > 2 or "json_schema" in form:
            assert has_form(text, form)
            assert tokens[-1] in tiny.config.eos_token_ids
    cut = "".join(
        event.text
        for event in stream_generate(tiny, "There was a cat; as JSON:", max_tokens=4, **FORMS[0])
    )
    assert 0 < len(cut) < len(alone[0][0]) and alone[0][0].startswith(cut)


@pytest.mark.parametrize("drafts", ["none", "lookup and model"])
def test_answers_of_a_batch_are_those_of_each_alone(
    drafts: str, tiny: Engine, nano: Path, alone: list[tuple[str, list[int | None]]]
) -> None:
    batch = BatchEngine(tiny, draft=load(nano) if drafts != "none" else None, admission=5)
    lookup = {"prompt_lookup": 2} if drafts != "none" else {}
    numbers = [
        batch.submit("There was a cat; as JSON:", max_tokens=48, **form, **lookup) for form in FORMS
    ]
    texts, tokens = dict.fromkeys(numbers, ""), {number: [] for number in numbers}
    counts = {}
    while batch.busy:
        for number, event in batch.step():
            texts[number] += event.text
            tokens[number].append(event.token)
            counts[number] = event.stats
    assert [(texts[number], tokens[number]) for number in numbers] == alone
    drafted = [counts[number].drafted_tokens > 0 for number in numbers]
    assert drafted[:2] == [drafts != "none"] * 2


def test_a_form_that_breaks_cuts_its_own_text_only(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 80)
    forms: list[dict[str, Any]] = [{"regex": "[a-z ]{60,200}"}, {}]
    broken, other = batch_generate(
        tiny,
        ["Once upon a time"] * 2,
        options=[GenerationOptions(max_tokens=24, **form) for form in forms],
    )
    assert broken.finish_reason == "length"
    assert 0 < len(broken.tokens) < 24 and broken.tokens[-1] in tiny.config.eos_token_ids
    assert re.fullmatch("[a-z ]{1,59}", broken.text)
    assert other.text == generate(tiny, "Once upon a time", max_tokens=24)


def test_a_conversation_answers_in_the_form(tiny: Engine) -> None:
    talk = Conversation(tiny, options=GenerationOptions(choices=("yes", "no")), seed=3)
    assert "".join(event.text for event in talk.send("Is it late?")) in ("yes", "no")


def test_the_command_line_asks_for_a_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [{"a": 1}]}', encoding="utf-8")
    common = ["generate", "Once upon a time", "--max-tokens", "16"]
    for flags, text in (
        (["--json-schema", str(tmp_path / "schema.json")], '{"a": 1}'),
        (["--regex", "a{3}b"], "aaab"),
        (["--choices", "in the forest"], "in the forest"),
    ):
        assert main([*common, *flags]) == 0
        assert capsys.readouterr().out == f"{text}\n"
    assert main([*common, "--regex", "("]) == 2
    assert capsys.readouterr().err.startswith(
        "openelm: regex is '('; it cannot be followed: unclosed group."
    )


def test_a_chat_sets_the_form(
    tmp_path: Path, stdin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [7]}', encoding="utf-8")
    lines = [
        "/set choices aye,nay",
        "Is it late?",
        "/set choices none",
        "/set regex 4{2}",
        "Is it late?",
    ]
    lines += ["/set regex none", f"/set json_schema {tmp_path / 'schema.json'}", "Is it late?"]
    stdin("\n".join(lines).encode())
    assert main(["chat"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first in ("aye", "nay") and others == ["44", "7"]


def test_without_llguidance_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        OptionError,
        match=r"regex needs the package llguidance; pip install 'openelm-mlx\[grammar\]'",
    ):
        made(regex="an expression that was never seen before")
