"""Compare quantizations at equal bytes: uniform, measured and learned ones of this project, and the
tools of mlx-lm.

    python tests/tools/quantization.py checkpoint.pt heldout.txt --bits 3 4 5

Each size is that of uniform affine quantization in groups of 64 with scales in float16. --targets
takes bits per weight instead, and compares with the uniform plans that fit. Everything is chosen
and learned on text that the exact model writes, or on --calibration-text; TEXT is only for the
report. All weights are compared as the float32 numbers that the stored ones stand for, in one
model. mlx-lm's tools are called as Python functions: its command lines fetch texts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from quantization_peers import DTYPE, TOOLS, Method, Result, Weights, peer_methods

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import allocate, calibrate, exact_weights, logits
from openelm_mlx.convert.quantize.losses import (
    Rounding,
    fitted,
    make_reference,
    measure,
    nearest,
    rounded_weights,
)
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.compare import Comparison, compare
from openelm_mlx.evaluate.perplexity import text_batches
from openelm_mlx.files import check_writable, read_text
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, matrices

LEARNED = ("gptq", "distill")


@dataclass(frozen=True)
class Row:
    """One quantization on the report text, at the size of uniform quantization to `size` bits,
    or at `size` bits per weight.
    """

    size: float
    method: str
    bytes: int = 0
    bits_per_weight: float = math.nan
    mean_kl: float = math.nan
    p99_kl: float = math.nan
    top_1_agreement: float = math.nan
    ratio: float = math.nan
    seconds: float = 0.0
    note: str = ""

    def cells(self) -> str:
        """Return the row as a line of the table."""
        start = f"| {self.size:g} bits | {self.method} |"
        if self.note:
            return f"{start} {self.note} | | | | | |"
        return (
            f"{start} {self.bytes:,} | {self.bits_per_weight:.3f} | {self.mean_kl:.5f} | "
            f"{self.p99_kl:.4f} | {self.top_1_agreement:.4f} | {self.ratio:.3f} |"
        )


def run(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Yield the rows of the table, each as soon as it is known."""
    folder = scratch / "exact"
    text = {name: getattr(args, name) for name in ("calibration_text", "calibration_tokens")}
    options = ConvertOptions(args.model, folder, bits=4, calibrate="distill", **text)
    opened = open_model(options)
    config, exact = opened.trimmed, dict(exact_weights(opened))
    ids = opened.tokenizer.processor.encode(read_text(args.text, "TEXT"))
    batches = text_batches(ids, min(512, config.max_context_length))
    known = [logits(config, exact, tokens) for tokens in batches]
    mx.eval(known)
    say(f"{sum(tokens.size for tokens in batches)} positions of {args.text.name} are compared")
    given = calibrate.given_tokens(opened, options)
    tokens = calibrate.written_tokens(opened, options) if given is None else given
    say(f"{tokens.size} tokens of calibration text")
    ours = OurMethods(args, config, exact, tokens)
    convert(ConvertOptions(args.model, folder, dtype="float32"))
    sizes: list[tuple[float, Iterator[Method]]] = [(bpw, ours.at(bpw)) for bpw in args.targets]
    for bits in args.bits if not args.targets else ():
        budget = ours.size(ours.uniform(bits))
        theirs = peer_methods(args.peers, folder, tokens, bits, budget)
        sizes.append((bits, chain(ours.methods(bits), theirs)))
    known_rows: dict[str, Row] = {}  # of uniform plans, which several targets are compared with
    for bits, methods in sizes:
        base = math.inf
        for method, work in methods:
            if args.targets and method in known_rows:
                base = min(base, known_rows[method].mean_kl)
                continue
            start = time.perf_counter()
            try:
                weights, size = work()
            except Exception as error:  # mlx-lm's tools may fail in any way; the table says how
                if not method.startswith("mlx-lm "):
                    raise
                yield Row(bits, method, note=f"does not run: {error}"[:120])
                continue
            seconds = time.perf_counter() - start
            found = losses(config, weights, batches, known)
            kl = found.mean_kl_divergence
            base = min(base, kl) if method.startswith("uniform") else base
            per_weight = 8 * size / config.num_parameters
            figures = kl, found.p99_kl_divergence, found.top_1_agreement, kl / base
            row = Row(bits, method, size, per_weight, *figures, seconds)
            if method.startswith("uniform"):
                known_rows[method] = row
            yield row


def losses(
    config: OpenELMConfig, weights: Weights, batches: list[mx.array], known: list[mx.array]
) -> Comparison:
    """Compare these weights with the exact ones, whose logits are `known`."""
    exact = iter(known)
    return compare(lambda _: next(exact), lambda tokens: logits(config, weights, tokens), batches)


class OurMethods:
    """Plans of this project at a given size, with and without learned rounding."""

    def __init__(self, args: argparse.Namespace, config: Any, exact: Weights, tokens: mx.array):
        self.wanted, self.config, self.exact, self.tokens = args.methods, config, exact, tokens
        self.shapes = expected_tensors(config)
        if {"target-bpw", *LEARNED} & set(args.methods):
            rows = calibrate.measured_rows(tokens.shape[1])
            targets = args.targets or [bits + 0.5 for bits in args.bits]
            middle = (min(targets) + max(targets)) / 2
            spread = max(targets) - middle
            self.reference = make_reference(config, exact, tokens[:rows])
            given = self.reference, self.shapes, fitted(DTYPE), middle
            self.losses = measure(*given, progress, spread)

    def uniform(self, bits: int) -> Plan:
        return dict.fromkeys(matrices(self.shapes), QuantSpec(bits, 64))

    def size(self, plan: Plan) -> int:
        return allocate.plan_bytes(plan, self.shapes, DTYPE)

    def methods(self, bits: int) -> Iterator[Method]:
        yield "uniform", partial(self.rounded, self.uniform(bits), nearest(DTYPE))
        yield "fitted grids alone", partial(self.rounded, self.uniform(bits), fitted(DTYPE))
        if not hasattr(self, "losses"):
            return
        bpw = 8 * self.size(self.uniform(bits)) / self.config.num_parameters
        plan = self.best(bpw)
        if "target-bpw" in self.wanted:
            yield "target-bpw", partial(self.rounded, plan, fitted(DTYPE))
        for method in LEARNED:
            if method in self.wanted:
                yield f"target-bpw + {method}", partial(self.learned, method, plan)

    def best(self, bpw: float) -> Plan:
        return allocate.best_plan(self.reference, self.losses, self.shapes, DTYPE, bpw)[0]

    def at(self, bpw: float) -> Iterator[Method]:
        """Yield the uniform plans of at most so many bits per weight, and the measured one."""
        for spec in allocate.largest_uniform(self.shapes, DTYPE, bpw):
            plan = dict.fromkeys(matrices(self.shapes), spec)
            for name, rounding in (("MLX's grids", nearest), ("fitted grids", fitted)):
                yield f"uniform {spec}, {name}", partial(self.rounded, plan, rounding(DTYPE))
        yield "target-bpw", partial(self.rounded, self.best(bpw), fitted(DTYPE))

    def rounded(self, plan: Plan, rounding: Rounding) -> Result:
        return dict(rounded_weights(self.exact, plan, rounding)), self.size(plan)

    def learned(self, method: str, plan: Plan) -> Result:
        given = self.config, self.exact, plan, self.tokens, DTYPE, progress
        learned = calibrate.calibrate(method, *given)
        return dict(learned.weights(self.exact)), self.size(plan)


def progress(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        end = "" if done < total else "\r"
        print(f"\r{done}/{total} {name:60.60}", end=end, file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="quantization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="an unquantized model: .pt file or folder")
    add("text", type=Path, metavar="TEXT", help="the text of the report")
    add("--bits", type=int, nargs="+", default=[3, 4, 5], help="uniform bits that set the sizes")
    add("--targets", type=float, nargs="*", default=[], help="bits per weight, instead of --bits")
    add("--methods", nargs="*", default=["target-bpw", *LEARNED])
    add("--peers", nargs="*", default=[], choices=TOOLS, help="tools of mlx-lm")
    add("--calibration-text", type=Path, help="unset is what the model writes")
    add("--calibration-tokens", type=int, default=32768)
    add("--output", type=Path, help="rows as JSON lines, written as they come")
    args = parser.parse_args(argv)
    rows = []
    try:
        if args.output is not None:
            check_writable(args.output, "--output")
        with tempfile.TemporaryDirectory() as scratch:
            for row in run(args, Path(scratch)):
                rows.append(row)
                say(f"{row.cells()} {row.seconds:.0f} s")
                if args.output is not None:
                    with args.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    except OpenELMError as error:
        parser.exit(2, f"openelm: {error}\n")
    print("| size of | method | bytes | bits/weight | mean KL | p99 KL | top-1 | / uniform |")
    print("|" + "---|" * 8, *(row.cells() for row in rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
