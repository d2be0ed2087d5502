"""Compare the speed of LoRA training with that of `mlx_lm lora`, on texts of mixed lengths.

    python -m openelm_mlx.benchmarks.scripts.finetune_speed [FOLDER] [--pairs N] [--json FILE]

Both train the same float32 weights on the same texts, from the same files, through their own
trainer: this project's `finetune`, and mlx-lm's `TextDataset` and `train`. Rank, matrices, scale,
optimizer, learning rate, epochs and all tokens of a text are the same. This project packs texts
into rows of the longest text's length; mlx-lm pads the texts of a batch, which are of similar
length, to multiples of 32. Both have about as many tokens in a step, and take as many steps, of
which the held-out loss depends. Each pair has another seed.

Each run is a process of its own, with OpenBLAS, and the sides take turns. A first, short run of
each is not counted: it builds the kernels that MLX keeps on the disk. Speeds are trained tokens
(those of a text but the first) a second of

    in total     the time from the call of the trainer to the end of its last step
    compiled     the last epoch, whose shapes were all met before

The held-out loss of both adapters is computed by one program, this project's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from openelm_mlx import load
from openelm_mlx.benchmarks.results.statistics import Interval, paired_ratio
from openelm_mlx.benchmarks.scripts.pairs import in_turns
from openelm_mlx.benchmarks.scripts.waits import CLOCKS
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.pipeline import convert
from openelm_mlx.device import blas, mx
from openelm_mlx.engine.hub import resolve_model
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import BenchmarkError, OpenELMError
from openelm_mlx.evaluate.perplexity import text_perplexity
from openelm_mlx.files import check_new

FASTER = 1.2  # at least, in total and compiled
RANK, SCALE, RATE, EPOCHS = 16, 1.0, 1e-3, 2
SHORTEST, LONGEST, ROWS = 16, 512, 2  # tokens of a text, and rows of the longest in a step
TEXTS_SEED = 45  # 96 texts of 12,163 tokens: 12 steps an epoch of rows, and of 8 texts
TARGETS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
WORDS = {
    "who": "baker sailor miller weaver painter doctor teacher hunter fisher tailor",
    "did": "found bought carried painted counted mended washed hid sold lost",
    "how": "two three four five six seven eight nine ten twelve",
    "of": "red blue green old new small heavy broken golden wooden",
    "what": "boxes lamps boats stones keys apples bells ropes chairs coins",
    "where": "river market bridge garden harbour tower forest mill cellar church",
}


def made(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Return texts of sentences that no model knows by heart; the logarithms of their lengths in
    tokens are evenly spread.
    """
    rng, texts = random.Random(seed), list[str]()
    while len(texts) < count:
        most = math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST + 1)))
        text = ""
        while True:
            who, did, how, of, what, where = (rng.choice(words.split()) for words in WORDS.values())
            longer = f"{text} The {who} {did} {how} {of} {what} near the {where}.".strip()
            if len(tokenizer.encode(longer)) + 1 > most:
                break
            text = longer
        words = longer.split()  # the text ends within a sentence, or lengths would be multiples
        while len(tokenizer.encode(" ".join(words))) + 1 > most:
            words.pop()
        texts.append(" ".join(words))
    return texts


@dataclass
class Trained:
    """What a run did, step by step."""

    total: float  # seconds from the call of the trainer to the end of the last step
    ends: list[float]  # seconds from that call to the end of each step
    tokens: list[int]  # trained in each
    openblas: bool
    loss: float = 0.0  # of the held-out texts, in nats a token

    @property
    def rate(self) -> float:
        """Trained tokens a second in total."""
        return sum(self.tokens) / self.total

    @property
    def compiled_rate(self) -> float:
        """Trained tokens a second of the last epoch."""
        first = len(self.ends) - len(self.ends) // EPOCHS
        return sum(self.tokens[first:]) / (self.ends[-1] - self.ends[first - 1])


def ours(
    folder: Path, data: Path, out: Path, steps: int | None, clock: Callable[[], float], seed: int
) -> Trained:
    """Train by this project."""
    from openelm_mlx.finetune.options import FinetuneOptions
    from openelm_mlx.finetune.run import finetune

    options = FinetuneOptions(
        rank=RANK,
        alpha=RANK * SCALE,
        length=LONGEST,
        batch=ROWS,
        learning_rate=RATE,
        schedule="constant",
        warmup=0,
        clip=0.0,
        **({"epochs": float(EPOCHS)} if steps is None else {"steps": steps}),
        validation_share=0.0,
        save_every=10**6,
        seed=seed,
    )
    engine = load(folder, "float32")
    ends, tokens = list[float](), list[int]()

    def told(row: dict[str, Any], _: int) -> None:
        ends.append(clock() - start)
        tokens.append(row["trained_tokens"])

    start = clock()
    finetune(engine, data, out, options, progress=told)
    return Trained(ends[-1], ends, tokens, blas.path is not None)


def theirs(
    folder: Path, data: Path, out: Path, steps: int | None, clock: Callable[[], float], seed: int
) -> Trained:
    """Train by mlx-lm."""
    import numpy as np
    from mlx_lm import load as load_theirs
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from openelm_mlx.device import optimizers

    mx.random.seed(seed)
    np.random.seed(seed)  # by which its batches are shuffled
    model, tokenizer, *_ = load_theirs(str(folder))
    how = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": list(TARGETS)}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), how)
    out.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": how}
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    ends, tokens = list[float](), list[int]()

    class Told(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            ends.append(clock() - start)
            # theirs counts one target a text too many, the padding after its last token
            tokens.append(info["trained_tokens"] - sum(tokens) - size * (len(tokens) + 1))

    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    lengths = [len(tokenizer.encode(record["text"])) + 1 for record in records]
    size = max(1, round(ROWS * LONGEST * len(lengths) / sum(lengths)))
    arguments = TrainingArgs(
        batch_size=size,
        iters=steps or EPOCHS * (len(records) // size),
        steps_per_report=1,
        steps_per_save=10**6,
        max_seq_length=2 * LONGEST,
        adapter_file=str(out / "adapters.safetensors"),
    )
    adam: Any = {"betas": [0.9, 0.95], "eps": 1e-8, "bias_correction": True, "weight_decay": 0.0}
    start = clock()
    texts = CacheDataset(TextDataset(records, tokenizer))
    with redirect_stdout(StringIO()):
        optimizer = optimizers.AdamW(RATE, **adam)
        train(model, optimizer, texts, args=arguments, training_callback=Told())
    return Trained(ends[-1], ends, tokens, blas.path is not None)


SIDES = {"ours": ours, "theirs": theirs}


def run(side: str, folder: Path, scratch: Path, clock: str, steps: int | None = None) -> Trained:
    """Train in a process of its own, with a new seed, and return what it did.

    Raises `BenchmarkError`.
    """
    seed = len(list(scratch.glob(f"{side}-*")))
    out = scratch / f"{side}-{seed}"
    command = [sys.executable, "-m", "openelm_mlx.benchmarks.scripts.finetune_speed", str(folder)]
    command += ["--side", side, "--data", str(scratch / "train.jsonl"), "--out", str(out)]
    command += ["--clock", clock, "--seed", str(seed)]
    command += [] if steps is None else ["--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"the run of {side} failed: {done.stderr.strip()[-2000:]}")
    found = Trained(**json.loads(done.stdout.splitlines()[-1]))
    if steps is None:
        found.loss = held_out_loss(folder, out, scratch / "test.jsonl")
    return found


def held_out_loss(folder: Path, adapter: Path | None, data: Path) -> float:
    """Return the mean loss of the tokens of held-out texts, in nats."""
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    return text_perplexity(load(folder, "float32", adapter=adapter), texts).nats_per_token


@dataclass
class Comparison:
    """The runs of both sides, ours first, pair by pair."""

    untrained: float  # the held-out loss before
    clock: str = "wall"
    runs: tuple[list[Trained], list[Trained]] = field(default_factory=lambda: ([], []))

    def ratio(self, name: str) -> Interval:
        """Return how often as fast this project is, with the 95 % interval of pairs."""
        mine, other = ([getattr(run, name) for run in side] for side in self.runs)
        return paired_ratio([mine], [other])

    @property
    def holds(self) -> bool:
        """Whether both speeds are `FASTER`, and the held-out loss is not worse."""
        fast = all(self.ratio(name).middle >= FASTER for name in ("rate", "compiled_rate"))
        mine, other = (median(run.loss for run in side) for side in self.runs)
        return fast and mine <= other

    def __str__(self) -> str:
        lines = []
        for name, side in zip(("this project", "mlx_lm lora"), self.runs, strict=True):
            lines.append(
                f"{name}: {len(side[0].ends)} steps, {sum(side[0].tokens):,} trained tokens, "
                f"held-out loss {self.untrained:.4f} -> {spread([one.loss for one in side], 4)}; "
                f"OpenBLAS loaded: {all(one.openblas for one in side)}"
            )
        for what, name in (("in total", "rate"), ("compiled", "compiled_rate")):
            mine, other = (spread([getattr(one, name) for one in side], 0) for side in self.runs)
            low, middle, high = self.ratio(name)
            lines.append(
                f"{what}: {mine} and {other} trained tokens/s; {middle:.2f} x "
                f"({low:.2f}-{high:.2f}, {len(self.runs[0])} pairs of {self.clock} time; "
                f"at least {FASTER})"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        ratios = {name: self.ratio(name)._asdict() for name in ("rate", "compiled_rate")}
        return {**asdict(self), "ratios": ratios, "holds": self.holds}


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median, and the least and the largest value."""
    low, middle, high = (f"{one:.{digits}f}" for one in (min(values), median(values), max(values)))
    return f"{middle} ({low}-{high})"


def compare(folder: Path, scratch: Path, texts: int, pairs: int, clock: str) -> Comparison:
    """Write the texts, and train on them in turns."""
    tokenizer = load(folder, "float32").tokenizer
    for name, count, seed in (("train", texts, TEXTS_SEED), ("test", texts // 4, 2)):
        lines = [json.dumps({"text": text}) for text in made(tokenizer, count, seed)]
        (scratch / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = Comparison(held_out_loss(folder, None, scratch / "test.jsonl"), clock)
    for side in SIDES:
        run(side, folder, scratch, clock, steps=2)
    sides = [lambda side=side: run(side, folder, scratch, clock) for side in SIDES]
    for pair in in_turns(sides[0], sides[1], pairs):
        for runs, one in zip(result.runs, pair, strict=True):
            runs.append(one)
        print(f"\r{len(result.runs[0])} of {pairs} pairs", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="a float32 model folder (default: the bundled model)")
    add("--texts", type=int, default=96, help="that are trained in each epoch (default: 96)")
    add("--pairs", type=int, default=3, help="of runs (default: 3)")
    busy = "cpu: for a machine that is busy otherwise"
    add("--clock", choices=sorted(CLOCKS), default="wall", help=busy)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    for name, kind in (
        ("--side", str),
        ("--data", Path),
        ("--out", Path),
        ("--steps", int),
        ("--seed", int),
    ):
        add(name, type=kind, help=argparse.SUPPRESS)  # of the process of one run
    args = parser.parse_args(argv)
    if args.side:
        clock = CLOCKS[args.clock]
        done = SIDES[args.side](args.folder, args.data, args.out, args.steps, clock, args.seed)
        print(json.dumps(asdict(done)))
        return 0
    try:
        if args.json:
            check_new(args.json, "--json")
        with TemporaryDirectory() as temporary:
            scratch, folder = Path(temporary), args.folder
            if folder is None:
                bundled, folder = resolve_model("openelm-tiny").folder, scratch / "tiny"
                convert(ConvertOptions(source=bundled, target=folder, dtype="float32"))
            found = compare(folder, scratch, args.texts, args.pairs, args.clock)
    except OpenELMError as error:
        parser.exit(2, f"finetune_speed: {error}\n")
    print(found, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=1), encoding="utf-8")
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
