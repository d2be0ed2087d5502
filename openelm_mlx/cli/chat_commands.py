"""The commands of a chat: lines that begin with a slash, at the prompt and in a pipe alike."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from openelm_mlx.cli.options import did_you_mean, given_path, has_flag, text_of
from openelm_mlx.cli.session import Session, facts, settings, written
from openelm_mlx.engine.options import KINDS, with_overrides
from openelm_mlx.errors import OpenELMError, OptionError, PromptError
from openelm_mlx.files import replacing

KEYS = """Enter sends; Alt-Enter, or a \\ at the end of a line, starts a new one.
Tab completes commands, paths and settings. Ctrl-C stops an answer.
A message that begins with a slash is written with two: //usr is a folder."""

BYTES_PER_TOKEN = 256  # more than any token has: a file with more than these cannot fit the context
SETTINGS: dict[str, Field[Any]] = {
    item.name: item
    for kind in KINDS
    for item in fields(kind)
    if has_flag(item) and item.name != "logprobs"
}
SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass(frozen=True)
class Command:
    """A command: its names, its argument, and the function it runs; False ends the chat."""

    names: tuple[str, ...]
    argument: str
    help: str
    act: Callable[[Session, str], Any]

    def run(self, session: Session, rest: str) -> Any:
        if rest and not self.argument:
            raise OptionError(f"{self.names[0]} takes nothing after it, but {rest!r} was given")
        if not rest and self.argument.startswith("FILE"):
            raise OptionError(f"{self.names[0]} needs a file, as in {self.names[0]} notes.txt")
        return self.act(session, rest)


def show_help(session: Session, rest: str) -> None:
    session.say_table(
        (f"{' '.join(command.names)} {command.argument}", command.help) for command in COMMANDS
    )
    session.say(f"\n{KEYS}")


def show(session: Session, rest: str) -> None:
    from openelm_mlx.engine.draft_model import ModelDraft

    talk = session.conversation
    exchanges = len(talk.messages) // 2
    rows = {
        "model": facts(talk.engine),
        "system": talk.system or "(empty)",
        "sampling": settings(talk.sampling),
        "answers": f"at most {talk.options.max_tokens} tokens",
        "context": f"{talk.context_used} of {talk.context_length} tokens, "
        f"{counted(exchanges, 'exchange')}",
    }
    if isinstance(talk.draft, ModelDraft):
        rows["drafts"] = facts(talk.draft.engine)
    session.say_table(rows.items())


def set_option(session: Session, rest: str) -> None:
    """Change the setting of `NAME VALUE`; show that of `NAME` alone; list all without a name."""
    talk = session.conversation
    name, value = re.split(r"\s*=\s*|\s+|$", rest, maxsplit=1)
    name, value = name.lower().replace("-", "_"), value.strip()
    if not name:
        session.say_table(
            (known, shown(session, known), item.metadata["help"])
            for known, item in SETTINGS.items()
        )
        return
    if name not in SETTINGS:
        command = f"/{name}" if f"/{name}" in BY_NAME else None  # as in /set system
        hint = f"; did you mean {command}?" if command else did_you_mean(name, SETTINGS)
        raise OptionError(f"there is no setting {name!r}{hint} (/set lists them)")
    if value:
        change = {name: parsed(SETTINGS[name], value)}
        given = (talk.sampling, talk.options, talk.engine_options)
        sampling, options, talk.engine_options = with_overrides(KINDS, given, change)
        options.check_draft(talk.draft is not None)
        talk.sampling, talk.options = sampling, options
    session.say(f"{name}: {shown(session, name)}")
    if value and talk.sampling.greedy and name in (*talk.sampling.idle, "seed"):
        session.say("answers are greedy, so this changes nothing until /set temperature")


def parsed(item: Field[Any], value: str) -> Any:
    """Return the value of a setting. A text that is not a number stays: the options refuse it."""
    kind = str(item.type)
    if item.name == "seed" and value.lower() in ("random", "new", "none"):
        from openelm_mlx.engine.sampling import new_seed

        return new_seed()
    if value.lower() == "none" and ("None" in kind or kind.startswith("tuple")):
        return () if kind.startswith("tuple") else None
    if kind.startswith("str"):
        return text_of(given_path(value)) if item.metadata.get("metavar") == "FILE" else value
    if kind == "tuple[str, ...]":
        return value.split(",") if item.metadata.get("commas") else (value,)
    if kind.startswith("tuple"):
        return tuple(number(int, part) for part in re.split(r"[\s,]+", value))
    if kind.startswith("bool"):
        if value.lower() not in SWITCHES:
            raise OptionError(f"{item.name} is {value!r}; allowed: on, off")
        return SWITCHES[value.lower()]
    return number(int if kind.startswith("int") else float, value)


def number(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def shown(session: Session, name: str) -> str:
    talk = session.conversation
    kinds = (talk.sampling, talk.options, talk.engine_options)
    return written(next(getattr(kind, name) for kind in kinds if hasattr(kind, name)))


def set_system(session: Session, rest: str) -> None:
    talk = session.conversation
    if rest:
        talk.system = None if rest == "none" else rest
    session.say(f"system: {talk.system or '(empty)'}")


def reset(session: Session, rest: str) -> None:
    session.conversation.reset()
    session.say("forgotten")


def undo(session: Session, rest: str) -> None:
    session.say(f"taken back: {short(session.conversation.undo())}")


def regenerate(session: Session, rest: str) -> None:
    session.answer(session.conversation.regenerate)


def read(session: Session, rest: str) -> None:
    """Send the text of a file; what follows its name is a question, put after the text."""
    path, question = split_path(rest)
    text = text_of(path, BYTES_PER_TOKEN * session.conversation.context_length).rstrip("\n")
    session.send(f"{text}\n\n{question}" if question else text)


def save(session: Session, rest: str) -> None:
    path = given_path(rest)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise OptionError(f"{rest} is not a regular file; give another name")
        if session.confirm is None:
            raise OptionError(f"{rest} exists already; give another name, or remove it")
        if not session.confirm(f"{rest} exists already; replace it?"):
            session.say("not saved")
            return
    try:
        with replacing(path) as file:
            file.write_text(json.dumps(session.conversation.to_json(), indent=1), encoding="utf-8")
    except (OSError, ValueError) as error:
        what = f"cannot write {rest}: {getattr(error, 'strerror', None) or error}"
        raise OptionError(f"{what}; give a file, as in /save talk.json") from None
    session.say(f"saved {counted(len(session.conversation.messages) // 2, 'exchange')} in {rest}")


def load(session: Session, rest: str) -> None:
    from openelm_mlx.engine.conversation import Conversation

    old = session.conversation
    try:
        data = json.loads(text_of(given_path(rest)))
    except (ValueError, RecursionError) as error:
        what = f"{rest} is not a saved conversation ({error})"
        raise PromptError(f"{what}; give a file that /save wrote") from None
    given = {
        name: getattr(old, name) for name in ("sampling", "options", "engine_options", "draft")
    }
    talk = Conversation.from_json(old.engine, data, **given)
    session.conversation, session.stats, session.meter.tokens = talk, None, 0
    exchanges = counted(len(talk.messages) // 2, "exchange")
    last = zip("› ", talk.messages[-2:], strict=False)
    lines = [f"{mark} {short(message['content'])}" for mark, message in last]
    session.say(
        "\n".join([f"loaded {exchanges}, system: {short(talk.system or '(empty)')}", *lines])
    )


def stats(session: Session, rest: str) -> None:
    from openelm_mlx.cli.generate import summary

    if session.stats:
        return session.say(summary(session.stats))
    meter = session.meter
    return session.say(f"the answer was stopped after {meter}" if meter.tokens else "no answer yet")


def leave(session: Session, rest: str) -> bool:
    return False


COMMANDS = (
    Command(("/help", "/?"), "", "this list", show_help),
    Command(("/show",), "", "the model, the system turn, the settings, the context", show),
    Command(
        ("/set",), "[NAME VALUE]", "change a setting (temperature 0.8), or list all", set_option
    ),
    Command(("/system",), "[TEXT]", 'show or set the system turn; "none" removes it', set_system),
    Command(("/regenerate", "/regen"), "", "another answer to the last message", regenerate),
    Command(("/undo",), "", "take back the last message and its answer", undo),
    Command(("/reset", "/clear"), "", "forget the conversation, not the system turn", reset),
    Command(("/read",), "FILE [QUESTION]", "send the text of a file, then a question", read),
    Command(("/save",), "FILE", "write the conversation as JSON", save),
    Command(("/load",), "FILE", "go on with a saved one", load),
    Command(("/stats",), "", "what the last answer cost", stats),
    Command(("/exit", "/quit", "/bye"), "", "leave (also Ctrl-D)", leave),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}


def find(name: str) -> Command | None:
    """Return the command of this name, in whatever case, or None."""
    return BY_NAME.get(name.lower())


def unknown(name: str) -> OpenELMError:
    """Return the error for a name that is not a command."""
    hint = did_you_mean(name.lower(), BY_NAME)
    return OptionError(
        f"{name} is not a command{hint} (/help lists them; // begins a message with one slash)"
    )


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def short(text: str) -> str:
    """Shorten a text to at most one line."""
    return textwrap.shorten(text, 72, placeholder=" ...")


def split_path(text: str) -> tuple[Path, str]:
    """Split off the longest beginning that names a file; a name with blanks needs no quotes."""
    words = text.split(" ")
    for count in range(len(words), 0, -1):
        path = given_path(" ".join(words[:count]))
        if os.path.exists(path):  # Path's own raises if a question is longer than a name may be
            return path, " ".join(words[count:]).strip()
    return given_path(words[0]), ""


def handle(session: Session, line: str) -> bool:
    """Send a message or run a command; return False to end the chat. Raises `OpenELMError`."""
    if line.startswith("/") and not line.startswith("//"):
        name, *rest = line.split(maxsplit=1)
        command = find(name)
        if command is not None:
            return command.run(session, rest[0].strip() if rest else "") is not False
        if session.dialogue:
            raise unknown(name)
    session.send(line[1:] if line.startswith("//") else line)
    return True
