"""`openelm batch`: a file of requests becomes a file of answers."""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import Waiting, rough
from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_draft_flag,
    add_flag,
    add_flags,
    add_model_flags,
    from_args,
    given_path,
    load_draft,
    load_model,
)
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.files import check_writable
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.stopping import StopKey

if TYPE_CHECKING:
    from openelm_mlx.engine.ranks import Ranks
    from openelm_mlx.server.batch_file import Output
    from openelm_mlx.server.batch_run import Result

EXAMPLES = """examples:
  openelm batch requests.jsonl -o answers.jsonl
  openelm batch requests.jsonl -o answers.jsonl --model 1.1b-instruct --bits 4 --slots 32
  mlx.launch -n 2 -- python -m openelm_mlx batch requests.jsonl -o answers.jsonl
"""

DESCRIPTION = """Answer the requests in a file of OpenAI's batch format, one JSON object a line. The
same command goes on after Ctrl-C, a kill or a power cut: answers that are written stay, and a line
without a seed has one that follows from its custom_id.
The exit status is 0 if every line was answered, 1 if some got an error, 2 if the command is wrong
or a file cannot be written."""

NOTICE_SECONDS = 60.0  # between lines about the progress, where there is no terminal
SHARED = ("slots", "cache_mb")  # options that a server has too


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    text = "requests, one JSON object a line"
    parser.add_argument("input", metavar="FILE", help=text)
    text = "the file of answers, in the order of the requests"
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=text)
    parser.add_argument("--model", default="openelm-tiny", help=MODEL_HELP)
    add_draft_flag(parser)
    group = parser.add_argument_group("batch options")
    for item in fields(ServerOptions):
        if item.name in SHARED:
            add_flag(group, item)
    add_flags(parser, EngineOptions)
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if "-" in (args.input, args.output):
        what = "a batch reads its requests twice, and goes on from its answers after a kill"
        raise OptionError(f"- stands for no file here: {what}; give two files")
    source, target = given_path(args.input), given_path(args.output)
    rows, running = from_args(ServerOptions, args), from_args(EngineOptions, args)
    loading = from_args(ModelOptions, args)
    check_writable(target, "-o")
    if target.exists() and not target.is_file():
        raise OptionError(f"-o {target} is not a regular file; give another name")
    from openelm_mlx.server.batch_file import Input, Output, answers_in, mark_of, remove_parts

    with Waiting(f"reading {source}"):
        lines = Input(source)
        if target.exists() and os.path.samefile(source, target):
            raise OptionError(f"-o {target} has the requests themselves; give another name")
        answers_in(target, lines)
    engine, draft = load_model(args.model, args), load_draft(args)
    from openelm_mlx.engine.prompt_cache import PromptCache, fingerprint
    from openelm_mlx.engine.ranks import launched
    from openelm_mlx.engine.scheduler import BatchEngine
    from openelm_mlx.server.batch_run import AHEAD, Batch

    head = {
        "format": "openelm-mlx batch 1",
        "input": lines.sha256,
        "model": args.model,
        "weights": fingerprint(engine),
        "sampling": str(engine.chat_sampling),
        "options": {**asdict(running), **{k: str(v) for k, v in asdict(loading).items()}},
    }
    mark = mark_of(head)
    if (found := answers_in(target, lines, mark)) is not None:
        remove_parts(target)
        print(f"{target} is complete: {counted(*found)}", file=sys.stderr)
        return int(found[1] > 0)
    ranks = launched()
    output = Output(target, lines, head, ranks.rank)
    meet(ranks, target)
    cache, waiting = PromptCache(rows.cache_mb << 20), AHEAD * rows.slots
    shared: Any = {"draft": draft, "prompt_cache": cache, "max_waiting": waiting}
    batch = Batch(engine, args.model, BatchEngine(engine, rows.slots, running, **shared), mark)
    dealt = array("q", lines.dealt(*ranks))
    left = array("q", (index for index in dealt if not output.done[index]))
    who = "" if ranks.size == 1 else f"process {ranks.rank + 1} of {ranks.size}: "
    failed = 0 if ranks.size > 1 else output.failed
    report = Progress(len(dealt), len(left), failed, who)
    try:
        with report.shown() as show, StopKey() as stop:
            for results in batch.results(map(lines.line, left)):
                output.add([result.text for result in results])
                show(results)
                stop.check()
    except KeyboardInterrupt:
        output.sync()
        print(f"{who}stopped: {report}; the same command goes on", file=sys.stderr)
        return 130
    return finished(output, report)


def finished(output: Output, report: Progress) -> int:
    """Join the parts, say what the answers are, and return the exit status."""
    target, joined = output.target, output.join()
    print(f"{report.who}{report.cost()}", file=sys.stderr)
    if joined is not None:
        print(f"{target} is complete: {counted(*joined)}", file=sys.stderr)
        return int(joined[1] > 0)
    print(f"{report.who}the process that ends last writes {target}", file=sys.stderr)
    return 0


def counted(count: int, failed: int) -> str:
    """Say how many lines there are, and how many of them are errors."""
    errors = f", {failed:,} of them errors" if failed else ""
    return f"{count:,} line{'s' * (count != 1)}{errors}"


def meet(ranks: Ranks, target: Path) -> None:
    """Wait until the processes of `mlx.launch` each have made their part.

    Raises `OptionError` if one has ended, or this one cannot see the part of the first.
    """
    from openelm_mlx.server.batch_file import part_of

    ranks.gather("")
    if ranks.size > 1 and not (part_of(target, 0).exists() or target.exists()):
        what = f"process {ranks.rank + 1} does not see {part_of(target, 0)}"
        raise OptionError(f"{what}; -o must be in a folder that all machines share")


class Progress:
    """Says how far the lines of this process are: a bar on a terminal, else a line each minute."""

    def __init__(self, total: int, left: int, failed: int, who: str) -> None:
        self.total, self.before, self.failed, self.who = total, total - left, failed, who
        self.done, self.new, self.prompt, self.cached = 0, 0, 0, 0
        self.begun = self.noticed = time.monotonic()

    def add(self, results: list[Result]) -> None:
        """Count what has ended."""
        for result in results:
            self.done, self.failed = self.done + 1, self.failed + result.failed
            self.new += result.new_tokens
            self.prompt += result.prompt_tokens
            self.cached += result.cached_tokens

    def __str__(self) -> str:
        done = self.before + self.done
        errors = f", {self.failed:,} errors" if self.failed else ""
        return f"{done:,} of {self.total:,} lines are answered{errors}"

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        return self.new / max(time.monotonic() - self.begun, 1e-9)

    def cost(self) -> str:
        """Say what the lines of this run took."""
        seconds = time.monotonic() - self.begun
        return (
            f"{self.done:,} lines in {seconds:.1f} s: prompts {self.prompt:,} tokens "
            f"({self.cached:,} of them from the cache), "
            f"answers {self.new:,} tokens at {self.rate:,.1f} tokens/s"
        )

    @contextmanager
    def shown(self) -> Iterator[Callable[[list[Result]], None]]:
        """Give the function that takes what has ended."""
        from rich import progress
        from rich.console import Console

        columns = (progress.BarColumn(20), progress.TextColumn("{task.description}"))
        console, hidden = Console(stderr=True), not sys.stderr.isatty()
        how: Any = {"console": console, "transient": True, "refresh_per_second": 2}
        bar = progress.Progress(*columns, progress.TimeRemainingColumn(), disable=hidden, **how)
        task = bar.add_task(str(self), total=self.total, completed=self.before)

        def show(results: list[Result]) -> None:
            self.add(results)
            if results and not hidden:
                text = f"{self}, {self.rate:,.0f} tokens/s"
                bar.update(task, advance=len(results), description=text)
            elif hidden and time.monotonic() - self.noticed > NOTICE_SECONDS:
                self.notice()

        with bar:
            yield show

    def notice(self) -> None:
        """Print a line, as there is no terminal for a bar."""
        self.noticed, left = time.monotonic(), self.total - self.before - self.done
        each = (self.noticed - self.begun) / max(self.done, 1)
        rest = f"; about {rough(each * left)} left" if self.done else ""
        print(f"{self.who}{self}{rest}", file=sys.stderr, flush=True)
