"""Compare quantizations at equal bytes: uniform, measured and learned ones of this project, and the
tools of mlx-lm.

    python tests/tools/quantization.py checkpoint.pt heldout.txt --bits 3 4 5

Each size is that of uniform affine quantization in groups of 64 with scales in float16. Everything
is chosen and learned on text that the exact model writes, or on --calibration-text; TEXT is only
for the report. All weights are compared as the float32 numbers that the stored ones stand for, in
one model. mlx-lm's tools are called as Python functions: its command lines fetch texts.
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
from typing import Any

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
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.convert.verify import text_batches
from openelm_mlx.device import mx, nn
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.score import Comparison, compare
from openelm_mlx.files import check_writable, read_text
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, matrices

DTYPE = "float16"  # of scales, biases, norms and matrices that are not quantized
LEARNED = ("gptq", "distill")
TOOLS = ("mixed", "dynamic_quant", "awq", "gptq", "dwq")  # of mlx-lm
Weights = dict[str, mx.array]
Result = tuple[Weights, int]  # float32 weights, and the bytes they are stored in
Method = tuple[str, Callable[[], Result]]  # the name in the table, and the work


@dataclass(frozen=True)
class Row:
    """One quantization on the report text, at the size of uniform quantization to `size` bits."""

    size: int
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
        start = f"| {self.size} bits | {self.method} |"
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
    for bits in args.bits:
        budget, base = ours.size(ours.uniform(bits)), math.nan
        theirs = peer_methods(args.peers, folder, tokens, bits, budget)
        for method, work in (*ours.methods(bits), *theirs):
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
            base = kl if method == "uniform" else base
            per_weight = 8 * size / config.num_parameters
            figures = kl, found.p99_kl_divergence, found.top_1_agreement, kl / base
            yield Row(bits, method, size, per_weight, *figures, seconds)


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
            rows = max(1, calibrate.MEASURE_TOKENS // tokens.shape[1])
            low, high = min(args.bits) + 0.5, max(args.bits) + 0.5
            middle, spread = (low + high) / 2, (high - low) / 2
            reference = make_reference(config, exact, tokens[:rows])
            self.losses = measure(reference, self.shapes, fitted(DTYPE), middle, progress, spread)

    def uniform(self, bits: int) -> Plan:
        return dict.fromkeys(matrices(self.shapes), QuantSpec(bits, 64))

    def size(self, plan: Plan) -> int:
        return allocate.plan_bytes(plan, self.shapes, DTYPE)

    def methods(self, bits: int) -> Iterator[Method]:
        yield "uniform", partial(self.rounded, self.uniform(bits), nearest(DTYPE))
        if not hasattr(self, "losses"):
            return
        bpw = 8 * self.size(self.uniform(bits)) / self.config.num_parameters
        plan = allocate.choose(self.losses, self.shapes, DTYPE, bpw)
        if "target-bpw" in self.wanted:
            yield "target-bpw", partial(self.rounded, plan, fitted(DTYPE))
        for method in LEARNED:
            if method in self.wanted:
                yield f"target-bpw + {method}", partial(self.learned, method, plan)

    def rounded(self, plan: Plan, rounding: Rounding) -> Result:
        return dict(rounded_weights(self.exact, plan, rounding)), self.size(plan)

    def learned(self, method: str, plan: Plan) -> Result:
        given = self.config, self.exact, plan, self.tokens, DTYPE, progress
        learned = calibrate.calibrate(method, *given)
        return dict(learned.weights(self.exact)), self.size(plan)


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a folder with mlx-lm: the model and its configuration."""
    from mlx_lm.utils import load_model

    return load_model(folder)


def stored(model: nn.Module) -> Result:
    """Return the weights of an mlx-lm model as they would be stored with scales in `DTYPE`."""
    weights: Weights = {}
    size = 0
    for path, module in model.named_modules():
        own = {f"{path}.{key}": x for key, x in module.items() if isinstance(x, mx.array)}
        for key, x in own.items():
            own[key] = x.astype(DTYPES[DTYPE].mlx) if mx.issubdtype(x.dtype, mx.floating) else x
        size += sum(x.nbytes for x in own.values())
        if "scales" in module:
            spec, name = QuantSpec(module.bits, module.group_size), f"{path}.weight"
            weights[name] = dequantized(name, own, spec)
        else:
            weights |= {key: x.astype(mx.float32) for key, x in own.items()}
    return weights, size


def peer_methods(
    wanted: list[str], folder: Path, tokens: mx.array, bits: int, budget: int
) -> Iterator[Method]:
    """Yield what mlx-lm's tools make of a model at about this size."""
    recipe = {3: "mixed_3_4"}.get(bits, "mixed_4_6")
    linear, embeddings = {3: (2, 8), 4: (4, 4)}.get(bits, (4, 8))
    pairs = (bits - 1, bits + 1, 64), (bits, bits + 1, 128)
    dynamic_name = "dynamic_quant {}/{} bits, groups of {}"
    every: dict[str, list[tuple[Any, ...]]] = {  # tool -> variants: name, work and its arguments
        "mixed": [(recipe, mixed, bits, recipe)],
        "dynamic_quant": [
            (dynamic_name.format(*pair), dynamic, tokens, budget, *pair) for pair in pairs
        ],
        "awq": [("awq (with a configuration of ours)", awq, tokens, bits)],
        "gptq": [
            (f"gptq {linear} bits, embeddings {embeddings}", gptq, tokens, linear, embeddings)
        ],
        "dwq": [(f"dwq, rate {rate:g}", dwq, tokens, bits, rate) for rate in (1e-5, 1e-4)],
    }
    for name, work, *rest in (
        variant for tool in TOOLS if tool in wanted for variant in every[tool]
    ):
        yield f"mlx-lm {name}", partial(work, folder, *rest)


def mixed(folder: Path, bits: int, recipe: str) -> Result:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    model, config = loaded(folder)
    predicate: Any = mixed_quant_predicate_builder(recipe, model)
    quantize_model(model, config, 64, bits, quant_predicate=predicate)
    return stored(model)


def dynamic(folder: Path, tokens: mx.array, budget: int, low: int, high: int, group: int) -> Result:
    """Take its sensitivities, and the lowest threshold whose bytes fit."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    found = estimate_sensitivities(loaded(folder)[0], tokens[:8], low, group, high, group)
    names = [name for name, _ in sorted(found, key=lambda entry: -entry[1])]
    best: Result | None = None
    for count in range(len(names) + 1):
        trial, many = loaded(folder)[0], set(names[:count])

        def spec(path: str, module: nn.Module, many: set[str] = many) -> Any:
            own = {"bits": high if path in many else low, "group_size": group}
            return hasattr(module, "to_quantized") and own

        nn.quantize(trial, group, low, class_predicate=spec)
        result = stored(trial)
        if result[1] > budget:
            break
        best = result
    if best is None:
        raise ValueError(f"{low} bits are larger than the size")
    return best


class Adapter:
    """A model as awq_quantize walks through it: with `.model[embed]`, `.layers` and items."""

    def __init__(self, own: Any) -> None:
        self.own, self.model, self.layers = own, own.transformer, own.layers

    def __contains__(self, key: str) -> bool:
        return key in self.own

    def __getitem__(self, key: str) -> Any:
        return self.own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.own[key] = value


def awq(folder: Path, tokens: mx.array, bits: int) -> Result:
    """Run it with a configuration and an adapter of ours, as it has none for OpenELM."""
    from mlx_lm.quant import awq

    scale: Any = awq.ScaleConfig  # it wants names of modules; its types say modules
    attention = scale(block="attn", prev="attn_norm", layers=["qkv_proj"], kwargs=["mask"])
    scales = [attention, scale(block="ffn", prev="ffn_norm", layers=["proj_1"])]
    config = awq.AWQConfig(
        embed="token_embeddings", lm_head="lm_head", no_clip=["qkv_proj"], scale_configs=scales
    )
    model, _ = loaded(folder)
    sizes = {"bits": bits, "embed_bits": bits, "group_size": 64, "embed_group_size": 64}
    awq.awq_quantize(Adapter(model), tokens[:8], config, n_grid=8, **sizes)
    return stored(model)


def gptq(folder: Path, tokens: mx.array, linear: int, embeddings: int) -> Result:
    """Quantize the linear layers by it; it rounds the embeddings to nearest."""
    from mlx_lm.quant.gptq import gptq_quantize

    model, _ = gptq_quantize(loaded(folder)[0], tokens[:64], linear, 64, embeddings, 64)
    return stored(model)


def dwq(folder: Path, tokens: mx.array, bits: int, rate: float) -> Result:
    """Distil scales and biases in one pass over the calibration text."""
    from mlx_lm.quant.dwq import dwq_quantize

    from openelm_mlx.device import optimizers

    exact, model = loaded(folder)[0], loaded(folder)[0]
    nn.quantize(model, 64, bits)
    texts: Any = tokens.tolist()
    rows = [(row, 0) for row in texts]
    dwq_quantize(
        model,
        lambda batch, index, split: exact(batch),
        optimizers.Adam(rate, bias_correction=True),
        *(rows[4:], rows[:4]),
        batch_size=4,
        max_seq_length=tokens.shape[1],
        seed=17,
        dtype=mx.float32,
    )
    return stored(model)


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
