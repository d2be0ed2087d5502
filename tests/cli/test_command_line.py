"""The frame of every command: typos, help, and streams that are closed or full."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys

import pytest

from openelm_mlx import ModelDraft, __version__, load
from openelm_mlx.cli import COMMANDS, build_parser, main
from openelm_mlx.errors import OptionError


def stopped(capsys, *argv):
    """Exit status, stdout and stderr of arguments that end before a command runs."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return (stop.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["chat", "--temprature", "0.7"],
            "openelm chat: unknown option --temprature; did you mean --temperature?",
        ),
        (
            ["generate", "x", "--kv-bit=8", "--max-tokns=3"],
            "generate: unknown option --max-tokns; did you mean --max-tokens?",
        ),
        (["--verson"], "openelm: unknown option --verson; did you mean --version?"),
        (
            ["generate", "x", "--", "--bits=4"],
            "generate: --bits comes after --, where nothing is an option; give it before",
        ),
        (["generate", "x", "y"], "generate: unexpected argument 'y'"),
        (
            ["chat", "tiny", "How are you?"],
            "chat: unexpected argument 'How are you?'; a message is given with -p",
        ),
        (["list"], "'list' is not a command; did you mean models?"),
        (["cht"], "openelm: 'cht' is not a command; did you mean chat?"),
        (["quantize"], "'quantize' is not a command; did you mean convert?"),
        (["nonsense"], "'nonsense' is not a command; allowed: chat, generate, serve, batch, "),
        (["models", "rm"], "'rm' is not an action; allowed: remove"),
        (["help", "inspct"], "'inspct' is not a command; did you mean inspect?"),
        (["generate", "x", "--dtype", "flaot16"], "--dtype is 'flaot16'; did you mean float16?"),
        (["generate", "x", "--bits", "7"], "--bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
        (
            ["generate", "x", "--max-tokens", "4x"],
            "argument --max-tokens: '4x' is not a whole number",
        ),
        (
            ["generate", "x", "--temperature", "hot"],
            "argument --temperature: 'hot' is not a number",
        ),
        (
            ["generate", "x", "--stop-token", "x"],
            "argument --stop-token: 'x' is not a whole number",
        ),
        (["chat", "--processor", "f"], "unknown option --processor"),
        (["generate"], "one of the arguments PROMPT -p/--prompt is required"),
        (["generate", "Once", "upon"], "put a prompt of several words in quotes"),
        (
            ["chat", "--model", "openelm-tiny"],
            "--model is not an option here; give MODEL without it",
        ),
        (["benchmark", "-m", "270m"], "-m is not an option here; give MODEL without it"),
        (["chat", "--n-predict", "9"], "did you mean --max-tokens? See openelm chat --help"),
        (["serve", "--parallel", "4"], "did you mean --slots? See openelm serve --help"),
        (["serve", "--alias", "a"], "unknown option --alias; see openelm serve --help"),
    ],
)
def test_a_slip_is_one_line_with_what_was_meant(argv, text, capsys):
    status, out, err = stopped(capsys, *argv)
    assert (
        status == 2
        and not out
        and text in err
        and err.count("\n") == 1
        and err.endswith("--help\n")
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--draft-tokens", "3"], "draft_tokens is 3, but nothing drafts"),
        (["--no-adaptive-draft"], "adaptive_draft is False, but nothing drafts"),
        (["--logprobs", "3"], "--logprobs reports with --json only; give that too"),
        (["--kv-keep", "3"], "kv_keep is 3, but there is no window"),
        (["--group-size", "32"], "group_size is 32, but nothing is quantized here; give bits too"),
        (["--temperature", "nan"], "temperature is nan; allowed is a number from 0.0 to 100.0"),
        (
            ["--logit-bias", "5"],
            "logit_bias is ('5',); allowed is a dict of token ids to numbers, or texts ID=NUMBER",
        ),
    ],
)
def test_what_has_nothing_to_act_on_is_refused_before_a_model_is_sought(flags, text, capsys):
    assert main(["generate", "x", "--model", "no-such-model", *flags]) == 2
    assert text in capsys.readouterr().err


def test_how_a_model_is_loaded_is_checked_first(tiny):
    from openelm_mlx.device import mx

    assert load(dtype=mx.float16).model(mx.array([[1]])).dtype == mx.float16
    for settings, text in (
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16, float16, or None"),
        ({"dtype": mx.int8}, "dtype is 'int8'"),
        ({"bits": "4"}, "bits is '4'; allowed: 2, 3"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 48, "bits": 4}, "group_size is 48; allowed: 32"),
        ({"tokenizer": 5}, "tokenizer is 5; allowed is a path"),
        ({"revision": 5}, "revision is 5"),
    ):
        with pytest.raises(OptionError, match=text):
            load("no-such-model", **settings)
    with pytest.raises(OptionError, match="the model is None; allowed is a name, or a path"):
        load(None)
    with pytest.raises(OptionError, match="draft is 'openelm-tiny'; allowed is a loaded model"):
        ModelDraft(tiny, "openelm-tiny")


def test_a_prompt_may_be_a_flag_as_in_chat(capsys):
    assert main(["generate", "Once", "--max-tokens", "3"]) == 0
    as_argument = capsys.readouterr().out
    assert main(["generate", "-p", "Once", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == as_argument


def test_a_message_in_place_of_a_model(capsys):
    assert main(["chat", "How are you?"]) == 2
    said = "openelm: there is no model 'How are you?'; a message is given with -p\n"
    assert capsys.readouterr().err == said


def test_help_of_all_and_of_one(capsys):
    assert main([]) == main(["help"]) == 0
    twice = capsys.readouterr().out
    assert twice == 2 * twice[: len(twice) // 2] and all(
        f"\n    {name} " in twice for name in COMMANDS
    )
    assert main(["help", "inspect"]) == 0
    page = capsys.readouterr().out
    assert stopped(capsys, "inspect", "--help") == (0, page, "")
    assert (
        stopped(capsys, "-V")
        == stopped(capsys, "--version")
        == (0, f"openelm-mlx {__version__}\n", "")
    )


def test_paragraphs_of_help_fit_the_terminal_and_examples_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    page = build_parser().format_help()
    assert (
        "\n  openelm chat                                     talk to the bundled model\n" in page
    )
    last = page.rstrip().rpartition("\n\n")[2].splitlines()
    assert last[0].startswith("MODEL is a folder") and " ".join(last).endswith("lists all names.")
    assert 50 < max(map(len, last[:-1])) <= 60  # no line is left short by a break of the source


def test_where_a_file_is_meant_help_says_file():
    files = {
        "--tokenizer",
        "--config",
        "--verify-text",
        "--calibration-text",
        "--cache-file",
        "--recipe",
        "--system-file",
        "--output",
        "--csv",
        "--markdown",
        "--plot",
        "--report",
        "--compare",
        "--show",
    }
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    found = [
        (flag, str(action.metavar))
        for parser in commands.choices.values()
        for action in parser._actions
        for flag in action.option_strings
        if flag in files and action.dest not in ("target", "folder") and action.choices is None
    ]
    assert {flag for flag, _ in found} == files and all("FILE" in metavar for _, metavar in found)


@pytest.mark.needs("/dev/full")
def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    for argv in (["inspect", "270m", "--json"], ["help"], ["inspect", "270m"]):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(argv) == 2
        assert (
            capsys.readouterr().err
            == "openelm: the output cannot be written: No space left on device\n"
        )
    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(
            sys, "stdout", io.TextIOWrapper(full, write_through=True)
        )  # as under PYTHONUNBUFFERED
        assert main(["-V"]) == 2
    assert (
        capsys.readouterr().err
        == "openelm: the output cannot be written: No space left on device\n"
    )
    with (
        open("/dev/full", "w") as full,
        open("/dev/full", "w") as too,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", too)
        assert main(["inspect", "270m"]) == 2


def test_closed_streams(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["inspect", "270m"]) == 2
    assert capsys.readouterr().err.startswith(
        "openelm: standard output is closed, so no result can be shown"
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(["generate", "Once", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out.count("\n") == 1  # the statistics went nowhere


def test_no_file_gets_the_number_of_a_closed_stream():
    """The weights would be read through the number of stdin, which MLX takes for a failure to open
    them.
    """
    command = f'{sys.executable} -m openelm_mlx generate Once --max-tokens 1 "$@"'
    for closing in ("<&-", "<&- 2>&-"):
        result = subprocess.run(
            ["sh", "-c", f"{command} {closing}", "sh"], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0 and result.stdout.strip() and "Traceback" not in result.stderr
