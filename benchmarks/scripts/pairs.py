"""Compare the speed of two installations of this project that take turns.

    python -m openelm_mlx.benchmarks.scripts.pairs OTHER [--case NAME] [--json FILE]

OTHER is a checkout with a virtual environment in .venv, as of an older commit; so is --ours, which
is this one by default. Each runs in a live process of its own Python. They generate in turns, one
of them at a time, so that a busy machine slows both alike. The ratio of a rate is the
geometric mean over all pairs, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from inspect import getsource
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from openelm_mlx.benchmarks.measure.weights import random_engine, write_folder
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.errors import BenchmarkError, OpenELMError
from openelm_mlx.files import check_new

T = TypeVar("T")
SAMPLED = {"temperature": 0.8, "seed": 1, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
WARM_UP = 2  # generations of each side before the first pair


def in_turns(ours: Callable[[], T], theirs: Callable[[], T], pairs: int) -> Iterator[tuple[T, T]]:
    """Run both sides, each first in every other pair, and yield what they return."""
    for number in range(pairs):
        if number % 2:
            mine = ours()
            yield mine, theirs()
        else:
            other = theirs()
            yield ours(), other


def ratio_text(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the mean of ours / theirs as text, with its 95 % interval."""
    low, middle, high = paired_ratio([ours], [theirs])
    return f"{middle:.3f} x ({low:.3f}-{high:.3f}, {len(ours)} pairs"


def model_folder(name: str, scratch: str) -> str:
    """Return the name of a model; for `random:SIZE`, a new folder of random float32 weights."""
    if not name.startswith("random:"):
        return name
    size = name.removeprefix("random:")
    return str(write_folder(random_engine(size, "float32"), Path(scratch) / size))


@dataclass(frozen=True)
class Case:
    """A model and settings that both sides run; `target` is the ratio of decode speeds aimed at."""

    model: str  # a name, folder or file; "random:SIZE" has random weights
    settings: dict[str, Any]
    target: float


CASES = {
    "tiny": Case("openelm-tiny", {}, 0.98),
    "tiny-sampled": Case("openelm-tiny", SAMPLED, 0.95),
    "270m": Case("random:270m", {}, 0.98),
    "270m-sampled": Case("random:270m", SAMPLED, 0.95),
}


def worker() -> None:
    """Answer requests line by line in the other process, whose project may be an old one."""
    import json
    import sys
    from importlib.metadata import version
    from pathlib import Path
    from time import perf_counter, process_time

    import openelm_mlx

    first = json.loads(sys.stdin.readline())
    engine = openelm_mlx.load(first["model"], "float32")
    maps = Path("/proc/self/maps")
    openblas = "openblas" in maps.read_text() if maps.exists() else None
    facts = {"file": openelm_mlx.__file__, "openblas": openblas, "mlx": version("mlx")}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompt = [
            engine.tokenizer.bos_id,
            *((37 * i) % (engine.vocab - 3) + 3 for i in range(asked["prompt"] - 1)),
        ]
        times, tokens = list[float](), list[int]()
        start, used = perf_counter(), process_time()
        for event in openelm_mlx.stream_generate(
            engine, prompt, max_tokens=asked["tokens"], ignore_eos=True, **asked["settings"]
        ):
            times.append(perf_counter() - start)
            used = used if tokens else process_time()
            tokens.append(event.token or 0)
        used = process_time() - used
        # the device is a token ahead from the second token on, in older versions from the first
        rates = {
            "decode": (len(times) - 2) / (times[-1] - times[1]),
            "decode, processor": (len(times) - 1) / used,
            "whole answer": len(times) / times[-1],
            "first token": 1 / times[0],
        }
        print(json.dumps({"rates": rates, "tokens": tokens}), flush=True)


class Side:
    """A live process of a checkout, to be closed."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, python = checkout, checkout / ".venv" / "bin" / "python"
        if not python.exists():
            missing = f"{checkout} does not have .venv/bin/python"
            raise BenchmarkError(f"{missing}; install the project there first")
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(python), "-c", f"{getsource(worker)}\nworker()"],
            cwd=tempfile.gettempdir(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer of the process. Raises `BenchmarkError` if it has died."""
        line = ""
        if self.process.stdin and self.process.stdout:
            with suppress(BrokenPipeError):
                print(json.dumps(request), file=self.process.stdin, flush=True)
                line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            log = self.log.read()[-2000:].strip()
            raise BenchmarkError(f"the process of {self.checkout} has ended: {log}")
        return dict(json.loads(line))

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                pipe.close()
        self.process.wait()


@dataclass
class Comparison:
    """Rates a second of both sides, ours first, one of each pair."""

    case: Case
    rates: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    same: bool = True  # every answer had the same tokens
    sides: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.case.model} {self.case.settings or 'greedy'}, "
            f"decode aimed at {self.case.target}; tokens {'equal' if self.same else 'DIFFER'}; "
            f"OpenBLAS loaded: {' and '.join(str(side['openblas']) for side in self.sides)}"
        ]
        for name, (ours, theirs) in self.rates.items():
            rates = f"{median(ours):.4g} and {median(theirs):.4g} a second"
            lines.append(f"    {name}: {ratio_text(ours, theirs)}; {rates})")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        ratios = {
            name: paired_ratio([ours], [theirs])._asdict()
            for name, (ours, theirs) in self.rates.items()
        }
        return {**asdict(self), "ratios": ratios}


def measure(
    ours: Path, other: Path, case: Case, pairs: int = 30, prompt: int = 32, tokens: int = 128
) -> Comparison:
    """Run a case in both. Raises `BenchmarkError` if a process dies.

    Times of one process differ from those of the next start of the same program by a few percent;
    so both are started twice, in either order, and run half of the pairs each time.
    """
    result = Comparison(case)
    request = {"settings": case.settings, "prompt": prompt, "tokens": tokens}
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(case.model, scratch)
        for first, count in ((0, pairs - pairs // 2), (1, pairs // 2)):
            with ExitStack() as stack:
                checkouts = ((ours, other), (other, ours))[first]
                started = [stack.enter_context(closing(Side(place))) for place in checkouts]
                run_pairs(result, started[first], started[1 - first], model, request, count)
    return result


def run_pairs(
    result: Comparison, ours: Side, other: Side, model: str, request: dict[str, Any], pairs: int
) -> None:
    result.sides = (ours.ask(model=model), other.ask(model=model))
    for side in (ours, other) * WARM_UP:
        side.ask(**request)
    answers = in_turns(lambda: ours.ask(**request), lambda: other.ask(**request), pairs)
    for number, (mine, theirs) in enumerate(answers, start=1):
        for name, rate in mine["rates"].items():
            both = result.rates.setdefault(name, ([], []))
            both[0].append(rate)
            both[1].append(theirs["rates"][name])
        result.same = result.same and mine["tokens"] == theirs["tokens"]
        print(f"\r{number} of {pairs} pairs", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pairs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, here = parser.add_argument, Path(__file__).resolve().parents[2]
    add("other", type=Path, help="a checkout with its virtual environment")
    add("--ours", type=Path, default=here, help="default: this checkout")
    add("--case", action="append", choices=sorted(CASES), help="default: all")
    other = "instead of the case's: a name, folder or file, or random:SIZE"
    add("--model", metavar="MODEL", help=other)
    add("--pairs", type=int, default=30, help="default: 30")
    add("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    add("--tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_new(args.json, "--json")
    except OpenELMError as error:
        parser.exit(2, f"pairs: {error}\n")
    found = {}
    for name in args.case or CASES:
        case = replace(CASES[name], model=args.model or CASES[name].model)
        try:
            result = measure(args.ours, args.other, case, args.pairs, args.prompt, args.tokens)
        except OpenELMError as error:
            parser.exit(2, f"pairs: {error}\n")
        print(f"{name}: {result}", flush=True)
        found[name] = result.as_json()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
