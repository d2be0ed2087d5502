"""Log-likelihoods side by side with mlx_lm.evaluate, in one process, on the same requests.

    python -m openelm_mlx.benchmarks.scripts.score_speed [FOLDER] [--shape NAME] [--json FILE]

Both take turns, so that a busy machine slows both alike; the time is that of texts in, answers
out. Passes of the model and the tokens they are fed are counted in runs that are not timed. FOLDER
has float32 weights; without one, the bundled model is converted to them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

from openelm_mlx import load
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.benchmarks.scripts.pairs import in_turns
from openelm_mlx.benchmarks.scripts.waits import CLOCKS
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.pipeline import convert
from openelm_mlx.device import blas, mx
from openelm_mlx.engine.hub import resolve_model
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.perplexity import TEXT
from openelm_mlx.evaluate.plan import Request
from openelm_mlx.evaluate.run import answers
from openelm_mlx.files import check_new, read_text

PASSES, TOKENS, FASTER = 1 / 8, 1.2, 1.5  # of theirs at most, and how much less time at least
Texts = list[tuple[str, str]]  # context and continuation
Answers = list[tuple[float, bool]]


class Shape(NamedTuple):
    """How many tokens the questions of a task have."""

    questions: int
    question: tuple[int, int]
    choices: int
    choice: tuple[int, int]
    examples: int = 0  # tokens that come before every question


SHAPES = {
    "arc": Shape(500, (15, 40), 4, (2, 12)),
    "mmlu": Shape(100, (20, 100), 4, (1, 1), examples=700),
    "winogrande": Shape(250, (20, 40), 2, (4, 12)),
}


def made(shape: Shape, tokenizer: Tokenizer, text: str, seed: int = 1) -> Texts:
    """Return questions and choices whose lengths are of a shape, cut from a text at words."""
    rng, ids = random.Random(seed), tokenizer.encode(text, bos=False)
    words = [at for at, token in enumerate(ids) if tokenizer.piece_bytes(token)[:1] == b" "]
    starts = set(words)

    def cut(least: int, most: int) -> str:
        while True:
            start, length = rng.choice(words), rng.randint(least, most)
            if start + length in starts:
                return tokenizer.decode(ids[start : start + length]).strip()

    examples = cut(shape.examples, shape.examples + 9) + " " if shape.examples else ""
    asked: Texts = []
    while len(asked) < shape.questions * shape.choices:
        question = examples + cut(*shape.question)
        choices = {" " + cut(*shape.choice) for _ in range(shape.choices)}
        if len(choices) == shape.choices:
            asked += [(question, choice) for choice in sorted(choices)]
    return asked


def requests(tokenizer: Tokenizer, texts: Texts) -> list[Request]:
    """Return the requests of texts; context and continuation are encoded together."""
    found = []
    for context, continuation in texts:
        length = len(tokenizer.encode(context))
        tokens = tuple(tokenizer.encode(context + continuation))
        found.append(Request(tokens[:length], tokens[length:]))
    return found


@dataclass
class Fed:
    """What the passes of a model were fed."""

    passes: int = 0
    tokens: int = 0


class Counted:
    """A model that counts what it is fed."""

    def __init__(self, model: Any) -> None:
        self.model, self.fed = model, Fed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, *args: Any, **named: Any) -> mx.array:
        self.fed.passes += 1
        self.fed.tokens += tokens.size
        result: mx.array = self.model(tokens, *args, **named)
        return result


class Theirs:
    """mlx_lm.evaluate's model of lm-eval."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.evaluate import MLXLM

        self.lm = MLXLM(str(folder), use_chat_template=False)

    def answers(self, texts: Texts) -> Answers:
        with redirect_stderr(StringIO()):  # its progress bar
            return list(self.lm.loglikelihood([SimpleNamespace(args=pair) for pair in texts]))

    def count(self, texts: Texts) -> tuple[Answers, Fed]:
        """Return the answers, and what the passes were fed."""
        model, self.lm._model = self.lm._model, Counted(self.lm._model)
        try:
            return self.answers(texts), self.lm._model.fed
        finally:
            self.lm._model = model


class Ours:
    """The scorer of this project."""

    def __init__(self, folder: Path, batch_tokens: int = 4096) -> None:
        self.engine, self.batch_tokens = load(folder, "float32"), batch_tokens

    def answers(self, texts: Texts) -> Answers:
        asked = requests(self.engine.tokenizer, texts)
        return list(answers(self.engine, asked, batch_tokens=self.batch_tokens))

    def count(self, texts: Texts) -> tuple[Answers, Fed]:
        with counted(self.engine) as fed:
            return self.answers(texts), fed


@contextmanager
def counted(engine: Engine) -> Iterator[Fed]:
    """Count what the passes of an engine's model are fed."""
    model = Counted(engine.model.hidden)
    engine.model.hidden = model  # type: ignore[method-assign]
    try:
        yield model.fed
    finally:
        del engine.model.hidden


@dataclass
class Comparison:
    """What both sides did with the same texts."""

    shape: str
    texts: int
    ours: Fed
    theirs: Fed
    difference: float  # the largest of two log-likelihoods
    greedy: bool  # whether the flags are equal
    clock: str = "wall"
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    @property
    def holds(self) -> bool:
        """Whether the answers agree, and passes and tokens are as few as they should be."""
        few = self.ours.passes <= PASSES * self.theirs.passes
        short = self.ours.tokens <= TOKENS * self.theirs.tokens
        return few and short and self.greedy and self.difference <= 1e-4

    def __str__(self) -> str:
        flags = "equal" if self.greedy else "DIFFER"
        lines = [
            f"{self.shape}: {self.texts} continuations; OpenBLAS loaded: {blas.path is not None}",
            f"    log-likelihoods differ by {self.difference:.1e} at most, greedy flags {flags}",
        ]
        for name, mine, their, bar in (
            ("passes", self.ours.passes, self.theirs.passes, PASSES),
            ("tokens fed", self.ours.tokens, self.theirs.tokens, TOKENS),
        ):
            lines.append(
                f"    {name}: {mine:,} and {their:,}, {mine / their:.4f} x (at most {bar})"
            )
        for name, seconds in zip(("ours", "mlx_lm.evaluate"), self.seconds, strict=True):
            if len(seconds) > 1:
                low, _, high = quantiles(seconds, n=4)
                lines.append(
                    f"    {name}: {median(seconds):.2f} s (quartiles {low:.2f}-{high:.2f})"
                )
        if len(self.seconds[0]) > 1:
            low, middle, high = paired_ratio([self.seconds[1]], [self.seconds[0]])
            pairs = f"{len(self.seconds[0])} pairs of {self.clock} time; at least {FASTER}"
            lines.append(f"    faster: {middle:.2f} x ({low:.2f}-{high:.2f}, {pairs})")
        return "\n".join(lines)


def compare(
    shape: str, ours: Ours, theirs: Theirs, texts: Texts, pairs: int, clock: str
) -> Comparison:
    """Count what both are fed, compare their answers, and time both in turns."""
    (mine, fed), (their, other) = ours.count(texts), theirs.count(texts)
    both = list(zip(mine, their, strict=True))
    difference = max(abs(a[0] - b[0]) for a, b in both)
    greedy = all(a[1] == b[1] for a, b in both)
    result = Comparison(shape, len(texts), fed, other, difference, greedy, clock)

    def timed(side: Callable[[Texts], Answers]) -> float:
        start = CLOCKS[clock]()
        side(texts)
        return CLOCKS[clock]() - start

    for pair in in_turns(lambda: timed(ours.answers), lambda: timed(theirs.answers), pairs):
        for seconds, taken in zip(result.seconds, pair, strict=True):
            seconds.append(taken)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="score_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="a model folder (default: the bundled model)")
    add("--shape", action="append", choices=sorted(SHAPES), help="default: all")
    add("--questions", type=int, help="instead of the shape's")
    add("--pairs", type=int, default=5, help="of runs that are timed (default: 5)")
    add("--batch-tokens", type=int, default=4096, help="of a pass of ours (default: 4096)")
    busy = "cpu: for a machine that is busy otherwise"
    add("--clock", choices=sorted(CLOCKS), default="wall", help=busy)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    found, text = {}, read_text(TEXT, "the text of the questions")
    try:
        if args.json:
            check_new(args.json, "--json")
        with TemporaryDirectory() as scratch:
            folder = args.folder
            if folder is None:
                bundled, folder = resolve_model("openelm-tiny").folder, Path(scratch) / "tiny"
                convert(ConvertOptions(source=bundled, target=folder, dtype="float32"))
            ours, theirs = Ours(folder, args.batch_tokens), Theirs(folder)
            for name in args.shape or SHAPES:
                shape = SHAPES[name]._replace(questions=args.questions or SHAPES[name].questions)
                texts = made(shape, ours.engine.tokenizer, text)
                found[name] = compare(name, ours, theirs, texts, args.pairs, args.clock)
                print(found[name], flush=True)
    except OpenELMError as error:
        parser.exit(2, f"score_speed: {error}\n")
    if args.json:
        results = {name: vars(one) | {"holds": one.holds} for name, one in found.items()}
        args.json.write_text(json.dumps(results, default=vars, indent=1), encoding="utf-8")
    return 0 if all(one.holds for one in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
