"""`openelm chat`: a conversation on a terminal, or one message a line from a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.options import add_draft_flag, add_flags, add_model_flags, from_args, load_draft, load_model
from openelm_mlx.errors import OpenELMError
from openelm_mlx.options import GenerationOptions, SamplingOptions

if TYPE_CHECKING:
    from openelm_mlx.chat import Conversation
    from openelm_mlx.generation import GenerationStats

EXAMPLES = """examples:
  openelm chat                                       the bundled model
  openelm chat 270m-instruct --system "Be brief." --temperature 0.7
  openelm chat 3b-instruct --draft-model 270m-instruct   the same answers, sooner
  printf 'Hello!\\nTell me a story.\\n' | openelm chat   one message a line
"""

HELP = """/help            this list
/reset           forget the conversation; the system turn stays
/system [TEXT]   show the system turn, set it, or remove it with "none"
/save FILE       write the conversation as JSON
/load FILE       go on with a saved one
/stats           what the last answer cost
/exit            leave (also Ctrl-D)

Enter sends, Alt-Enter or a \\ at the end of a line starts a new one, Ctrl-C stops an answer."""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="talk to a model", description="Talk to a model; with stdin not a terminal, one message a line.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", nargs="?", default="openelm-tiny", help="default: openelm-tiny")
    parser.add_argument("--system", metavar="TEXT", help="the system turn")
    add_draft_flag(parser)
    add_flags(parser, SamplingOptions)
    add_flags(parser, GenerationOptions, skip=("logprobs",))
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sampling, options = from_args(SamplingOptions, args), from_args(GenerationOptions, args)
    engine = load_model(args.model, args)
    from openelm_mlx.chat import Conversation

    if not engine.instruct:
        print(f"{args.model} is a base model: it was not trained to converse, only to continue text", file=sys.stderr)
    session = Session(Conversation(engine, args.system, sampling, options, draft=load_draft(args)))
    return terminal(session) if sys.stdin.isatty() else lines(session)


def lines(session: Session) -> int:
    """One message a line; the answers go to stdout, a line that cannot be answered is said on stderr."""
    status = 0
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            session.answer(line.rstrip("\n"))
        except OpenELMError as error:
            print(f"openelm: {error}", file=sys.stderr)
            status = 2
    return status


def terminal(session: Session) -> int:
    """Prompt, answer, repeat; history is kept across sessions."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    prompts: PromptSession[str] = PromptSession(
        history=FileHistory(str(history_file())), key_bindings=key_bindings(), multiline=True,
        bottom_toolbar=session.status, prompt_continuation="… ",
    )  # fmt: skip
    print(f"{session.conversation.engine.name}: /help lists commands, Ctrl-D leaves")
    while True:
        try:
            text = prompts.prompt("› ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        if text in ("/exit", "/quit"):
            return 0
        try:
            if text.startswith("/"):
                print(session.command(text))
            elif text:
                session.answer(text)
        except OpenELMError as error:
            print(f"openelm: {error}")
        print()


def key_bindings() -> Any:
    """Enter sends unless the line ends with a backslash; Alt-Enter always breaks the line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> Path:
    """Where earlier messages are remembered: $XDG_STATE_HOME/openelm-mlx/history."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "openelm-mlx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").open("a").close()
    except OSError:  # a home that cannot be written costs the history, not the chat
        return Path(os.devnull)
    return folder / "history"


class Session:
    """A conversation and what the terminal shows of it."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.stats: GenerationStats | None = None

    def answer(self, text: str) -> None:
        """Print the answer as it comes. Ctrl-C ends this answer, not the conversation."""
        with closing(self.conversation.send(text)) as events:
            for notice in self.conversation.notices:
                print(f"[{notice}]", file=sys.stderr)
            try:
                for event in events:
                    print(event.text, end="", flush=True)
                    self.stats = event.stats or self.stats
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print(" [stopped]", end="")
        print(flush=True)

    def status(self) -> str:
        """The line at the bottom: speed of the last answer, context in use."""
        talk = self.conversation
        speed = f"{self.stats.generation_tokens_per_second:.1f} tokens/s | " if self.stats else ""
        return f" {talk.engine.name} | {speed}context {talk.context_used} of {talk.context_length}"

    def command(self, line: str) -> str:
        """Run a slash command; what it has to say. Raises `OpenELMError` for what it cannot do."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        talk = self.conversation
        if name == "/help":
            return HELP
        if name == "/reset":
            talk.reset()
            return "forgotten"
        if name == "/system":
            if rest:
                talk.system = None if rest == "none" else rest
            return f"system: {talk.system or '(empty)'}"
        if name == "/stats":
            from openelm_mlx.cli.generate import summary

            return summary(self.stats) if self.stats else "no answer yet"
        if name in ("/save", "/load"):
            return self.save(rest) if name == "/save" else self.load(rest)
        raise OpenELMError(f"{name} is no command; /help lists them")

    def save(self, name: str) -> str:
        import json

        try:
            Path(name).write_text(json.dumps(self.conversation.to_json(), indent=1), encoding="utf-8")
        except OSError as error:
            raise OpenELMError(f"cannot write {name!r}: {error.strerror}; give a file, as in /save talk.json") from None
        return f"saved {name}"

    def load(self, name: str) -> str:
        import json

        from openelm_mlx.chat import Conversation

        talk = self.conversation
        try:
            data = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OpenELMError(f"cannot read {name!r}: {error}") from None
        self.conversation = Conversation.from_json(
            talk.engine, data, sampling=talk.sampling, options=talk.options, draft=talk.draft
        )
        return f"loaded {len(self.conversation.messages) // 2} turns"
