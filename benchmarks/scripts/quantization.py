"""Quantizations at equal bytes: uniform, measured allocation and learned rounding of this project,
and mlx-lm's tools.

    python -m openelm_mlx.benchmarks.scripts.quantization checkpoint.pt heldout.txt --bits 3 4 5

Each size is that of uniform affine quantization in groups of 64 with scales in float16. Everything
is chosen and learned on text that the exact model writes, or on --calibration-text; TEXT is only
for the report. All weights are compared as the float32 numbers that the stored ones stand for, in
one and the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from openelm_mlx.benchmarks.scripts import quantization_peers as peers
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import OpenedModel, open_model
from openelm_mlx.convert.quantize.allocate import choose, make_reference, measure, plan_bytes
from openelm_mlx.convert.quantize.calibrate import calibrate
from openelm_mlx.convert.quantize.functional import logits
from openelm_mlx.convert.quantize.packing import rounded
from openelm_mlx.convert.quantize.planning import (
    MEASURE_TOKENS,
    exact_weights,
    given_tokens,
    written_tokens,
)
from openelm_mlx.convert.verify import text_batches
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.score import compare
from openelm_mlx.files import check_writable, read_text
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, matrices

DTYPE = "float16"
Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Row:
    """One quantization on the report text. `size` is the uniform width whose bytes it may take."""

    size: int
    method: str
    bytes: int
    bits_per_weight: float
    mean_kl: float
    p99_kl: float
    top_1_agreement: float
    ratio: float
    seconds: float
    note: str = ""


class Judge:
    """The report text and what the exact model says of it, computed once."""

    def __init__(self, opened: OpenedModel, exact: Weights, text: Path) -> None:
        self.config = opened.trimmed
        length = min(512, self.config.max_context_length)
        self.batches = text_batches(
            opened.tokenizer.processor.encode(read_text(text, "TEXT")), length
        )
        self.exact = [logits(self.config, exact, tokens) for tokens in self.batches]
        mx.eval(self.exact)

    def __call__(self, weights: Weights) -> tuple[float, float, float]:
        """Return mean and 99th percentile of the KL divergence in nats, and top-1 agreement."""
        known = iter(self.exact)
        found = compare(
            lambda _: next(known), lambda tokens: logits(self.config, weights, tokens), self.batches
        )
        return found.mean_kl_divergence, found.p99_kl_divergence, found.top_1_agreement


def run(model: Path, text: Path, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the table, each as soon as it is known."""
    with tempfile.TemporaryDirectory() as scratch:
        options = ConvertOptions(
            model,
            Path(scratch) / "whole",
            dtype="float32",
            calibrate="distill",
            bits=4,
            calibration_text=args.calibration_text,
            calibration_tokens=args.calibration_tokens,
        )
        opened = open_model(options)
        exact = exact_weights(opened)
        shapes = expected_tensors(opened.trimmed)
        judge = Judge(opened, exact, text)
        say(f"{sum(tokens.size for tokens in judge.batches)} positions of {text.name} are judged")
        given = given_tokens(opened, options)
        tokens = written_tokens(opened, exact, options, None) if given is None else given
        say(f"{tokens.size} tokens of calibration text")
        reference = make_reference(
            opened.trimmed, exact, tokens[: max(1, MEASURE_TOKENS // tokens.shape[1])]
        )
        losses = None
        if any(method in args.methods for method in ("target-bpw", "gptq", "distill")):
            widths = min(args.bits) + 0.5, max(args.bits) + 0.5
            losses = measure(
                reference,
                shapes,
                DTYPE,
                sum(widths) / 2,
                progress,
                spread=(widths[1] - widths[0]) / 2,
            )
        folder = Path(scratch) / "whole"
        convert(ConvertOptions(model, folder, dtype="float32"))
        for bits in args.bits:
            uniform: Plan = dict.fromkeys(matrices(shapes), QuantSpec(bits, 64))
            budget = plan_bytes(uniform, shapes, DTYPE)
            bpw = 8 * budget / opened.trimmed.num_parameters
            base = math.nan

            def row(method: str, work: Callable[[], tuple[Weights, int]], bits: int = bits) -> Row:
                nonlocal base
                start = time.perf_counter()
                try:
                    weights, size = work()
                except (
                    Exception
                ) as error:  # a tool of others may fail in any way; the table says how
                    nothing = math.nan
                    note = f"does not run: {error}"[:120]
                    return Row(bits, method, 0, 0, nothing, nothing, nothing, nothing, 0, note)
                seconds = time.perf_counter() - start
                found = judge(weights)
                base = found[0] if method == "uniform" else base
                return Row(
                    bits,
                    method,
                    size,
                    8 * size / opened.trimmed.num_parameters,
                    *found,
                    found[0] / base,
                    seconds,
                )

            def rounded(plan: Plan) -> tuple[Weights, int]:
                return nearest(exact, plan), plan_bytes(plan, shapes, DTYPE)

            def learned(method: str, plan: Plan) -> tuple[Weights, int]:
                found = calibrate(method, opened.trimmed, exact, plan, tokens, DTYPE, progress)
                return found.stored_weights(DTYPE), plan_bytes(plan, shapes, DTYPE)

            yield row("uniform", partial(rounded, uniform))
            if losses is not None:
                plan = choose(losses, shapes, DTYPE, bpw)
                if "target-bpw" in args.methods:
                    yield row("target-bpw", partial(rounded, plan))
                for method in ("gptq", "distill"):
                    if method in args.methods:
                        yield row(f"target-bpw + {method}", partial(learned, method, plan))
            for name, tool in peers.TOOLS.items():
                if name in args.peers:
                    for variant, work in tool(folder, tokens, bits, budget):
                        yield row(variant, work)


def nearest(exact: Weights, plan: Plan) -> Weights:
    """What rounding to nearest makes of the weights."""
    return {
        name: rounded(array, plan.get(name.removesuffix(".weight")), getattr(mx, DTYPE))
        for name, array in exact.items()
    }


def progress(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        print(
            f"\r{done}/{total} {name:60.60}",
            end="" if done < total else "\r",
            file=sys.stderr,
            flush=True,
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown(rows: list[Row]) -> str:
    """The table, one line a quantization."""
    lines = [
        "| size of | method | bytes | bits/weight | mean KL | p99 KL | top-1 | / uniform |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        if r.note:
            lines.append(f"| {r.size} bits | {r.method} | {r.note} | | | | | |")
        else:
            lines.append(
                f"| {r.size} bits | {r.method} | {r.bytes:,} | {r.bits_per_weight:.3f} | {r.mean_kl:.5f} | "
                f"{r.p99_kl:.4f} | {r.top_1_agreement:.4f} | {r.ratio:.3f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openelm_mlx.benchmarks.scripts.quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a whole model: .pt file or folder"
    )
    parser.add_argument("text", type=Path, metavar="TEXT", help="the text of the report")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[3, 4, 5], help="uniform widths that set the sizes"
    )
    parser.add_argument("--methods", nargs="*", default=["target-bpw", "gptq", "distill"])
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=list(peers.TOOLS), help="tools of mlx-lm"
    )
    parser.add_argument("--calibration-text", type=Path, help="unset is what the model writes")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--output", type=Path, help="rows as JSON lines, written as they come")
    args = parser.parse_args(argv)
    rows = []
    try:
        if args.output is not None:
            check_writable(args.output, "--output")
        for row in run(args.model, args.text, args):
            rows.append(row)
            say(markdown([row]).splitlines()[-1] + f" {row.seconds:.0f} s")
            if args.output is not None:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    except OpenELMError as error:
        parser.exit(2, f"openelm: {error}\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
