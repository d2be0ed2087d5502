"""Time what a request waits for: others that run, and settings of the sampler that are new.

    python -m openelm_mlx.benchmarks.scripts.latency join [MODEL] [--admission 16,32,64]
    python -m openelm_mlx.benchmarks.scripts.latency temperatures [MODEL]

`join`: rows run and a prompt of 900 tokens joins them. How much longer do their steps take
meanwhile, and how much later does it get its first token than alone? `temperatures`: many settings
in one process. How many steps are traced, and how much later is the first token of a temperature
that is new?
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from openelm_mlx import BatchEngine, SamplingOptions, stream_generate
from openelm_mlx.benchmarks.measure.weights import open_engine, random_engine
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.benchmarks.scripts.pairs import in_turns
from openelm_mlx.device import blas, mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.model.config import BOS

ROWS, PROMPT, ANSWER = 8, 900, 100  # rows that run; tokens of the prompt that joins, of its answer
STEADY = 8  # steps or tokens after which everything runs at its usual speed
STALL = 5.0  # aims: at most this ratio of the p99 of a step to the median,
LATE = 1.7  # of the joining prompt's time to its first token to that alone,
NEW = 1.2  # and of a new temperature's time to its first token to that of a known one
CLOCKS = {"wall": perf_counter, "cpu": process_time}
clock = perf_counter

Result = dict[str, Any]


def ids(engine: Engine, count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [BOS, *(rng.randrange(3, engine.vocab) for _ in range(count - 1))]


def percentile(values: list[float], share: float) -> float:
    """Return the least value that `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def joined(engine: Engine, seed: int, **settings: Any) -> tuple[list[float], list[float], float]:
    """Let a prompt join running rows, and return seconds.

    They are those of the steps before it joins, of the steps until its answer is complete, and the
    time to its first token.
    """
    batch = BatchEngine(engine, 2 * ROWS, **settings)
    endless: dict[str, Any] = {"max_tokens": engine.config.max_context_length, "ignore_eos": True}

    def step() -> tuple[float, Any]:
        start = clock()
        events = batch.step()
        return clock() - start, events

    with closing(batch):
        for row in range(ROWS):
            batch.submit(ids(engine, 16 + row, seed + row), **endless)
        while len({number for number, _ in batch.step()}) < ROWS:
            pass
        before = [step()[0] for _ in range(4 * STEADY)]
        number = batch.submit(ids(engine, PROMPT, seed + ROWS), max_tokens=ANSWER, ignore_eos=True)
        during: list[float] = []
        first, came = 0.0, 0
        while came < ANSWER:
            seconds, events = step()
            during.append(seconds)
            came += sum(owner == number for owner, _ in events)
            first = first or (sum(during) if came else 0.0)
        return before, during, first


def answered(engine: Engine, prompt: list[int], **settings: Any) -> tuple[float, float]:
    """Return the seconds from the call to the first event, and to the last."""
    start, first = clock(), 0.0
    for _ in stream_generate(
        engine, prompt, **{"max_tokens": STEADY, "ignore_eos": True} | settings
    ):
        first = first or clock() - start
    return first, clock() - start


def join(engine: Engine, trials: int, **settings: Any) -> Result:
    """Measure the stalls of running rows, and the wait of a joining prompt against that alone.

    Both take turns. All shapes are traced before.
    """
    cold = joined(engine, 0, **settings)
    answered(engine, ids(engine, PROMPT, 1))
    before, during, alone, among = (list[float]() for _ in range(4))
    for trial in range(trials):
        alone.append(answered(engine, ids(engine, PROMPT, 100 + trial))[0])
        steady, joining, first = joined(engine, 1000 * trial, **settings)
        before += steady
        during += joining
        among.append(first)
    slow, steps = percentile(before + during, 0.99), median(before + during)
    return {
        "settings": settings,
        "trials": trials,
        "median_ms": 1000 * steps,
        "p99_ms": 1000 * slow,
        "stall": slow / steps,
        "stall_target": STALL,
        "before_ms": 1000 * median(before),
        "stall_by_before": slow / median(before),
        "slowest_ms": 1000 * max(during),
        "alone_ms": 1000 * median(alone),
        "among_ms": 1000 * median(among),
        "late": paired_ratio([among], [alone])._asdict(),
        "late_target": LATE,
        "first_time": {"slowest_ms": 1000 * max(cold[1]), "among_ms": 1000 * cold[2]},
    }


@contextmanager
def traces() -> Iterator[list[int]]:
    """Count how often compiled functions are traced: only then does Python run them."""
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
    """Return the options of one of many requests: few sets of filters, but values all different."""
    settings: dict[str, Any] = {"temperature": rng.uniform(0.1, 2.0)}
    if number % 2:
        settings["top_p"] = rng.uniform(0.5, 0.99)
    if number % 4 >= 2:
        settings["top_k"] = rng.randint(2, 100)
    if number % 8 >= 4:
        settings["repetition_penalty"] = rng.uniform(1.01, 1.5)
    return settings


def temperatures(engine: Engine, settings: int, pairs: int) -> Result:
    """Count the traces of many settings, and time known temperatures against new ones.

    One trace is expected for each combination of filters.
    """
    rng, prompt = random.Random(0), ids(engine, 16, 0)
    asked = [settings_of(number, rng) for number in range(settings)]
    expected = len({Filters.of([SamplingOptions(**chosen)]) for chosen in asked})
    with traces() as count:
        for number, chosen in enumerate(asked):
            answered(engine, prompt, seed=number, max_tokens=3, **chosen)
    result: Result = {"settings": settings, "traces": count[0], "combinations": expected}

    def new() -> tuple[float, float]:
        return answered(engine, prompt, seed=1, temperature=rng.uniform(0.1, 2.0))

    def known() -> tuple[float, float]:
        return answered(engine, prompt, seed=1, temperature=0.7)

    timed = list(in_turns(new, known, 2 * pairs))
    for place, name in enumerate(("first_token", f"{STEADY}_tokens")):
        ours, others = ([pair[side][place] for pair in timed] for side in (0, 1))
        result[name] = {
            "known_ms": 1000 * median(others),
            "new_ms": 1000 * median(ours),
            "new_by_known": paired_ratio([ours], [others])._asdict(),
            "target": NEW,
        }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="latency", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("join", "temperatures"))
    model = "a name, folder or file, or random:SIZE"
    add("model", nargs="?", default="openelm-tiny", help=model)
    add("--dtype", help="compute in this type")
    add("--bits", type=int, help="quantize the weights")
    admission = "prompt tokens beside each step; default: the engine's own"
    add("--admission", metavar="N,N,...", help=admission)
    trials = "joins, or a third of the pairs (default: 10)"
    add("--trials", type=int, default=10, help=trials)
    add("--settings", type=int, default=100, help="settings of the sampler (default: 100)")
    busy = "cpu: for a machine that is busy otherwise"
    add("--clock", choices=sorted(CLOCKS), default="wall", help=busy)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    global clock
    clock = CLOCKS[args.clock]
    found: list[Result] = []
    size = args.model.removeprefix("random:")
    if size == args.model:
        engine = open_engine(size, args.dtype, args.bits)[0]
    else:
        engine = random_engine(size, args.dtype, args.bits)
    if args.what == "temperatures":
        found.append(temperatures(engine, args.settings, 3 * args.trials))
    for admission in (args.admission or "").split(",") if args.what == "join" else ():
        print(f"\radmission {admission or 'by default'} ...", end="", file=sys.stderr, flush=True)
        settings = {"admission": int(admission)} if admission else {}
        found.append(join(engine, args.trials, **settings))
    facts = {name: getattr(args, name) for name in ("model", "dtype", "bits", "clock")}
    text = json.dumps({**facts, "blas": blas.path, args.what: found}, indent=1)
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    print(f"\r{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
