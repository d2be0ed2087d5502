"""What waits for what: a long prompt that joins running rows, and settings of the sampler that were
never seen before.

    python -m openelm_mlx.benchmarks.scripts.latency join [MODEL] [--admission 16,32,64] [--json FILE]
    python -m openelm_mlx.benchmarks.scripts.latency temperatures [MODEL] [--json FILE]

`join`: rows run, a prompt of 900 tokens joins them. How much longer do their steps take meanwhile,
and how much later does it get its first token than alone? `temperatures`: many settings in one
process. How many steps are traced, and how much later is the first token of a temperature that is
new?
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from openelm_mlx import BatchEngine, stream_generate
from openelm_mlx.benchmarks.measure.weights import open_engine, random_engine
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.device import blas, mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.model.config import BOS

ROWS, PROMPT, ANSWER = (
    8,
    900,
    100,
)  # rows that run; tokens of the prompt that joins and of its answer
SETTLED = 8  # steps or tokens after which all runs as it will
STALL, LATE, NEW = (
    5.0,
    1.7,
    1.2,
)  # wished for: p99 of a step by the median, first token by that alone, by that of a known one

CLOCKS = {"wall": perf_counter, "cpu": process_time}
clock = perf_counter

Result = dict[str, Any]


def ids(engine: Engine, count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [BOS, *(rng.randrange(3, engine.vocab) for _ in range(count - 1))]


def percentile(values: list[float], share: float) -> float:
    """The least value that `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def joined(engine: Engine, seed: int, **settings: Any) -> tuple[list[float], list[float], float]:
    """Seconds of the steps before the prompt joins, of those until its answer is complete, and to
    its first token.
    """
    batch = BatchEngine(engine, 2 * ROWS, **settings)
    try:
        for row in range(ROWS):
            batch.submit(
                ids(engine, 16 + row, seed + row),
                max_tokens=engine.config.max_context_length,
                ignore_eos=True,
            )
        while len({number for number, _ in batch.step()}) < ROWS:
            pass
        before = [timed(batch.step) for _ in range(4 * SETTLED)]
        number = batch.submit(ids(engine, PROMPT, seed + ROWS), max_tokens=ANSWER, ignore_eos=True)
        during: list[float] = []
        events: list[Any] = []

        def step() -> None:
            events[:] = batch.step()

        first, came = None, 0
        while came < ANSWER:
            during.append(timed(step))
            came += sum(owner == number for owner, _ in events)
            first = sum(during) if came and first is None else first
        return before, during, first or 0.0
    finally:
        batch.close()


def timed(call: Callable[[], Any]) -> float:
    start = clock()
    call()
    return clock() - start


def answered(engine: Engine, prompt: list[int], **settings: Any) -> tuple[float, float]:
    """Seconds from the call to the first event, and to the last."""
    start, first = clock(), 0.0
    asked = {"max_tokens": SETTLED, "ignore_eos": True, **settings}
    for _ in stream_generate(engine, prompt, **asked):
        first = first or clock() - start
    return first, clock() - start


def join(engine: Engine, trials: int, **settings: Any) -> Result:
    """Stalls of the running rows and the wait of the joining one, alone and among them in turns;
    shapes are traced before.
    """
    cold = joined(engine, 0, **settings)
    answered(engine, ids(engine, PROMPT, 1))
    before: list[float] = []
    during: list[float] = []
    alone, among = list[float](), list[float]()
    for trial in range(trials):
        alone.append(answered(engine, ids(engine, PROMPT, 100 + trial))[0])
        steady, joining, first = joined(engine, 1000 * trial, **settings)
        before += steady
        during += joining
        among.append(first)
    slow, steps = percentile(before + during, 0.99), median(before + during)
    late = paired_ratio([among], [alone])
    return {
        "settings": settings,
        "trials": trials,
        "median_ms": 1000 * steps,
        "p99_ms": 1000 * slow,
        "stall": slow / steps,
        "stall_wished_for": STALL,
        "before_ms": 1000 * median(before),
        "stall_by_before": slow / median(before),
        "slowest_ms": 1000 * max(during),
        "alone_ms": 1000 * median(alone),
        "among_ms": 1000 * median(among),
        "late": late._asdict(),
        "late_wished_for": LATE,
        "first_time": {"slowest_ms": 1000 * max(cold[1]), "among_ms": 1000 * cold[2]},
    }


@contextmanager
def traces() -> Iterator[list[int]]:
    """Count how often functions that are compiled meanwhile are traced: the only times when Python
    runs them.
    """
    count, compile_ = [0], mx.compile

    def counting(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def traced(*inputs: Any) -> Any:
            count[0] += 1
            return fun(*inputs)

        return compile_(traced, *args, **kwargs)

    mx.compile = counting
    try:
        yield count
    finally:
        mx.compile = compile_


def settings_of(number: int, rng: random.Random) -> dict[str, Any]:
    """The options of one of many requests: of few sets of filters, of values that are all
    different.
    """
    found: dict[str, Any] = {"temperature": rng.uniform(0.1, 2.0)}
    if number % 2:
        found["top_p"] = rng.uniform(0.5, 0.99)
    if number % 4 >= 2:
        found["top_k"] = rng.randint(2, 100)
    if number % 8 >= 4:
        found["repetition_penalty"] = rng.uniform(1.01, 1.5)
    return found


def temperatures(engine: Engine, settings: int, pairs: int) -> Result:
    """Traces of many settings, expected one for each combination of filters; first tokens of known
    and new temperatures.
    """
    rng, prompt = random.Random(0), ids(engine, 16, 0)
    asked = [settings_of(number, rng) for number in range(settings)]
    expected = len({Filters.of([SamplingOptions(**chosen)]) for chosen in asked})
    with traces() as count:
        for number, chosen in enumerate(asked):
            answered(engine, prompt, seed=number, max_tokens=3, **chosen)
    known, new = list[tuple[float, float]](), list[tuple[float, float]]()
    for number in range(2 * pairs):  # in turns, each first in every other pair
        for which in ((known, new), (new, known))[number % 2]:
            temperature = 0.7 if which is known else rng.uniform(0.1, 2.0)
            which.append(answered(engine, prompt, seed=number, temperature=temperature))
    result: Result = {"settings": settings, "traces": count[0], "combinations": expected}
    for place, name in enumerate(("first_token", f"{SETTLED}_tokens")):
        ours, others = ([times[place] for times in which] for which in (new, known))
        result[name] = {
            "known_ms": 1000 * median(others),
            "new_ms": 1000 * median(ours),
            "new_by_known": paired_ratio([ours], [others])._asdict(),
            "wished_for": NEW,
        }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="latency", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("join", "temperatures"))
    parser.add_argument(
        "model", nargs="?", default="openelm-tiny", help="a name, folder or file, or random:SIZE"
    )
    parser.add_argument("--dtype", help="compute in this type")
    parser.add_argument("--bits", type=int, help="quantize the weights")
    parser.add_argument(
        "--admission",
        metavar="N,N,...",
        help="prompt tokens beside each step; default: the engine's own",
    )
    parser.add_argument(
        "--trials", type=int, default=10, help="joins, or a third of the pairs (default: 10)"
    )
    parser.add_argument(
        "--settings", type=int, default=100, help="settings of the sampler (default: 100)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: for a machine that is busy otherwise",
    )
    args = parser.parse_args(argv)
    global clock
    clock = CLOCKS[args.clock]
    size = args.model.removeprefix("random:")
    engine = (
        open_engine(size, args.dtype, args.bits)[0]
        if size == args.model
        else random_engine(size, args.dtype, args.bits)
    )
    found: list[Result] = []
    if args.what == "temperatures":
        found.append(temperatures(engine, args.settings, 3 * args.trials))
    else:
        for admission in args.admission.split(",") if args.admission else (None,):
            print(
                f"\radmission {admission or 'by default'} ...", end="", file=sys.stderr, flush=True
            )
            found.append(
                join(engine, args.trials, **({"admission": int(admission)} if admission else {}))
            )
    result = {
        "model": args.model,
        "dtype": args.dtype,
        "bits": args.bits,
        "blas": blas.path,
        "clock": args.clock,
        args.what: found,
    }
    text = json.dumps(result, indent=1)
    if args.json:
        Path(args.json).write_text(text, encoding="utf-8")
    print(f"\r{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
