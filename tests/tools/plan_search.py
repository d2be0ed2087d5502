"""Search for plans at random, to see how near the measured allocation comes to the best there is.

    python tests/tools/plan_search.py checkpoint.pt heldout.txt --bits 3 4 5 --minutes 20

The search has what no conversion has: it looks at the loss on TEXT itself. From a random plan that
takes no more bytes than uniform quantization in groups of 64, it changes one to three matrices at
random and keeps what loses less; it starts again when nothing was better for a while. When half of
the time is over it goes on from the best plan that there is, that of --target-bpw among them, which
was chosen on text that the model writes. Both are compared on all of TEXT, with the same rounding.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import Weights, allocate, calibrate, exact_weights
from openelm_mlx.convert.quantize.losses import Reference, Spec, fitted, make_reference, measure
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.perplexity import text_batches
from openelm_mlx.files import read_text
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, all_specs, matrices, stem_of

DTYPE = "float16"  # of scales, biases and norms
PATIENCE = 300  # tries without a better plan, after which the search starts again
SEARCHED = 8  # of the rows of TEXT every such one is looked at in the search


@dataclass
class Search:
    """A search for plans of at most `room` bytes."""

    exact: Weights
    reference: Reference
    shapes: Mapping[str, tuple[int, ...]]
    room: int
    random: random.Random
    rounded: dict[tuple[str, Spec], mx.array] = field(default_factory=dict)
    tried: int = 0

    def weights(self, plan: Plan) -> dict[str, mx.array]:
        """Return the float32 weights of a plan. What is rounded once is kept."""
        rounding, found = fitted(DTYPE), {}
        for name, array in self.exact.items():
            key = stem_of(name), plan.get(stem_of(name))
            if key not in self.rounded:
                self.rounded[key] = rounding(key[0], array, key[1])
            found[name] = self.rounded[key]
        return found

    def loss(self, plan: Plan) -> float:
        self.tried += 1
        return self.reference.loss(self.weights(plan))

    def fits(self, plan: Plan) -> bool:
        return allocate.plan_bytes(plan, self.shapes, DTYPE) <= self.room

    def some(self, stem: str) -> QuantSpec:
        columns = self.shapes[f"{stem}.weight"][1]
        return self.random.choice([s for s in all_specs() if columns % s.group_size == 0])

    def start(self) -> dict[str, Spec]:
        """Return a plan of random specs that fits."""
        plan: dict[str, Spec] = {stem: self.some(stem) for stem in matrices(self.shapes)}
        while not self.fits(plan):
            stem = self.random.choice(list(plan))
            plan[stem] = min(plan[stem], self.some(stem), key=lambda s: s.bits if s else 16)
        return plan

    def run(self, seconds: float, ours: Plan) -> tuple[float, dict[str, Spec]]:
        """Return the least loss that was found, and its plan."""
        begin, idle, known = time.monotonic(), 0, False
        best = current = self.tried_start()
        while (spent := time.monotonic() - begin) < seconds:
            if spent > seconds / 2 and not known:
                known, best = True, min(best, (self.loss(ours), dict(ours)), key=lambda e: e[0])
                current, idle = best, 0
            if idle > PATIENCE:
                current, idle = best if known else self.tried_start(), 0
            plan = dict(current[1])
            for stem in self.random.sample(list(plan), self.random.randint(1, 3)):
                plan[stem] = self.some(stem)
            if plan == current[1] or not self.fits(plan):
                continue
            found = self.loss(plan)
            idle += 1
            if found < current[0]:
                current, idle = (found, plan), 0
            best = min(best, current, key=lambda entry: entry[0])
        return best

    def tried_start(self) -> tuple[float, dict[str, Spec]]:
        plan = self.start()
        return self.loss(plan), plan


def run(args: argparse.Namespace) -> None:
    """Print a line for each size and seed."""
    options = ConvertOptions(args.model, Path("none"), target_bpw=4.5)
    opened = open_model(options)
    config, exact = opened.trimmed, dict(exact_weights(opened))
    shapes = expected_tensors(config)
    ids = opened.tokenizer.processor.encode(read_text(args.text, "TEXT"))
    batches = text_batches(ids, min(512, config.max_context_length))
    text = mx.concatenate([batch for batch in batches if batch.shape[1] == batches[0].shape[1]])
    written = calibrate.written_tokens(opened, options)
    own = make_reference(config, exact, written)
    whole = make_reference(config, exact, text)
    searched = make_reference(config, exact, text[::SEARCHED])
    low, high = min(args.bits) + 0.5, max(args.bits) + 0.5
    middle, spread = (low + high) / 2, (high - low) / 2
    losses = measure(own, shapes, fitted(DTYPE), middle, spread=spread)
    print("| Size of | Seed | Plans tried | --target-bpw | Best of the search | Ratio |")
    for bits in args.bits:
        uniform: Plan = dict.fromkeys(matrices(shapes), QuantSpec(bits, 64))
        room = allocate.plan_bytes(uniform, shapes, DTYPE)
        plan = allocate.choose(losses, shapes, DTYPE, 8 * room / config.num_parameters)
        for seed in args.seeds:
            search = Search(exact, searched, shapes, room, random.Random(seed))
            _, best = search.run(60 * args.minutes, plan)
            ours, theirs = (whole.loss(search.weights(one)) for one in (plan, best))
            print(
                f"| {bits} bits | {seed} | {search.tried:,} | {ours:.5f} | {theirs:.5f} | "
                f"{ours / theirs:.3f} |",
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="plan_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="an unquantized model: .pt file or folder")
    add("text", type=Path, metavar="TEXT", help="the text that is searched and compared on")
    add("--bits", type=int, nargs="+", default=[3, 4, 5], help="uniform bits that set the sizes")
    add("--minutes", type=float, default=20.0, help="of search, for each size and seed")
    add("--seeds", type=int, nargs="+", default=[0])
    try:
        run(parser.parse_args(argv))
    except OpenELMError as error:
        print(f"plan_search: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
