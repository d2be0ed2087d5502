"""`openelm benchmark`: what this machine does with a model, how far that is from what it could, and
who is faster.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.measure.suites import SUITES
from openelm_mlx.cli.options import real, whole
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.model.config import PUBLISHED
from openelm_mlx.quantization import BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openelm_mlx.benchmarks.measure.run import Progress
    from openelm_mlx.benchmarks.results.document import Document

EXAMPLES = """examples:
  openelm benchmark                                  the bundled model, under 2 minutes
  openelm benchmark --suite quick --peers mlx-lm     and against mlx-lm, on the same weights
  openelm benchmark 270m --bits 4 8 --prompt-tokens 64 512 --output mine.json
  openelm benchmark --random-weights 1.1b --bits 4   a published size, nothing downloaded
  openelm benchmark --suite paper --report paper.html --plot paper.png
  openelm benchmark --compare before.json after.json exit status 1 if anything became slower
  openelm benchmark --predict m3-max                 what a chip that you do not own would do

The table shows medians, with the interquartile range in brackets; its notes say how they came about. On a
terminal it is drawn, into a pipe or file it is Markdown: paste it into an issue as it is. Ctrl-C keeps what
was measured.
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="tokens per second, memory and loss, against peers and physics",
        description="Measure a model on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="default: openelm-tiny")
    what = parser.add_argument_group("what to measure")
    suites = "; ".join(f"{name}: {suite.help}" for name, suite in SUITES.items())
    what.add_argument(
        "--suite", choices=SUITES, default="quick", metavar="NAME", help=f"{suites} (default quick)"
    )
    what.add_argument(
        "--random-weights",
        nargs="+",
        metavar="SIZE",
        default=(),
        help=f"published sizes with random weights, nothing downloaded: {', '.join(PUBLISHED)}",
    )
    what.add_argument(
        "--bits",
        nargs="+",
        type=whole,
        metavar="N",
        default=(),
        help=f"widths of the weights: {', '.join(map(str, BITS))}",
    )
    what.add_argument(
        "--group-size",
        type=whole,
        choices=(32, 64, 128),
        default=64,
        help="with --bits (default 64)",
    )
    what.add_argument("--dtype", choices=FLOATS, help="compute in this type")
    what.add_argument(
        "--prompt-tokens",
        nargs="+",
        type=whole,
        metavar="N",
        default=(),
        help="lengths of the prompt",
    )
    what.add_argument(
        "--generation-tokens",
        nargs="+",
        type=whole,
        metavar="N",
        default=(),
        help="tokens after it",
    )
    what.add_argument(
        "--batch-size",
        nargs="+",
        type=whole,
        metavar="N",
        default=(),
        dest="batch_sizes",
        help="sequences at a time",
    )
    what.add_argument(
        "--cache",
        nargs="+",
        metavar="KIND",
        default=(),
        dest="caches",
        help="how keys and values are kept: plain, kv8, kv4, window-N",
    )
    what.add_argument(
        "--speculation",
        nargs="+",
        metavar="KIND",
        default=(),
        dest="speculations",
        help="none, prompt-lookup, 'draft MODEL'",
    )
    what.add_argument(
        "--trials", type=whole, metavar="N", help="counted runs of each case, at least 5"
    )
    what.add_argument(
        "--minutes",
        type=real,
        metavar="N",
        default=30.0,
        help="length of the soak suite (default 30)",
    )
    what.add_argument(
        "--peers", metavar="NAMES", default="", help="also time these: mlx-lm,llama.cpp,torch"
    )
    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--output",
        metavar="FILE",
        help="everything as JSON, for --compare and for benchmarks/results",
    )
    out.add_argument("--csv", metavar="FILE", help="one line per case")
    out.add_argument("--markdown", metavar="FILE", help="the table")
    out.add_argument("--plot", metavar="FILE", help="pictures, .png or .svg; needs matplotlib")
    out.add_argument(
        "--report", metavar="FILE", help="one HTML page with tables, pictures and machine facts"
    )
    out.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, also with --compare and --predict",
    )
    other = parser.add_argument_group("instead of measuring")
    other.add_argument(
        "--compare",
        nargs=2,
        metavar="FILE",
        help="significant changes from the first result to the second",
    )
    other.add_argument(
        "--show", metavar="FILE", help="show, plot or report a result measured before"
    )
    other.add_argument(
        "--predict",
        metavar="CHIP",
        help="expected tokens/s of a chip, as in m3-max; list shows them",
    )
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
    """Raise `OptionError` for files that would not be written: comparisons and predictions are
    printed only.
    """
    from openelm_mlx.errors import OptionError

    for name in ("output", "csv", "markdown", "plot", "report"):
        if getattr(args, name) and (args.compare or args.predict):
            what = "--compare" if args.compare else "--predict"
            raise OptionError(
                f"--{name} does not go with {what}, which prints its result; use --json, or > FILE"
            )


def measure(args: argparse.Namespace) -> Document:
    from openelm_mlx.benchmarks.measure.run import run as run_benchmark
    from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions

    options = BenchmarkOptions(
        models=tuple(args.models),
        suite=args.suite,
        random_weights=tuple(args.random_weights),
        bits=tuple(args.bits),
        dtype=args.dtype,
        group_size=args.group_size,
        prompt_tokens=tuple(args.prompt_tokens),
        generation_tokens=tuple(args.generation_tokens),
        batch_sizes=tuple(args.batch_sizes),
        caches=tuple(args.caches),
        speculations=tuple(args.speculations),
        trials=args.trials,
        minutes=args.minutes,
        peers=tuple(name.strip() for name in args.peers.split(",") if name.strip()),
        command=command_line(),
    )
    with progress_bar() as progress:
        return run_benchmark(options, progress)


def command_line() -> str:
    """What the user typed, with paths cut to their last part: results are shared."""
    return shlex.join(["openelm", *(re.sub(r"(^|=)/.*/", r"\1", word) for word in sys.argv[1:])])


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar with an estimate on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    columns = (
        BarColumn(20, table_column=Column(no_wrap=True)),
        TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn(
            "{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
    )
    # drawn between trials only: a thread that draws during them would be measured with them
    with Bars(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        speed_estimate_period=3600,
    ) as bars:
        yield Bar(bars, bars.add_task("loading", total=None))


class Bar:
    def __init__(self, bars: Any, task: Any) -> None:
        self.bars, self.task = bars, task

    def total(self, work: float) -> None:
        self.bars.update(self.task, total=work, refresh=True)

    def tick(self, label: str, work: float) -> None:
        self.bars.update(self.task, advance=work, description=label, refresh=True)


def check_targets(args: argparse.Namespace) -> None:
    """Before anything is measured: whether it can be written afterwards. Raises `OptionError` or
    `BenchmarkError`.
    """
    from openelm_mlx.errors import BenchmarkError
    from openelm_mlx.files import check_writable

    for name in ("output", "csv", "markdown", "plot", "report"):
        if (target := getattr(args, name)) is not None:
            check_writable(target, f"--{name}")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg"):
        raise BenchmarkError(f"--plot {args.plot}: give a name that ends in .png or .svg")
    if args.plot and find_spec("matplotlib") is None:
        raise BenchmarkError("--plot needs matplotlib: `pip install 'openelm-mlx[plot]'`")


def write(document: Document, args: argparse.Namespace) -> None:
    """The table or JSON on stdout, then the files, the most valuable one first: what fails takes
    nothing else along.

    Raises `BenchmarkError` for all files that could not be written.
    """
    from openelm_mlx.benchmarks.results import tables
    from openelm_mlx.benchmarks.results.document import save, write_file
    from openelm_mlx.benchmarks.results.plot import write_plot
    from openelm_mlx.benchmarks.results.report import write_report
    from openelm_mlx.errors import BenchmarkError, OpenELMError

    writers: dict[str, Callable[[str], None]] = {
        "output": lambda path: save(document, path),
        "csv": lambda path: write_file(path, tables.csv_text(document)),
        "markdown": lambda path: write_file(path, tables.markdown(document)),
        "plot": lambda path: write_plot(document, Path(path)),
        "report": lambda path: write_report(document, Path(path)),
    }
    problems = []
    try:
        show(document, args.json)
    finally:  # a reader of stdout who has left keeps no file from being written
        for name, writer in writers.items():
            if (path := getattr(args, name)) is not None:
                try:
                    writer(path)
                except OpenELMError as error:
                    problems.append(f"--{name}: {error}")
    if problems:
        raise BenchmarkError("; ".join(problems))


def show(document: Document, as_json: bool) -> None:
    """The result on stdout: JSON, a drawn table on a terminal, or Markdown."""
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
    """Exit status 1 where something has become significantly worse."""
    import json

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
    """From a model of kernels and bytes, checked against the results that come with this
    package.
    """
    from openelm_mlx import benchmarks
    from openelm_mlx.benchmarks.ledger.predict import show
    from openelm_mlx.benchmarks.results.document import load

    paths = sorted((Path(benchmarks.__file__).parent / "results").glob("*.json"))
    show(args.predict, args.random_weights or args.models, map(load, paths), args.json)
    return 0
