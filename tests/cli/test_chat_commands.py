"""`openelm chat` without a terminal: messages and commands from a pipe, and one question and
out.
"""

from __future__ import annotations

import json
import re

import pytest
from formats import random_folder

from openelm_mlx import Conversation
from openelm_mlx.cli import main

SHORT = ("--max-tokens", "3", "--temperature", "0")  # greedy, so that answers can be compared


@pytest.fixture
def chat(stdin, capsys):
    """Run a chat on the lines of a pipe: its exit status, stdout, and stderr without the
    greeting.
    """

    def run(*lines: str | bytes, flags: tuple[str, ...] = SHORT) -> tuple[int, str, str]:
        stdin(
            b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
        )
        status = main(["chat", *flags])
        shown = capsys.readouterr()
        greeting = re.search(
            r"^\S+: (greedy|temperature \S+), .*seed \d+\n", shown.err, re.MULTILINE
        )
        assert greeting is not None
        return status, shown.out, shown.err.replace(greeting[0], "", 1)

    return run


def answers(engine, *messages: str, **options) -> str:
    """Return what a conversation says to the messages, a line each."""
    talk = Conversation(engine, **{"max_tokens": 3, "temperature": 0, **options})
    return "".join(
        "".join(event.text for event in talk.send(message)) + "\n" for message in messages
    )


def test_each_line_of_a_pipe_is_a_message(tiny, chat):
    assert chat("Hello!", "", "Who are you?") == (0, answers(tiny, "Hello!", "Who are you?"), "")
    assert chat("Hello!\r", "\r", "Who are you?\r") == chat(
        "Hello!", "Who are you?"
    )  # lines of Windows


def test_a_line_that_cannot_be_answered_is_one_line_of_error(tiny, chat):
    status, out, err = chat("Hello!", "word " * 2000, b"caf\xe9 au lait", "Who are you?")
    assert status == 2 and out == answers(tiny, "Hello!", "Who are you?")
    long, bad = err.splitlines()
    assert "Shorten" in long and "UTF-8: character 4 " in bad


def test_commands_in_a_pipe_speak_on_stderr(tiny, chat):
    status, out, err = chat("/?", "Hello!", "/STATS", "/bye", "never asked")
    assert status == 0 and out == answers(tiny, "Hello!")
    assert "/regenerate" in err and "generated 3 at" in err


def test_a_slash_that_begins_no_command_begins_a_message(tiny, chat):
    status, out, err = chat("/usr/bin is a folder?", "//help", "/undo", "/undo")
    assert (status, out) == (0, answers(tiny, "/usr/bin is a folder?", "/help"))
    assert err == "taken back: /help\ntaken back: /usr/bin is a folder?\n"


def test_help_names_every_command_and_setting(chat):
    _, _, err = chat("/help", "/set")
    for name in (
        "/show",
        "/set",
        "/system",
        "/regenerate",
        "/undo",
        "/clear",
        "/read",
        "/save",
        "/load",
        "/quit",
    ):
        assert name in err
    assert "temperature" in err and "0 is greedy" in err and "max_tokens" in err


def test_set_changes_what_the_next_answer_uses(tiny, chat):
    long = answers(tiny, "Hello!", max_tokens=6)
    status, out, err = chat(
        "/set max-tokens 6",
        "Hello!",
        "/set max_tokens",
        "/set stop I",
        "/reset",
        "Hello!",
        "/set stop none",
        "/set ignore_eos on",
        "/set ignore_eos",
    )
    assert (
        status == 0 and "max_tokens: 6" in err and "ignore_eos: on" in err and "stop: none" in err
    )
    assert out == long + long.split("I")[0] + "\n"
    drawn = chat("/set temperature 20", "/set min_p 0", "/set seed 12", "Hello!")[1]
    wanted = answers(tiny, "Hello!", temperature=20.0, min_p=0.0, seed=12)
    assert drawn == wanted != answers(tiny, "Hello!")
    for idle in ("top_p", "xtc_probability", "seed"):
        assert (
            "changes nothing until"
            in chat("/set temperature 0", f"/set {idle} {int(idle == 'seed') or 0.5}")[2]
        )


def test_set_takes_options_of_all_three_classes(tiny, chat):
    status, out, err = chat(
        "/set logit_bias 9=-100, 5=2.5",
        "/set stop-tokens 7 8",
        "/set prefill_chunk 8",
        "Hello!",
        "/set logit_bias",
        "/set stop_tokens none",
        "/set compiled off",
        "/show",
    )
    assert status == 0 and out == answers(
        tiny, "Hello!", logit_bias={9: -100.0, 5: 2.5}, stop_tokens=(7, 8)
    )
    assert err.splitlines()[:3] == [
        "logit_bias: 5=2.5 9=-100",
        "stop_tokens: 7 8",
        "prefill_chunk: 8",
    ]
    assert ", logit_bias 5=2.5 9=-100, seed" in err
    status, _, err = chat(
        "/set stop_tokens x",
        "/set logit_bias 5",
        "/set processor 5",
        "/set logit_bias 99999=1",
        "Hello!",
    )
    assert status == 2
    for line in (
        "stop_tokens is ('x',)",
        "logit_bias is (5,)",
        "no setting 'processor'",
        "the token id 99999; allowed",
    ):
        assert line in err


def test_set_refuses_a_cache_that_the_model_cannot_have(chat, tmp_path):
    folder = random_folder(tmp_path / "base")  # a base model, and its heads are too narrow
    status, out, err = chat("/set kv_bits 8", "/set kv_bits", flags=(str(folder),))
    assert (status, out) == (2, "") and "has no chat template" in err
    assert "multiple of 32" in err and err.endswith("kv_bits: none\n")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temp 1", "did you mean temperature?"),
        ("/set system Be brief.", "did you mean /system?"),
        ("/set num_predict 9", "did you mean max_tokens?"),
        ("/set temperature hot", "temperature is 'hot'"),
        ("/set top_p 1.5", "top_p is 1.5"),
        ("/set max_tokens 0", "max_tokens is 0"),
        ("/set ignore_eos maybe", "allowed: on, off"),
        ("/set draft_tokens 4", "nothing drafts"),
        ("/reset now", "takes nothing after it"),
        ("/save", "/save needs a file"),
        ("/save .", "is not a regular file"),
        ("/save no/such/folder/talk.json", "cannot write no/such/folder/talk.json: No such file"),
        ("/load nowhere", "cannot read nowhere: No such file"),
        ("/load /dev/null", "not a regular file"),
        (f"/load {__file__}", "not a saved conversation"),
        (f"/load {__file__}", "give a file that /save wrote"),
        ("/read ~nobody-of-this-name/x", "home folder"),
        (b"/system caf\xe9", "UTF-8"),
        ("/undo", "nothing to undo"),
        ("/regenerate", "no answer"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_line(chat, line, text):
    status, out, err = chat(line)
    assert (
        (status, out) == (2, "")
        and err.startswith("openelm: ")
        and text in err
        and err.count("\n") == 1
    )


def test_undo_and_reset_forget(tiny, chat):
    _, out, err = chat("Hello!", "Who are you?", "/undo", "/show", "/clear", "/show", "Hello!")
    assert out == answers(tiny, "Hello!", "Who are you?") + answers(tiny, "Hello!")
    assert "taken back: Who are you?" in err and re.findall(r"\d exchange", err) == [
        "1 exchange",
        "0 exchange",
    ]


def test_regenerate_gives_another_answer(chat):
    flags = ("--temperature", "2", "--seed", "3", "--max-tokens", "6")
    status, out, _ = chat("Tell me a story.", "/regen", "/show", flags=flags)
    assert status == 0 and len(set(out.splitlines())) == 2 == len(out.splitlines())


def test_show_tells_the_state(tiny, chat):
    said = ("/system Be brief.", "/set temperature 0.5", "/show", "/system none", "/system")
    _, _, err = chat(*said, flags=(*SHORT, "--seed", "7"))
    assert (
        "million parameters" in err
        and "system    Be brief." in err
        and "temperature 0.5" in err
        and "seed 7" in err
    )
    assert err.endswith("system: (empty)\n")


def test_read_sends_a_file(tiny, chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my notes.txt").write_text("Hello!\n")
    assert chat("/read ~/my notes.txt", "/read '~/my notes.txt'")[1] == answers(
        tiny, "Hello!", "Hello!"
    )
    assert chat("/read ~/my notes.txt Who are you?")[1] == answers(tiny, "Hello!\n\nWho are you?")
    question = (
        "Who are you, and why? " * 13 + "Say!"
    )  # with the path longer than a name of a file may be
    assert chat(f"/read ~/my notes.txt {question}")[1] == answers(tiny, f"Hello!\n\n{question}")
    status, _, err = chat(f"/read {'x' * 300}", f"/save {'x' * 300}")
    assert status == 2 and err.count("File name too long") == 2 and err.count("\n") == 2
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "program").write_bytes(b"\x7fELF\0\xff")
    assert "program is not text; give a file of text" in chat("/read ~/program")[2]
    (tmp_path / "huge").write_bytes(b"x" * 2_000_000)
    status, _, err = chat("/read ~/latin", "/read ~/huge", f"/read {tmp_path}")
    assert (
        status == 2
        and "not UTF-8 text (byte 3)" in err
        and "2,000,000 bytes" in err
        and "not a regular file" in err
    )


def test_saved_and_loaded(tiny, chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, _, err = chat("Hello!", "/save ~/talk.json", "/show")
    used = re.findall(r"context +(\d+) of", err)
    _, out, err = chat("/load ~/talk.json", "/show", "Who are you?")
    assert "loaded 1 exchange" in err and "Hello!" in err
    assert re.findall(r"context +(\d+) of", err) == used  # at once, before the next answer
    assert out == answers(tiny, "Hello!", "Who are you?").split("\n", 1)[1]
    saved = (tmp_path / "talk.json").read_bytes()
    status, _, err = chat("/save ~/talk.json")
    assert (
        status == 2 and "exists already" in err and (tmp_path / "talk.json").read_bytes() == saved
    )
    (tmp_path / "half.json").write_bytes(saved[:40])
    assert "not a saved conversation" in chat("/load ~/half.json")[2]


def test_one_question_and_out(tiny, stdin, capsys, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    ask = ["chat", *SHORT, "--system-file", str(tmp_path / "system.txt")]
    wanted = answers(tiny, "Hello!\nWho are you?", system="Be brief.")
    assert main([*ask, "-p", "Hello!\nWho are you?"]) == 0
    assert capsys.readouterr() == (wanted, "")
    stdin(b"Hello!\nWho are you?\r\n")
    assert main([*ask, "-p", "-", "--json", "--seed", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] + "\n" == wanted and result["seed"] == 5 == result["stats"]["seed"]
    assert result["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!\nWho are you?"},
        {"role": "assistant", "content": result["answer"]},
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--json"], "give the message with -p"),
        (["-p", " "], "message is empty"),
        (["-p", "caf\udce9"], "UTF-8"),
        (["-p", "x", "--system", "caf\udce9"], "UTF-8"),
        (["-p", "x", "--system-file", "nowhere"], "cannot read nowhere"),
    ],
)
def test_a_mistake_in_one_question_is_one_line(capsys, flags, text):
    assert main(["chat", *flags]) == 2
    shown = capsys.readouterr()
    assert text in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_full_context_is_told(chat, short):
    status, out, err = chat(
        "Hello!", flags=(str(short), "--max-tokens", "200", "--temperature", "0", "--ignore-eos")
    )
    assert status == 0 and out and "the context is full" in err
