"""`openelm generate`: what its prompt is, and what it says of the text."""

from __future__ import annotations

import io
import json
import os
import pty
import sys

from openelm_mlx.cli import generate, main
from openelm_mlx.cli.display import Waiting


def generated(capsys, *arguments: str) -> dict:
    assert main(["generate", *arguments, "--json", "--max-tokens", "2"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_line_break_that_ends_a_pipe_is_no_part_of_the_prompt(stdin, capsys):
    for data, flags, prompt in (
        (b"Once upon\n", [], "Once upon"),
        (b"Once upon\n\n", [], "Once upon\n"),
        (b"Once upon\r\n", [], "Once upon"),
        (b"Once upon\n", ["--keep-newline"], "Once upon\n"),
        ("caf\u00e9 \u72ac".encode(), [], "caf\u00e9 \u72ac"),  # UTF-8 whatever the locale
    ):
        stdin(data)
        assert generated(capsys, "-", *flags)["prompt"] == prompt


def test_a_trailing_space_gets_a_hint_on_stderr(capsys):
    assert main(["generate", "Once upon ", "--max-tokens", "1"]) == 0
    assert "ends with a space" in capsys.readouterr().err
    assert main(["generate", "Once upon", "--max-tokens", "1"]) == 0
    assert "space" not in capsys.readouterr().err


def test_a_terminal_of_another_encoding_shows_question_marks(monkeypatch):
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii)
    assert main(["generate", "caf\u00e9", "--max-tokens", "1", "--json"]) == 0
    ascii.seek(0)
    assert json.loads(ascii.read())["prompt"] == "caf?"


def test_a_closed_stdin_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "-"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_text_cut_by_the_context_says_so(short, capsys):
    long = [
        "generate",
        "Once upon a time",
        "--model",
        str(short),
        "--max-tokens",
        "100",
        "--ignore-eos",
    ]
    assert main(long) == 0 and "the context of 64 tokens is full" in capsys.readouterr().err
    assert main([*long, "--json"]) == 0
    cut = json.loads(capsys.readouterr().out)
    asked = generated(capsys, "Once upon")
    assert (cut["finish_reason"], cut["context_full"]) == ("length", True)
    assert (asked["finish_reason"], asked["context_full"]) == ("length", False)


def test_log_probabilities_carry_the_text_of_their_tokens(tiny, capsys):
    result = generated(capsys, "Once upon", "--logprobs", "3")
    for token, entry in zip(result["tokens"], result["logprobs"], strict=True):
        assert (entry["token"], entry["text"]) == (
            token,
            tiny.tokenizer.piece_bytes(token).decode(),
        )
        assert (
            len(entry["top"]) == 3 and entry["top"][0]["text"] == entry["text"]
        )  # greedy: the likeliest was taken
        assert entry["top"][0]["logprob"] == entry["logprob"]


def test_a_wait_shows_on_a_terminal_and_is_taken_away(monkeypatch):
    screen, side = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Waiting("loading a model") as waiting:
            shown = os.read(screen, 4096)  # waits for the sign itself
            waiting.progress(512, 2048)
            shown += os.read(screen, 4096)
        shown += os.read(screen, 4096)
    os.close(screen)
    assert shown.decode().split("\r\x1b[K") == [
        "",
        "loading a model ...\r",
        "reading the prompt: 512 of 2048 tokens ...\r",
        "",
    ]


def test_a_cache_file_that_somebody_makes_meanwhile_is_not_replaced(tmp_path, monkeypatch, capsys):
    path = tmp_path / "talk.safetensors"
    monkeypatch.setattr(generate, "summary", lambda stats: path.write_text("precious"))
    assert main(["generate", "Once", "--max-tokens", "1", "--cache-file", str(path)]) == 2
    message = f"openelm: --cache-file {path} exists already; give another name, or remove it\n"
    assert capsys.readouterr().err.endswith(message) and path.read_text() == "precious"
