"""`openelm convert`: weights as Apple published them become a folder for MLX."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from openelm_mlx.cli.display import rough
from openelm_mlx.cli.options import add_flags, from_args

if TYPE_CHECKING:
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.record import ConversionReport

EXAMPLES = """examples:
  openelm convert checkpoint.pt -o openelm-270m              CoreNet's file, config.yaml beside it
  openelm convert apple/OpenELM-270M -o openelm-270m-4bit --bits 4
  openelm convert 270m -o small --dtype bfloat16 --target-bpw 3.5 --calibrate gptq --max-kl 0.1
  openelm convert corenet:1.1b-lora -o commonsense           Apple's adapter, fetched and merged
  openelm convert openelm-270m -o openelm-270m.gguf --bits 8 --max-kl 0.01
  openelm convert mine.pt -o mine --head-dim 64 --tokenizer tokenizer.model --verify
"""


def register(commands: Any) -> None:
    from openelm_mlx.convert.options import ConvertOptions

    parser = commands.add_parser(
        "convert",
        help="convert and quantize weights",
        description="Write a model folder that this engine and mlx-lm load. A failed run leaves "
        "nothing behind.",
        epilog=EXAMPLES,
    )
    text = "a .pt file, GGUF file, folder of a model or adapter, hub id, or name: 270m ..."
    parser.add_argument("source", metavar="SOURCE", help=text)
    text = "folder to write, or a GGUF file if it ends in .gguf"
    target: Any = {"dest": "target", "metavar": "PATH", "required": True, "help": text}
    parser.add_argument("-o", "--output", **target)
    text = "print one JSON object: sizes, quantization and losses"
    parser.add_argument("--json", action="store_true", help=text)
    add_flags(parser, ConvertOptions, skip=("source", "target"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report, options = converted(args)
    show(report, options, args.json)
    return 0


def converted(args: argparse.Namespace) -> tuple[ConversionReport, ConvertOptions]:
    """Convert `args.source`, with a bar on a terminal; it is fetched if it is no path."""
    from rich import progress
    from rich.console import Console

    from openelm_mlx.convert.fetch import published
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.pipeline import convert
    from openelm_mlx.convert.targets import check_target
    from openelm_mlx.convert.targets.checks import check_inputs
    from openelm_mlx.engine.hub import is_published

    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))  # removes unfinished files
    if is_published(args.source) and not os.path.exists(args.source):
        published(args.source)  # names and target are checked before gigabytes are fetched
    asked = from_args(ConvertOptions, args)
    check_target(asked)
    check_inputs(asked)
    find_source(args)
    options = from_args(ConvertOptions, args)
    text, name = progress.TextColumn("converting"), progress.TextColumn("{task.description}")
    columns = (text, progress.BarColumn(), name, progress.TimeRemainingColumn())
    console, hidden = Console(file=sys.stderr), not sys.stderr.isatty()
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task, phase = bar.add_task("", total=None), 0

        def show(done: int, total: int, name: str) -> None:
            nonlocal phase
            if total != phase:  # measuring, learning and writing each have a bar and an estimate
                bar.reset(task)
            phase = total
            bar.update(task, completed=done, total=total, description=name)

        return convert(options, show), options


def find_source(args: argparse.Namespace) -> None:
    """Replace a source's name by a path, fetched if need be; get a tokenizer if it lacks one."""
    from pathlib import Path

    from openelm_mlx.convert.fetch import fetch_with_bar
    from openelm_mlx.engine.hub import (
        is_published,
        looks_like_path,
        mirrored_tokenizer,
        missing_tokenizer,
        resolve_model,
    )

    given, path = args.source, Path(os.path.expanduser(args.source))
    tokenizer = getattr(args, "tokenizer", None)
    if os.path.exists(path):
        tokenizer = tokenizer or missing_tokenizer(path, getattr(args, "source_format", None))
    elif is_published(given):
        tokenizer = tokenizer or mirrored_tokenizer()
        args.source = str(fetch_with_bar(given))
    elif not looks_like_path(given):
        resolved = resolve_model(given, tokenizer=tokenizer)
        args.source, tokenizer = str(resolved.folder), resolved.tokenizer or tokenizer
    if tokenizer is not None:
        args.tokenizer = str(tokenizer)
    if args.source != given:  # the path of a cache does not name the model
        args.source_name = given
        if "instruct" in given.lower() and not hasattr(args, "instruct"):
            args.instruct = True


def as_dict(report: ConversionReport, options: ConvertOptions) -> dict[str, Any]:
    """Return the report for JSON, under the names of conversion.json."""
    from openelm_mlx.quantization import config_entry

    found = {
        "target": str(report.target),
        "written": not options.dry_run,
        "parameters": report.parameters,
        "source_bytes": report.source_bytes,
        "bytes": report.written_bytes,
        "bits_per_weight": report.bits_per_weight,
        "dropped_embedding_rows": report.dropped_rows,
        "dtype": report.dtype,
        "dtypes": report.dtypes,
        "notes": list(report.notes),
        "quantization": config_entry(report.plan),
        "source_quantization": dict(report.source_quantization),
        "rounded_again": report.rounded_again,
        "dequantized": report.dequantized,
        "memory_bytes": report.memory_bytes,
        "estimated_seconds": report.seconds,
        "calibration": dict(report.measured),
        "activations": dict(report.activations),
        "verification": None if report.verification is None else dict(report.verification),
    }
    if options.is_gguf:
        del found["quantization"]  # llama.cpp's types are not MLX's
    return found


def show(report: ConversionReport, options: ConvertOptions, as_json: bool) -> None:
    """Print the report: as one JSON object, or in words."""
    if as_json:
        print(json.dumps(as_dict(report, options)))
    else:
        show_report(report, options)


def show_report(report: ConversionReport, options: ConvertOptions) -> None:
    """Print what was written, or would be: sizes, each layer's spec if they differ, losses."""
    from rich.console import Console
    from rich.table import Table

    from openelm_mlx.convert.record import plan_rows
    from openelm_mlx.evaluate.compare import label, losses_shown
    from openelm_mlx.evaluate.perplexity import TEXT_NAME

    if len(set(report.plan.values())) > 1:
        heads, rows = plan_rows(report.plan)
        table = Table(*heads, title="bits/group size", box=None)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    sizes = f"{report.parameters:,} parameters, {report.written_bytes:,} bytes"
    print(f"{report.target}: {sizes}, {report.bits_per_weight:.2f} bits per weight")
    if report.dtypes:
        print(f"types: {report.types_in_words}")
    for note in report.notes:
        print(note)
    if report.loss_of_source is not None:
        print(report.loss_of_source)
    if options.target_bpw is not None and not report.plan:
        print("the plan has to be measured, which a dry run does not do; this size is the most")
    if options.dry_run:
        print(f"memory needed: about {report.memory_bytes / 1e6:,.0f} MB; nothing was written")
    if report.seconds is not None:
        print(f"time needed: about {rough(report.seconds)}, an estimate")
    for name in ("sum_of_losses", "loss_together"):
        if name in report.measured:
            print(f"{label(name)} on calibration text: {report.measured[name]:.6g}")
    if report.verification is not None:
        text = TEXT_NAME if options.verify_text is None else options.verify_text
        print(f"against the source on {text}:")
    for name, value in losses_shown(report.verification or {}):
        print(f"{name}: {value}")
