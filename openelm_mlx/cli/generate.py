"""`openelm generate`: one prompt, one text."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import Waiting, all_characters, utf8_stdin, without_line_end
from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_draft_flag,
    add_flags,
    add_model_flags,
    from_args,
    load_draft,
    load_model,
)
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.files import check_new, check_writable, name_for_mlx

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.prompt_cache import PromptCache
    from openelm_mlx.engine.request import Event, GenerationStats

EXAMPLES = """examples:
  openelm generate "Once upon a time"
  openelm generate "Once upon a time" --model 270m --temperature 0.7 --top-p 0.9 --seed 1
  cat story.txt | openelm generate - --max-tokens 64 --json
  openelm generate "$(cat code.py)" --prompt-lookup 3        drafts from the prompt itself
  openelm generate "Once" --model 3b --draft-model 270m      a small model drafts for a large one
  openelm generate "Once" --model my-model --adapter my-adapter   with a LoRA or DoRA adapter
  openelm generate "$(cat long.txt)" --cache-file long.safetensors   the next run starts there
"""

DESCRIPTION = """Continue a text; it goes to stdout, statistics to stderr. Without a temperature
decoding is greedy; `openelm chat` uses the model's own defaults instead.
A prompt should end with a word rather than with a space."""

SPACE_HINT = (
    "the prompt ends with a space, but a space belongs to the word after it, "
    "so the model may continue badly; leave it out"
)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.of_stray_words = "; put a prompt of several words in quotes"
    prompt = parser.add_mutually_exclusive_group(required=True)
    text = "the text to continue, or - to read it from stdin"
    prompt.add_argument("words", metavar="PROMPT", nargs="?", help=text)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the same, as openelm chat takes it")
    parser.add_argument("--model", default="openelm-tiny", help=MODEL_HELP)
    text = "a line break that ends stdin is part of the prompt"
    parser.add_argument("--keep-newline", action="store_true", help=text)
    add_draft_flag(parser)
    text = "start from the keys and values in FILE, and save them there"
    parser.add_argument("--cache-file", metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, GenerationOptions)
    add_flags(parser, SamplingOptions)
    add_flags(parser, EngineOptions)
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options, sampling = from_args(GenerationOptions, args), from_args(SamplingOptions, args)
    engine_options = from_args(EngineOptions, args)
    if options.logprobs is not None and not args.json:
        raise OptionError("--logprobs reports with --json only; give that too")
    all_characters(sys.stdout)
    if args.cache_file is not None:
        check_cache_file(args.cache_file)
    is_new = args.cache_file is not None and not os.path.exists(args.cache_file)
    if sampling.idle:
        flags = ", ".join("--" + name.replace("_", "-") for name in sampling.idle)
        what = f"without a --temperature decoding is greedy; ignored: {flags}"
        print(f"openelm: {what}", file=sys.stderr)
    prompt = read_prompt(args)
    engine, draft = load_model(args.model, args), load_draft(args)
    from openelm_mlx.engine.generation import stream_generate

    cache = None if args.cache_file is None else cache_from(args.cache_file, engine, engine_options)
    others: Any = {"engine_options": engine_options, "prompt_cache": cache, "draft": draft}
    events = []
    with Waiting("reading the prompt") as waiting:
        others["progress"] = waiting.progress
        with closing(stream_generate(engine, prompt, sampling, options, **others)) as stream:
            for event in stream:
                events.append(event)
                if args.json:
                    waiting.say(f"{len(events)} tokens")
                else:
                    waiting.end()
                    print(event.text, end="", flush=True)
    if args.json:
        print(json.dumps(as_dict(engine, prompt, events, options), ensure_ascii=False))
    else:
        print()
        if context_full(events[-1], options):
            length = engine.config.max_context_length
            what = f"the text ends here because the context of {length} tokens is full"
            print(what, file=sys.stderr)
        print(summary(events[-1].stats), file=sys.stderr)
    if cache is not None:
        if is_new:  # somebody may have made it meanwhile
            check_new(args.cache_file, "--cache-file")
        cache.save(args.cache_file, engine)
    return 0


def as_dict(
    engine: Engine, prompt: str, events: list[Event], options: GenerationOptions
) -> dict[str, Any]:
    """Return the result for JSON."""
    last = events[-1]
    result: dict[str, Any] = {
        "model": engine.name,
        "prompt": prompt,
        "text": "".join(event.text for event in events),
        "tokens": [event.token for event in events],
        "finish_reason": last.finish_reason,
        "context_full": context_full(last, options),
        "stats": None if last.stats is None else asdict(last.stats),
    }
    if options.logprobs is not None:
        result["logprobs"] = [logprobs(engine, event) for event in events]
    return result


def check_cache_file(path: str) -> None:
    """Raise `OptionError` for a file that a prefix cache cannot be read from and written to."""
    check_writable(path, "--cache-file")
    name_for_mlx(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would never end
        raise OptionError(f"--cache-file {path} is not a regular file; give another name")


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt, all of stdin for "-"; print a hint if it ends with a space."""
    prompt: str = args.words if args.prompt is None else args.prompt
    if prompt == "-":
        prompt = utf8_stdin().read()
        if not args.keep_newline:
            prompt = without_line_end(prompt)
    if prompt.endswith(" "):
        print(f"openelm: {SPACE_HINT}", file=sys.stderr)
    return prompt


def context_full(last: Event, options: GenerationOptions) -> bool:
    """Return whether a full context cut the text, rather than `max_tokens`."""
    generated = 0 if last.stats is None else last.stats.generation_tokens
    return last.finish_reason == "length" and generated < options.max_tokens


def logprobs(engine: Engine, event: Event) -> dict[str, Any]:
    """Return the log probability of a token, and the likeliest tokens with their texts."""

    def entry(token: int, value: float | None) -> dict[str, Any]:
        return {"token": token, "text": text_of(engine, token), "logprob": value}

    return entry(event.token, event.logprob) | {
        "top": [entry(*pair) for pair in event.top_logprobs]
    }


def text_of(engine: Engine, token: int) -> str:
    """Return what a token spells alone, with its leading space; parts of characters as U+FFFD."""
    return engine.tokenizer.piece_bytes(token).decode("utf-8", "replace")


def cache_from(path: str, engine: Engine, options: EngineOptions) -> PromptCache:
    """Load the cache saved at `path`, of the kind that the options ask for, or make a new one."""
    from openelm_mlx.engine.prompt_cache import PromptCache

    if os.path.exists(path):
        return PromptCache.load(path, engine, options)
    return PromptCache()


def summary(stats: GenerationStats | None) -> str:
    """Return one line of statistics, as generate and chat show it."""
    if stats is None:
        return "nothing was generated"
    per_second = stats.generation_tokens_per_second
    rate = f" at {per_second:.1f} tokens/s" if stats.generation_tokens > 1 else ""
    reused = f" ({stats.reused_tokens} of them from the cache)" if stats.reused_tokens else ""
    if stats.drafted_tokens:
        accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted accepted"
        rate += f" ({accepted}, {stats.tokens_per_pass:.2f} a pass)"
    return (
        f"prompt {stats.prompt_tokens} tokens{reused}, "
        f"first token after {stats.time_to_first_token_seconds:.2f} s; "
        f"generated {stats.generation_tokens}{rate}; "
        f"peak memory {stats.peak_memory_bytes / 1e6:.0f} MB"
    )
