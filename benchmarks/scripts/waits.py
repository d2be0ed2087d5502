"""Measure what users wait for: others that run, new settings of the sampler, a conversion.

    python -m openelm_mlx.benchmarks.scripts.waits join [MODEL] [--admission 16,32,64]
    python -m openelm_mlx.benchmarks.scripts.waits temperatures [MODEL]
    python -m openelm_mlx.benchmarks.scripts.waits conversion 270m 450m 1.1b [--against-mlx-lm]

`join`: rows run and a prompt of 900 tokens joins them. How much longer do their steps take
meanwhile, and how much later does it get its first token than alone? `temperatures`: many settings
in one process. How many steps are traced, and how much later is the first token of a temperature
that is new? `conversion`: random float32 weights of published sizes become 4 bits. How much memory
does the process take at its peak, by the operating system, and how long does it take, with
--against-mlx-lm in turns with mlx-lm's? It needs disk: 1.3 GB for 270m, 5 GB for 1.1b.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

from openelm_mlx import BatchEngine, SamplingOptions, stream_generate
from openelm_mlx.benchmarks.measure.weights import open_engine, random_engine, write_folder
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.benchmarks.scripts.pairs import in_turns
from openelm_mlx.convert.tokenizers import build_tokenizer_json, read_tokenizer, tokenizer_config
from openelm_mlx.device import blas, mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.sampling import Filters
from openelm_mlx.errors import BenchmarkError, OpenELMError
from openelm_mlx.files import check_new, write_json
from openelm_mlx.model.config import BOS, OpenELMConfig, expected_tensors

ROWS, PROMPT, ANSWER = 8, 900, 100  # rows that run; tokens of the prompt that joins, of its answer
STEADY = 8  # steps or tokens after which everything runs at its usual speed
STALL = 5.0  # aims: at most this ratio of the p99 of a step to the median,
LATE = 1.7  # of the joining prompt's time to its first token to that alone,
NEW = 1.2  # and of a new temperature's time to its first token to that of a known one
CLOCKS = {"wall": perf_counter, "cpu": process_time}
clock = perf_counter
IMPORTS = (
    "import openelm_mlx.cli, openelm_mlx.convert.pipeline, mlx.core, numpy, sentencepiece, "
    "rich.progress"
)
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""

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


# --- a conversion


def converted(size: str, scratch: Path, against_mlx_lm: bool, trials: int) -> Result:
    """Measure conversions of one size; memory is what is added to the interpreter and imports."""
    source, ours, theirs = (scratch / name for name in ("source", "ours", "theirs"))
    write_source(size, source)
    _, floor = run("-c", IMPORTS)
    command = "-m", "openelm_mlx", "convert", str(source), "-o", str(ours), "--bits", "4"
    peer = "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(theirs), "-q"
    peaks, times, ratios = [], [], []
    for _ in range(trials):
        seconds, peak = run(*command)
        peaks.append(peak - floor)
        times.append(seconds)
        shutil.rmtree(ours)
        if against_mlx_lm:
            ratios.append(seconds / run(*peer, "--q-bits", "4")[0])
            shutil.rmtree(theirs)
    shapes = expected_tensors(OpenELMConfig.from_name(size)).values()
    largest = max(4 * math.prod(shape) for shape in shapes)
    found: Result = {"size": size, "trials": trials, "peak_bytes": max(peaks), "floor_bytes": floor}
    found |= {"largest_tensor_bytes": largest, "bound_bytes": 2.5 * largest + 300e6}
    found["seconds"] = median(times)
    if ratios:
        found["by_mlx_lm"] = {"low": min(ratios), "median": median(ratios), "high": max(ratios)}
    return found


def write_source(size: str, folder: Path) -> None:
    """Write random float32 weights of a published size, in a folder that mlx-lm reads too."""
    write_folder(random_engine(size, "float32"), folder)
    mx.clear_cache()
    model = read_tokenizer(folder / "tokenizer.model")
    write_json(folder / "tokenizer.json", build_tokenizer_json(model))
    write_json(folder / "tokenizer_config.json", tokenizer_config(model))


def run(*words: str) -> tuple[float, int]:
    """Return seconds and peak resident bytes of Python with these arguments.

    A small launcher starts it: a process's peak begins with that of the process it was forked from.
    Raises `BenchmarkError` with its last line when it fails.
    """
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, peak, status = json.loads(done.stdout)
    if status:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise BenchmarkError(f"{' '.join(words[:5])} ... failed: {last}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)  # getrusage(2): KiB on Linux


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="waits", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("join", "temperatures", "conversion"))
    model = "a name, folder or file, or random:SIZE (default: openelm-tiny); sizes to convert"
    add("models", nargs="*", metavar="MODEL", help=model)
    add("--dtype", help="compute in this type")
    add("--bits", type=int, help="quantize the weights")
    admission = "prompt tokens beside each step; default: the engine's own"
    add("--admission", metavar="N,N,...", default="", help=admission)
    trials = "joins or a third of the pairs, from 2 up (default: 10); conversions (default: 1)"
    add("--trials", type=int, help=trials)
    add("--settings", type=int, default=100, help="settings of the sampler (default: 100)")
    busy = "cpu: for a machine that is busy otherwise"
    add("--clock", choices=sorted(CLOCKS), default="wall", help=busy)
    add("--against-mlx-lm", action="store_true", help="convert in turns with mlx-lm")
    scratch = "where to convert (default: the system's temporary folder)"
    add("--scratch", type=Path, help=scratch)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    least, usual = (1, 1) if args.what == "conversion" else (2, 10)
    args.trials = usual if args.trials is None else args.trials
    if args.trials < least:
        parser.error(f"--trials is {args.trials}; {args.what} needs at least {least}")
    if args.what == "conversion" and not args.models:
        parser.error("give the sizes to convert, like 270m")
    global clock
    clock = CLOCKS[args.clock]
    try:
        if args.json:
            check_new(args.json, "--json")
        found = list(measured(args))
    except OpenELMError as error:
        parser.exit(2, f"waits: {error}\n")
    facts = {name: getattr(args, name) for name in ("models", "dtype", "bits", "clock")}
    text = json.dumps({**facts, "blas": blas.path, args.what: found}, indent=1)
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    print(text)
    return 0


def measured(args: argparse.Namespace) -> Iterator[Result]:
    """Yield what was asked for, model by model."""
    for name in args.models or ["openelm-tiny"]:
        if args.what == "conversion":
            with TemporaryDirectory(dir=args.scratch) as scratch:
                yield converted(name, Path(scratch), args.against_mlx_lm, args.trials)
            continue
        size = name.removeprefix("random:")
        if size == name:
            engine = open_engine(name, args.dtype, args.bits)[0]
        else:
            engine = random_engine(size, args.dtype, args.bits)
        if args.what == "temperatures":
            yield temperatures(engine, args.settings, 3 * args.trials)
            continue
        for admission in args.admission.split(","):
            print(f"admission {admission or 'by default'} ...", file=sys.stderr, flush=True)
            yield join(engine, args.trials, **({"admission": int(admission)} if admission else {}))


if __name__ == "__main__":
    sys.exit(main())
