"""Two installations of this project, taking turns: by how much is one faster than the other?

    python -m openelm_mlx.benchmarks.scripts.pairs OTHER [--ours CHECKOUT] [--case NAME] [--pairs N] [--tokens N] [--json FILE]

OTHER is a checkout with a virtual environment in .venv, as of an older commit; so is --ours, which
is this one by default. Each is a live process of its own Python. They generate in turns, one of
them at a time, so that a busy machine hits both alike; the ratio of decode speeds is the median
over all pairs, with its 95 % interval. What runs first is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from inspect import getsource
from pathlib import Path
from statistics import median
from typing import Any

from openelm_mlx.benchmarks.results.statistics import Interval, paired_ratio
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.config import BOS

SAMPLED = {"temperature": 0.8, "seed": 1, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
WARM_UP = 2  # generations of each before the first pair


@dataclass(frozen=True)
class Case:
    """What both sides run. `target` is the least ratio that is wished for."""

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
    """Answer the requests that come line by line; runs in the other process, whose project may be
    an old one.
    """
    import json
    import sys
    from importlib.metadata import version
    from pathlib import Path
    from time import perf_counter, process_time

    from openelm_mlx.device_settings import load_blas

    blas = load_blas().path
    import openelm_mlx
    from openelm_mlx.benchmarks.measure.weights import random_engine

    engine = None
    for line in sys.stdin:
        asked = json.loads(line)
        if engine is None:
            name = asked["model"]
            size = name.removeprefix("random:")
            engine = (
                openelm_mlx.load(name, "float32")
                if size == name
                else random_engine(size, "float32")
            )
            maps = Path("/proc/self/maps")
            loaded = "openblas" in maps.read_text() if maps.exists() else None
            answer = {
                "file": openelm_mlx.__file__,
                "blas": blas,
                "openblas": loaded,
                "mlx": version("mlx"),
            }
        else:
            prompt = [BOS, *((37 * i) % (engine.vocab - 3) + 3 for i in range(asked["prompt"] - 1))]
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
            answer = {"rates": rates, "tokens": tokens}  # type: ignore[dict-item]
        print(json.dumps(answer), flush=True)


class Side:
    """A live process of a checkout."""

    def __init__(self, checkout: Path) -> None:
        self.checkout, python = checkout, checkout / ".venv" / "bin" / "python"
        if not python.exists():
            raise BenchmarkError(
                f"{checkout} has no .venv/bin/python; install the project there first"
            )
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [str(python), "-c", f"{getsource(worker)}\nworker()"],
            cwd=tempfile.gettempdir(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer of the process. Raises `BenchmarkError` where it has died."""
        line = ""
        if self.process.stdin and self.process.stdout:
            with suppress(BrokenPipeError):
                print(json.dumps(request), file=self.process.stdin, flush=True)
                line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise BenchmarkError(
                f"the process of {self.checkout} has ended: {self.log.read()[-2000:].strip()}"
            )
        return dict(json.loads(line))

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                pipe.close()
        self.process.wait()


@dataclass
class Found:
    case: Case
    rates: dict[str, tuple[list[float], list[float]]]  # a second: ours and the other's, a pair each
    same: bool  # whether every answer had the same tokens
    sides: tuple[dict[str, Any], dict[str, Any]]

    @property
    def ratios(self) -> dict[str, Interval]:
        return {name: paired_ratio([ours], [theirs]) for name, (ours, theirs) in self.rates.items()}

    def __str__(self) -> str:
        blas = " and ".join(
            f"{side['blas']} ({'' if side['openblas'] else 'not '}loaded)" for side in self.sides
        )
        ratios = (
            f"    {name}: {ratio.middle:.3f} x ({ratio.low:.3f}-{ratio.high:.3f}, {len(pair[0])} pairs; "
            f"{median(pair[0]):.4g} and {median(pair[1]):.4g} a second)"
            for (name, pair), ratio in zip(self.rates.items(), self.ratios.values(), strict=True)
        )
        head = (
            f"{self.case.model} {self.case.settings or 'greedy'}, decode wished for {self.case.target}; "
            f"tokens {'equal' if self.same else 'DIFFER'}; BLAS {blas}"
        )
        return "\n".join((head, *ratios))

    def as_json(self) -> dict[str, Any]:
        ratios = {name: ratio._asdict() for name, ratio in self.ratios.items()}
        return {**asdict(self), "ratios": ratios}


def measure(
    ours: Path, other: Path, case: Case, pairs: int = 30, prompt: int = 32, tokens: int = 128
) -> Found:
    """Run a case in both. Raises `BenchmarkError` where a process dies.

    Times of one process differ from those of the next start of the same program by a few percent;
    so both are started twice, in either order, and run half of the pairs each time.
    """
    found = Found(case, {}, True, ({}, {}))
    for first, count in ((0, pairs - pairs // 2), (1, pairs // 2)):
        started = {place: Side((ours, other)[place]) for place in (first, 1 - first)}
        sides = (started[0], started[1])
        try:
            found.sides = (sides[0].ask(model=case.model), sides[1].ask(model=case.model))
            run_pairs(found, sides, {"prompt": prompt, "tokens": tokens}, count)
        finally:
            for side in sides:
                side.close()
    return found


def run_pairs(found: Found, sides: tuple[Side, Side], request: dict[str, Any], pairs: int) -> None:
    request = {"settings": found.case.settings, **request}
    for side in sides * WARM_UP:
        side.ask(**request)
    for number in range(pairs):
        order = (0, 1) if number % 2 else (1, 0)
        answers = {place: sides[place].ask(**request) for place in order}
        for name in answers[0]["rates"]:
            for place, rates in enumerate(found.rates.setdefault(name, ([], []))):
                rates.append(answers[place]["rates"][name])
        found.same = found.same and answers[0]["tokens"] == answers[1]["tokens"]
        print(f"\r{number + 1} of {pairs} pairs", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pairs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout with its virtual environment")
    parser.add_argument(
        "--ours",
        type=Path,
        default=Path(__file__).resolve().parents[2],
        help="default: this checkout",
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="instead of the case's: a name, folder or file, or random:SIZE",
    )
    parser.add_argument("--pairs", type=int, default=30, help="default: 30")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens of an answer (default: 128)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    found = {}
    for name in args.case or CASES:
        case = replace(CASES[name], model=args.model or CASES[name].model)
        result = measure(args.ours, args.other, case, args.pairs, args.prompt, args.tokens)
        print(f"{name}: {result}", flush=True)
        found[name] = result.as_json()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
