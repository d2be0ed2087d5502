"""`openelm evaluate`: a model's scores on benchmarks, beside those that Apple published."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import Waiting, moves_cursor, rough
from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_flags,
    add_model_flags,
    from_args,
    given_path,
    load_beside,
    load_model,
)
from openelm_mlx.engine.options import ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.options import EvaluateOptions
from openelm_mlx.stopping import StopKey

if TYPE_CHECKING:
    from openelm_mlx.evaluate.report import Report

EXAMPLES = """examples:
  openelm evaluate                                    the bundled model, about fairy tales
  openelm evaluate 270m                               the zero-shot table, and ours beside it
  openelm evaluate 1.1b-instruct --suite openllm -o results
  openelm evaluate 270m --tasks mmlu --shots 5 --limit 20
  openelm evaluate 270m --bits 4 --against 270m       what 4 bits change, question by question
  openelm evaluate 270m --adapter FOLDER --against 270m             with an adapter and without
  openelm evaluate my-model --include FOLDER --tasks my_quiz        without a network
  mlx.launch -n 2 -- python -m openelm_mlx evaluate 270m -o results
"""

DESCRIPTION = """Ask a model the questions of benchmarks, through lm-eval, and show its scores, with
Apple's beside them where there are any. Without --suite and --tasks a model of a published size is
asked the zero-shot suite, and any other the questions about fairy tales that come with the package.
The same command goes on after Ctrl-C or a kill.

--dtype, --tokenizer and the questions are for both models of --against; --bits, --adapter and
--revision are for MODEL alone.

The exit status is 0 if everything was evaluated, whatever the scores, 2 if the command is wrong, a
task cannot be had or a file cannot be written, and 130 after Ctrl-C."""

BAR_SECONDS = 2.0  # a shorter evaluation shows none
NOTICE_SECONDS = 60.0  # between lines about the progress, where there is no terminal


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="scores on benchmarks, beside those that Apple published",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    what: Any = {"metavar": "MODEL", "nargs": "?", "default": "openelm-tiny"}
    parser.add_argument("model", **what, help=MODEL_HELP)
    text = "ask this model the same, as it is stored, and show how the two differ"
    parser.add_argument("--against", metavar="MODEL", help=text)
    text = "write the report, its picture and lm-eval's own files into this folder"
    parser.add_argument("-o", "--output", dest="folder", metavar="FOLDER", help=text)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_flags(parser, EvaluateOptions)
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = from_args(EvaluateOptions, args)
    if hasattr(args, "tasks") and not options.tasks:  # as of a variable of the shell that is empty
        raise OptionError("--tasks names no task; give one, or leave it out")
    folder = None if args.folder is None else check_folder(args.folder)
    from openelm_mlx.device import mx
    from openelm_mlx.engine.hub import resolve_model
    from openelm_mlx.engine.ranks import launched
    from openelm_mlx.evaluate.evaluation import evaluate, named_tasks
    from openelm_mlx.evaluate.store import Store

    with Waiting("reading the names of the tasks"):
        index = named_tasks(options)
    if args.against is not None:  # it is loaded last, and found before the first one is asked
        resolve_model(args.against, tokenizer=from_args(ModelOptions, args).tokenizer)
    ranks = launched()
    first = ranks.rank == 0
    asked = [(load_model, args.model)]
    asked += [] if args.against is None else [(load_beside, args.against)]
    reports: list[Report] = []
    with ExitStack() as stack:
        stores = []
        for load, name in asked:
            engine = load(name, args)
            stores.append(stack.enter_context(Store(engine, options.batch_tokens)))
            label = name if load is load_beside else described(args)
            progress = Progress(label, quiet=not first)
            try:
                with progress:
                    how: Any = {"store": stores[-1], "progress": progress, "index": index}
                    reports.append(replace(evaluate(engine, options, **how), model=label))
            except KeyboardInterrupt:
                if first:
                    print(f"stopped: {progress}; the same command goes on", file=sys.stderr)
                return 130
            del engine
            gc.collect()  # lm-eval's objects refer to each other
            mx.clear_cache()  # the next model has the memory of this one
        if first:
            try:
                show(reports, args.json)
            finally:  # also if nobody reads what is printed, as `| head`
                if folder is not None:
                    write(reports, folder)
        ranks.gather("")  # the first has written, so that nobody's answers are needed any more
        for store in stores:
            store.finish()
    return 0


def described(args: argparse.Namespace) -> str:
    """Return the name of MODEL with what loading makes of it, as it may be compared with itself."""
    bits, adapter = (vars(args).get(name) for name in ("bits", "adapter"))
    quantized = "" if bits is None else f" at {bits} bits"
    return f"{args.model}{quantized}" + ("" if adapter is None else f" with {Path(adapter).name}")


class Progress:
    """Says how far a model's passes are: a bar on a terminal, else a line each minute.

    It is what `answers` calls. From the first pass on Ctrl-C ends between two passes.
    """

    def __init__(
        self, name: str, quiet: bool, read: str = "the tasks", unit: str = "answers"
    ) -> None:
        self.name, self.quiet, self.unit = name, quiet, unit
        self.waiting = Waiting(f"reading {read} for {name}")
        self.stack = ExitStack()
        self.stop: StopKey | None = None
        self.bar: Any = None
        self.answered, self.of, self.tokens, self.most, self.before = 0, 0, 0, 0, 0
        self.begun = self.noticed = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet:
            self.stack.enter_context(self.waiting)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def __str__(self) -> str:
        if not self.of:
            return f"{self.name}: no {self.unit} yet"
        return f"{self.name}: {self.answered:,} of {self.of:,} {self.unit}"

    def __call__(self, answered: int, of: int, tokens: int, most: int) -> None:
        now = time.monotonic()
        if self.stop is None:
            self.stop = self.stack.enter_context(StopKey())
        if most != self.most or tokens < self.tokens:  # other requests than before
            self.begun, self.before = now, tokens
        self.answered, self.of, self.tokens, self.most = answered, of, tokens, most
        self.stop.check()
        if self.quiet:
            return
        if moves_cursor(sys.stderr):
            self.draw(now)
        elif now - self.noticed > NOTICE_SECONDS:
            self.noticed = now
            print(f"{self}{self.left(now)}", file=sys.stderr, flush=True)

    def left(self, now: float) -> str:
        """Say how long the rest takes at the rate so far."""
        if self.tokens == self.before:
            return ""
        each = (now - self.begun) / (self.tokens - self.before)
        return f"; about {rough(each * (self.most - self.tokens))} left"

    def draw(self, now: float) -> None:
        """Move the bar, which appears once the passes have taken `BAR_SECONDS`."""
        if self.bar is None:
            if now - self.begun < BAR_SECONDS:
                return self.waiting.say(str(self))
            from rich import progress
            from rich.console import Console

            self.waiting.end()
            columns = (progress.BarColumn(20), progress.TextColumn("{task.description}"))
            how: Any = {"console": Console(stderr=True), "transient": True}
            how |= {"refresh_per_second": 2, "speed_estimate_period": 3600}
            how["redirect_stdout"] = False  # `quiet` has its own, which ends before the bar
            self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), **how)
            self.stack.enter_context(self.bar)
            self.task = self.bar.add_task(str(self), completed=self.before)
        where: Any = {"total": self.most, "completed": self.tokens, "description": str(self)}
        self.bar.update(self.task, **where)
        return None


def check_folder(name: str) -> Path:
    """Return the path of -o. Raises `OptionError` if the results could not be written there."""
    from openelm_mlx.files import check_new, check_writable

    if name in ("", "-"):
        what = "- is no folder, and the report is printed anyway" if name else "is empty"
        raise OptionError(f"-o {what}; give the name of a folder")
    folder = given_path(name)
    there = os.path.isdir(folder)
    if not there:
        check_writable(folder, "-o", folder=True)
        if os.path.lexists(folder):  # a file, or a link to what is not there
            raise OptionError(f"-o {folder} is not a folder; give the name of one")
    for file in ("report.json", "report.md", "report.png") if there else ():
        check_writable(folder / file, "-o")
        check_new(folder / file, "-o")
    return folder


def show(reports: list[Report], as_json: bool) -> None:
    """Print the reports and how they differ: as JSON, drawn on a terminal, or in Markdown."""
    if as_json:
        print(json.dumps(as_dict(reports), ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        for number, part in enumerate(parts(noted_once(reports))):
            console.print(*[""] * (number > 0), part, sep="\n")
    else:
        print(markdown(reports))
    sys.stdout.flush()


def parts(reports: list[Report]) -> list[Any]:
    """Return what is shown: a report for each model, then how the two differ."""
    from openelm_mlx.evaluate.differences import Differences

    return [*reports, *([Differences.of(*reports)] if len(reports) > 1 else [])]


def noted_once(reports: list[Report]) -> list[Report]:
    """Return the reports without the notes that the first one has already."""
    first, *others = reports
    new = [[note for note in other.notes if note not in first.notes] for other in others]
    return [
        first,
        *(replace(one, notes=tuple(left)) for one, left in zip(others, new, strict=True)),
    ]


def markdown(reports: list[Report]) -> str:
    return "\n\n".join(str(part).strip() for part in parts(noted_once(reports)))


def as_dict(reports: list[Report]) -> dict[str, Any]:
    """Return a report for JSON, with that of the other model and the differences in it."""
    found, *more = (part.as_dict() for part in parts(reports))
    return {**found, **dict(zip(("against", "differences"), more, strict=False))}


def write(reports: list[Report], folder: Path) -> None:
    """Write lm-eval's files, the reports and a picture. Raises `OptionError` if one cannot be."""
    from openelm_mlx.evaluate.harness import save
    from openelm_mlx.evaluate.picture import write_picture
    from openelm_mlx.files import replacing, write_json

    check_folder(str(folder))  # somebody may have made them meanwhile
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for report in reports:
            save(report.results, folder)
        write_json(folder / "report.json", as_dict(reports))
        with replacing(folder / "report.md") as new:
            new.write_text(markdown(reports) + "\n", encoding="utf-8")
        write_picture(reports, folder / "report.png")
    except OSError as error:
        raise OptionError(f"-o {folder} cannot be written: {error.strerror or error}") from None
    except OptionError as error:  # matplotlib is an extra of its own, and the rest is written
        print(f"openelm: {folder} has no picture: {error}", file=sys.stderr)
