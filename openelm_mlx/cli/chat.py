"""`openelm chat`: a conversation on a terminal or through a pipe, or a single question."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import Waiting, all_characters, utf8_stdin, without_line_end
from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_draft_flag,
    add_flags,
    add_model_flags,
    from_args,
    given_fields,
    given_path,
    load_draft,
    load_model,
    text_of,
)
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.errors import OpenELMError, OptionError

if TYPE_CHECKING:
    from openelm_mlx.engine.conversation import Conversation

DESCRIPTION = """Talk to a model. Sampling options that are not given are the model's own defaults,
which the first lines of the chat show. Where stdin or stdout is not a terminal, answers
go to stdout and everything else to stderr."""

EXAMPLES = """examples:
  openelm chat                                       the bundled model
  openelm chat 270m-instruct --system "Be brief." --temperature 0.7
  openelm chat 3b-instruct --draft-model 270m-instruct   the same answers from drafts
  openelm chat my-model --adapter my-adapter         with a LoRA or DoRA adapter
  openelm chat -p "Tell me a story."                 one question and out
  openelm chat -p - < letter.txt                     all of stdin is one message
  openelm chat -p "Hello!" --json                    answer, messages, statistics and seed
  printf 'Hello!\\nTell me a story.\\n/regenerate\\n' | openelm chat

In a chat /help lists the commands: /set temperature 0.8, /regenerate, /undo, /read FILE,
/save FILE and others. In a pipe each line is a message, and a line that begins with a
command runs it; // at the start of a line sends one slash and no command.
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.of_stray_words = "; a message is given with -p"
    named: Any = {"nargs": "?", "default": "openelm-tiny"}
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **named)
    text = "answer this message and end; - reads it from stdin"
    parser.add_argument("-p", "--prompt", metavar="TEXT", help=text)
    parser.add_argument("--json", action="store_true", help="with -p: print one JSON object")
    system = parser.add_mutually_exclusive_group()
    system.add_argument("--system", metavar="TEXT", help="the system turn")
    system.add_argument("--system-file", metavar="FILE", help="a file with the system turn")
    add_draft_flag(parser)
    add_flags(parser, GenerationOptions, skip=("logprobs",))
    add_flags(parser, SamplingOptions)
    add_flags(parser, EngineOptions)
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and args.prompt is None:
        raise OptionError("--json prints one answer: give the message with -p TEXT")
    all_characters(sys.stdout)
    if args.prompt is not None:
        text = without_line_end(utf8_stdin().read()) if args.prompt == "-" else args.prompt
        return one_answer(opened(args), text, args.json)
    if not utf8_stdin().isatty():
        return lines(opened(args))
    from openelm_mlx.cli.terminal import dialogue

    return dialogue(opened(args))


def opened(args: argparse.Namespace) -> Conversation:
    """Return the conversation that the command line asks for.

    Raises an `OpenELMError`, for wrong options before it loads a model.
    """
    options, engine_options = from_args(GenerationOptions, args), from_args(EngineOptions, args)
    given = given_fields(SamplingOptions, args)
    SamplingOptions(**given)
    if " " in args.model.strip() and not os.path.exists(os.path.expanduser(args.model)):
        raise OptionError(f"there is no model {args.model!r}; a message is given with -p")
    from openelm_mlx.engine.tokenizer import check_text

    system = args.system
    if args.system_file is not None:
        system = text_of(given_path(args.system_file)).rstrip("\n")
    check_text(system or "")
    engine, draft = load_model(args.model, args), load_draft(args)
    from openelm_mlx.engine.conversation import Conversation

    if not engine.instruct:
        what = f"{args.model} has no chat template, as a model that was trained to continue text"
        why = "not to converse; if this one was, convert it with --instruct"
        print(f"{what}, {why}", file=sys.stderr)
    given |= {"options": options, "engine_options": engine_options, "draft": draft}
    return Conversation(engine, system, **given)


def one_answer(conversation: Conversation, text: str, as_json: bool) -> int:
    """Answer one message. The JSON object has `messages` as `generate(engine, ...)` takes them."""
    from openelm_mlx.cli.generate import context_full
    from openelm_mlx.cli.session import Session

    if not as_json:
        Session(conversation).send(text)
        return 0
    with Waiting("reading the prompt") as waiting:
        for event in conversation.send(text, waiting.progress):
            last = event
    messages = conversation.messages
    if conversation.system is not None:
        messages = [{"role": "system", "content": conversation.system}, *messages]
    result = {
        "model": conversation.engine.name,
        "answer": messages[-1]["content"],
        "messages": messages,
        "finish_reason": last.finish_reason,
        "context_full": context_full(last, conversation.options),
        "sampling": asdict(conversation.sampling),
        "seed": conversation.sampling.seed,
        "stats": None if last.stats is None else asdict(last.stats),
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


def lines(conversation: Conversation) -> int:
    """Run one message or command per line of stdin, even if one fails; return the exit status."""
    from openelm_mlx.cli.chat_commands import handle
    from openelm_mlx.cli.session import Session

    session, status = Session(conversation), 0
    session.greet()
    for line in utf8_stdin():
        if not line.strip():
            continue
        try:
            if not handle(session, without_line_end(line)):
                break
        except OpenELMError as error:
            print(f"openelm: {error}", file=sys.stderr)
            status = 2
    return status
