"""`openelm finetune`: a model learns from examples."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import Waiting, rough
from openelm_mlx.cli.options import add_flags, given_fields, given_path, load_model
from openelm_mlx.engine.options import ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.options import FinetuneOptions

if TYPE_CHECKING:
    from openelm_mlx.finetune.loop import Run
    from openelm_mlx.finetune.report import FinetuneReport

DESCRIPTION = """Fine-tune a model on your own examples: train a LoRA or DoRA adapter, which leaves
the weights as they are, or train all weights (--method full). FOLDER gets the weights with the
lowest validation loss, a model card, the metrics of every step, and a plot of the losses.

DATA is a JSONL file with one example per line, a text file, or a dataset on Hugging Face, as
owner/name:

  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
  {"prompt": "Hi", "completion": "Hello!"}
  {"text": "Once upon a time"}
  {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}     preference pairs: DPO

Every example is seen once per epoch. Ctrl-C saves a checkpoint, and the same command with --resume
continues the run; it also continues a run that was killed."""

EXAMPLES = """examples:
  openelm finetune 270m pairs.jsonl -o my-adapter
  openelm chat 270m --adapter my-adapter                     talk to the result
  openelm finetune 270m pairs.jsonl --show-batch             see which tokens are trained
  openelm finetune 270m pairs.jsonl --dry-run                see steps and memory, train nothing
  openelm finetune 270m pairs.jsonl -o my-adapter --resume   continue a run that was stopped
  openelm finetune 1.1b pairs.jsonl -o mine --bits 4 --batch 1 --accumulate 8
  openelm finetune 270m data.jsonl -o mine --recipe corenet-dora --validation held-out.jsonl
  openelm finetune 270m-instruct preferences.jsonl -o mine --recipe instruct-dpo
  mlx.launch -n 2 -- python -m openelm_mlx finetune 270m pairs.jsonl -o mine
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a model on your own examples",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    text = "the model to fine-tune: a name from `openelm models`, a folder or a file"
    parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument(
        "data", metavar="DATA", help="the examples: a file, a folder, or owner/name"
    )
    text = "write the result to this folder, which must be new"
    parser.add_argument("-o", "--output", dest="folder", metavar="FOLDER", help=text)
    text = "continue the stopped run in FOLDER, or start it if there is none"
    parser.add_argument("--resume", action="store_true", help=text)
    instead = parser.add_mutually_exclusive_group()
    text = "print the first batch token by token, with the trained ones marked, and exit"
    instead.add_argument("--show-batch", action="store_true", help=text)
    text = "print the numbers of examples, steps and tokens, and the memory needed, and exit"
    instead.add_argument("--dry-run", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_flags(parser, FinetuneOptions)
    add_flags(parser, ModelOptions, skip=("adapter",))
    how: Any = {"default": argparse.SUPPRESS, "metavar": "FOLDER"}
    text = "train the adapter in this folder further; its method, rank, alpha and targets stay"
    parser.add_argument("--adapter", **how, help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = given_fields(FinetuneOptions, args)
    asked = FinetuneOptions.of(None, **given)  # mistakes are told before a model is loaded
    check(args, asked)
    if asked.method == "full" and not hasattr(args, "dtype"):
        args.dtype = "float32"  # in narrower types small updates are rounded away
    only_look = args.show_batch or args.dry_run
    folder = None if only_look else checked_folder(args)
    engine = load_model(args.model, args)
    options = FinetuneOptions.of(engine.config, **given)
    from openelm_mlx.finetune.run import prepared

    with Waiting("reading the examples"):
        run = prepared(engine, args.data, folder, options, args.resume)
    if folder is not None:
        return train(run, args)
    if run.ranks.rank == 0:
        print_batch(run) if args.show_batch else print_plan(run, args.json)
    return 0


def train(run: Run, args: argparse.Namespace) -> int:
    """Train to the end or to Ctrl-C; of several processes the first one speaks."""
    from openelm_mlx.cli.training import Progress
    from openelm_mlx.stopping import StopKey

    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))  # shows the cursor again
    first = run.ranks.rank == 0
    if first:
        print(*run.notices, *plan_of(run), sep="\n", file=sys.stderr)
    try:
        with Progress(run.folder, quiet=not first) as progress, StopKey() as stop:
            report = run.whole(progress, stop)
    except KeyboardInterrupt:
        if first:
            what = f"stopped after {run.standing.step:,} of {run.steps:,} steps"
            print(f"{what}; {run.folder} has the checkpoint. To continue:", file=sys.stderr)
            print(f"  {going_on()}", file=sys.stderr)
        return 130
    if first:
        for note in report.notes[len(run.notices) :]:
            print(note, file=sys.stderr)
        show(report, args)
    return 0


def check(args: argparse.Namespace, options: FinetuneOptions) -> None:
    """Raise an error for what cannot be done together, or lacks a package or its data."""
    from openelm_mlx.finetune import logs

    if options.method == "full" and hasattr(args, "bits"):
        what = f"--method full trains the weights, which --bits {args.bits} would quantize"
        raise OptionError(f"{what}; leave out one of the two")
    logs.check(options.log)
    check_data(args.data, options)


def check_data(data: str, options: FinetuneOptions) -> None:
    """Raise `FinetuneError` for data, or a validation, that is no file and no dataset."""
    from openelm_mlx.finetune.sources import dataset_of

    for name in (data, options.validation):
        path = None if name is None else Path(name).expanduser()
        if path is not None and not path.is_file():
            dataset_of(str(name), path)


def checked_folder(args: argparse.Namespace) -> Path:
    """Return the path of -o. Raises `OptionError` if the result could not be written there."""
    from openelm_mlx.files import check_writable
    from openelm_mlx.finetune.state import REPORT, check_folder

    if args.folder in (None, "", "-"):
        what = "is missing" if args.folder is None else f"is {args.folder!r}"
        raise OptionError(f"-o {what}; give the name of a new folder for the result")
    folder = given_path(args.folder)
    check_folder(folder, args.resume, args.data, getattr(args, "validation", None))
    check_writable(folder / REPORT if folder.is_dir() else folder, "-o", not folder.is_dir())
    return folder


def going_on() -> str:
    """Return the command that resumes the run of this one."""
    words = sys.argv[1:]
    return shlex.join(["openelm", *words, *([] if "--resume" in words else ["--resume"])])


def print_batch(run: Run) -> None:
    """Print the first batch token by token."""
    from rich.console import Console

    from openelm_mlx.finetune.records import PAIRS
    from openelm_mlx.finetune.shown import show_batch

    console = Console()
    how = {"pairs": run.data.kind == PAIRS, "plain": not console.is_terminal}
    text = show_batch(run.engine, run.plan.batches(1)[0], **how)
    if console.is_terminal:
        console.print(text)
    else:  # in lines as they are; rich would take a reader that leaves for an error
        print(text.plain)


def print_plan(run: Run, as_json: bool) -> None:
    """Print what would be trained: as one JSON object, or in words."""
    if as_json:
        print(json.dumps(facts_of(run)))
    else:
        print(*run.notices, *plan_of(run), sep="\n")


def facts_of(run: Run) -> dict[str, Any]:
    """Return what a run would do, for JSON."""
    plan, options = run.plan, run.options
    return {
        "model": run.engine.name,
        "method": options.method,
        "parameters": sum(array.size for array in run.weights.values()),
        "base_parameters": run.engine.config.num_parameters,
        "data": run.data.name,
        "examples": len(run.data.train),
        "validation_examples": len(run.data.validation),
        "length": run.length,
        "batch": options.batch,
        "accumulate": options.accumulate,
        "processes": run.ranks.size,
        "steps": run.steps,
        "epochs": plan.epoch(run.steps),
        "tokens": sum(map(plan.tokens, range(1, run.steps + 1))),
        "padding": plan.waste,
        "memory": run.fit["predicted"],
    }


def plan_of(run: Run) -> list[str]:
    """Return what a run would do, in lines for people."""
    facts = facts_of(run)
    several = "" if run.ranks.size == 1 else f" in {run.ranks.size} processes"
    steps = f"{facts['steps']:,} step{'s' * (facts['steps'] != 1)}"
    epochs = f"{facts['epochs']:.3g} epoch{'s' * (facts['epochs'] != 1)}"
    memory = {name: size / 1e6 for name, size in facts["memory"].items() if name != "shape"}
    total = memory.pop("total")
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in memory.items())
    return [
        f"{facts['data']}: {facts['examples']:,} example{'s' * (facts['examples'] != 1)} to train "
        f"on ({run.data.kind}), "
        f"{facts['validation_examples']:,} for validation",
        f"{steps}{several}, {epochs}, {facts['tokens']:,} tokens in rows of "
        f"at most {facts['length']:,}, {facts['padding']:.1%} padding",
        f"{facts['method']}: {facts['parameters']:,} trainable parameters; the model has "
        f"{facts['base_parameters']:,}",
        f"memory: about {total:,.0f} MB ({parts})",
    ]


def show(report: FinetuneReport, args: argparse.Namespace) -> None:
    """Print what was trained and how it is used, or all of the report as JSON."""
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
        return
    print(f"{report.folder}: the weights of step {report.best_step:,}; {report.ended}")
    first, last = report.first_loss, report.last_loss
    if first is not None and last is not None:
        print(f"loss: {first:.4f} in the first step, {last:.4f} in the last")
    first, best = report.first_validation_loss, report.best_validation_loss
    if first is not None and best is not None:
        print(
            f"validation loss: {first:.4f} at first, {best:.4f} at its best, "
            f"{report.last_validation_loss:.4f} at last"
        )
    print(
        f"{report.steps:,} step{'s' * (report.steps != 1)} in {rough(report.seconds)}, "
        f"{report.tokens_per_second:,.0f} tokens/s, "
        f"at most {report.peak_bytes / 1e6:,.0f} MB of memory"
    )
    print(f"try it: {using(report, args)}")


def using(report: FinetuneReport, args: argparse.Namespace) -> str:
    """Return the command that tries the result: by a chat if it was trained to converse."""
    from openelm_mlx.engine.prompts import TEMPLATE

    folder = str(given_path(args.folder))
    model, flags = (folder, []) if report.method == "full" else (args.model, ["--adapter", folder])
    if report.method != "full":
        given = given_fields(ModelOptions, args)
        for name in ("bits", "group_size", "tokenizer", "revision"):
            flags += ["--" + name.replace("_", "-"), str(given[name])] if name in given else []
    chats = (report.folder / TEMPLATE).exists()
    words = ["chat", model] if chats else ["generate", "Once upon a time", "--model", model]
    return shlex.join(["openelm", *words, *flags])
