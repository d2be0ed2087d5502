"""`openelm benchmark`: how fast this machine runs a model, how far that is from what it could be,
and who is faster.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.cli.options import add_flags, from_args
from openelm_mlx.errors import BenchmarkError, OpenELMError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openelm_mlx.benchmarks.measure.harness import Tick
    from openelm_mlx.benchmarks.results.document import Document

EXAMPLES = """examples:
  openelm benchmark                                  the bundled model, under 2 minutes
  openelm benchmark --suite quick --peers mlx-lm     and against mlx-lm, on the same weights
  openelm benchmark 270m --bits 4 8 --prompt-tokens 64 512 --output mine.json
  openelm benchmark --random-weights 1.1b --bits 4   a published size, nothing downloaded
  openelm benchmark --suite paper --report paper.html --plot paper.png
  openelm benchmark --compare before.json after.json exit status 1 if anything became slower
  openelm benchmark --predict m3-max                 what a chip that you do not own would do

The table shows medians, with the interquartile range in brackets; its notes say how they came
about. On a terminal it is drawn, into a pipe or file it is Markdown: paste it into an issue as it
is. Ctrl-C keeps what was measured.
"""
OUTPUTS = {
    "output": "everything as JSON, for --compare and for benchmarks/results",
    "csv": "one line per case",
    "markdown": "the table",
    "plot": "pictures, .png or .svg; needs matplotlib",
    "report": "one HTML page with tables, pictures and machine facts",
}


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="tokens per second, memory and loss, against peers and physics",
        description="Measure a model on this machine.",
        epilog=EXAMPLES,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="default: openelm-tiny")
    add_flags(parser, BenchmarkOptions)
    out = parser.add_argument_group("what to write")
    for name, text in OUTPUTS.items():
        out.add_argument(f"--{name}", metavar="FILE", help=text)
    text = "print one JSON object, also with --compare and --predict"
    out.add_argument("--json", action="store_true", help=text)
    other = parser.add_argument_group("instead of measuring")
    text = "significant changes from the first result to the second"
    other.add_argument("--compare", nargs=2, metavar="FILE", help=text)
    text = "show, plot or report a result measured before"
    other.add_argument("--show", metavar="FILE", help=text)
    text = "expected tokens/s of a chip, as in m3-max, or of the one of a result; list shows them"
    other.add_argument("--predict", metavar="CHIP|FILE", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    refuse_outputs(args)
    if args.compare:
        before, after = args.compare
        return compare(before, after, args.json)
    if args.predict:
        return predict(args)
    check_targets(args)
    if args.show:
        from openelm_mlx.benchmarks.results.document import load

        document = load(args.show)
    else:
        document = measure(args)
    write(document, args)
    if document.partial and not args.show:
        return 130
    from openelm_mlx.benchmarks.measure.run import failed

    return 1 if failed(document) else 0


def refuse_outputs(args: argparse.Namespace) -> None:
    """Raise `OptionError` for files that would not be written: some results are printed only."""
    what = "--compare" if args.compare else "--predict" if args.predict else None
    for name in OUTPUTS if what else ():
        if getattr(args, name):
            why = "which prints its result; use --json, or > FILE"
            raise OptionError(f"--{name} does not go with {what}, {why}")


def measure(args: argparse.Namespace) -> Document:
    options = from_args(BenchmarkOptions, args, command=command_line())
    from openelm_mlx.benchmarks.measure.run import run as run_benchmark

    with progress_bar() as tick:
        return run_benchmark(options, tick)


def command_line() -> str:
    """Return what the user typed, with paths cut to their last part: results are shared."""
    # a name on the Hub has a slash too, but neither first nor after dots
    folders = re.compile(r"(^|[= ])(~|\.\.?)?/.*/")
    return shlex.join(["openelm", *(folders.sub(r"\1", word) for word in sys.argv[1:])])


@contextmanager
def progress_bar() -> Iterator[Tick | None]:
    """Show a bar with an estimate on a terminal's stderr, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = BarColumn(20), TaskProgressColumn(), TimeRemainingColumn()
    text = TextColumn("{task.description}")
    # it is drawn between trials only: a thread that draws during them would be measured with them
    bars = Bars(*columns, text, console=console, transient=True, auto_refresh=False)
    bars.speed_estimate_period = 3600
    task = bars.add_task("loading", total=None)

    def tick(label: str | None, work: float) -> None:
        if label is None:
            bars.update(task, total=work, refresh=True)
        else:
            fitting = label[: max(console.width - 40, 0)]
            bars.update(task, advance=work, description=fitting, refresh=True)

    with bars:
        yield tick


def check_targets(args: argparse.Namespace) -> None:
    """Raise an `OpenELMError`, before anything is measured, for what could not be written."""
    from openelm_mlx.files import check_new, check_writable

    for name in OUTPUTS:
        if (target := getattr(args, name)) is not None:
            check_new(target, f"--{name}")
            check_writable(target, f"--{name}")
    if args.plot:
        from openelm_mlx.benchmarks.results.plots import check_plot

        check_plot(args.plot)


def write(document: Document, args: argparse.Namespace) -> None:
    """Print the result, then write the files, the most valuable one first.

    What fails keeps nothing else from being written. Raises `BenchmarkError` for all that failed,
    and for a file that somebody has made since the start.
    """
    from openelm_mlx.benchmarks.results import tables
    from openelm_mlx.benchmarks.results.document import save, write_file
    from openelm_mlx.benchmarks.results.page import write_page
    from openelm_mlx.benchmarks.results.plots import write_plot
    from openelm_mlx.files import check_new

    writers: dict[str, Callable[[str], None]] = {
        "output": lambda path: save(document, path),
        "csv": lambda path: write_file(path, tables.csv_text(document)),
        "markdown": lambda path: write_file(path, tables.markdown(document)),
        "plot": lambda path: write_plot(document, path),
        "report": lambda path: write_page(document, path),
    }
    problems = []
    try:
        show(document, args.json)
    finally:  # a reader of stdout who has left keeps no file from being written
        for name, writer in writers.items():
            if (path := getattr(args, name)) is not None:
                try:
                    check_new(path, f"--{name}")
                    writer(path)
                except OptionError as error:
                    problems.append(str(error))
                except OpenELMError as error:
                    problems.append(f"--{name}: {error}")
    if problems:
        raise BenchmarkError("; ".join(problems))


def show(document: Document, as_json: bool) -> None:
    """Print the result as JSON, as a drawn table on a terminal, or as Markdown."""
    from openelm_mlx.benchmarks.results import tables
    from openelm_mlx.benchmarks.results.document import to_json

    if as_json:
        print(to_json(document), end="")
    elif sys.stdout.isatty():
        from rich.console import Console

        tables.show(document, Console())
    else:
        print(tables.markdown(document), end="")
    sys.stdout.flush()


def compare(before: str, after: str, as_json: bool) -> int:
    """Print what has changed; the exit status is 1 if something became significantly worse."""
    import openelm_mlx.benchmarks.results.compare as comparing
    from openelm_mlx.benchmarks.results.document import load

    comparison = comparing.compare(load(before), load(after))
    if as_json:
        print(json.dumps(comparing.as_dict(comparison)))
    elif sys.stdout.isatty():
        from rich.console import Console

        comparing.show(comparison, Console())
    else:
        print("\n".join(comparing.lines(comparison)))
    return 1 if comparison.regressed else 0


def predict(args: argparse.Namespace) -> int:
    """Print what a model of kernels and bytes expects, checked against the results that we have."""
    from openelm_mlx import benchmarks
    from openelm_mlx.benchmarks.hardware import find_chip
    from openelm_mlx.benchmarks.ledger.predict import show
    from openelm_mlx.benchmarks.results.document import load

    sizes, chip = vars(args).get("random_weights") or args.models, args.predict
    paths = sorted((Path(benchmarks.__file__).parent / "results").glob("*.json"))
    documents = [load(path) for path in paths]
    if chip.endswith(".json"):
        documents.append(load(chip))
        machine = documents[-1].machine
        chip = find_chip(machine.chip or "", machine.gpu_cores)
    show(chip, sizes, documents, args.json)
    return 0
