"""Measure memory and time of a conversion, of random weights in published shapes.

    python -m openelm_mlx.benchmarks.scripts.conversion 270m 450m 1.1b
    python -m openelm_mlx.benchmarks.scripts.conversion 270m --against-mlx-lm --trials 5

The operating system measures the peak memory of converting a float32 folder to 4 bits. With
--against-mlx-lm the time of the whole process is compared too, the two converters alternating.
It needs disk for the float32 weights and the result: 1.3 GB for 270m, 5 GB for 1.1b.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from openelm_mlx.benchmarks.measure.weights import random_engine, write_folder
from openelm_mlx.convert.tokenizers import build_tokenizer_json, read_tokenizer, tokenizer_config
from openelm_mlx.device import mx
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

IMPORTS = (
    "import openelm_mlx.cli.main, openelm_mlx.convert.pipeline, mlx.core, numpy, sentencepiece, "
    "rich.progress"
)
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


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


def write_source(size: str, folder: Path) -> None:
    """Write random float32 weights of a published size, in a folder that mlx-lm reads too."""
    write_folder(random_engine(size, "float32"), folder)
    mx.clear_cache()
    model = read_tokenizer(folder / "tokenizer.model")
    for name, content in (
        ("tokenizer.json", build_tokenizer_json(model)),
        ("tokenizer_config.json", tokenizer_config(model)),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def measure(size: str, scratch: Path, against_mlx_lm: bool, trials: int) -> str:
    """Return a line of figures."""
    source, ours, theirs = (scratch / name for name in ("source", "ours", "theirs"))
    write_source(size, source)
    _, floor = run("-c", IMPORTS)
    peaks, times, ratios = [], [], []
    for _ in range(trials):
        seconds, peak = run(
            *("-m", "openelm_mlx", "convert", str(source), "-o", str(ours), "--bits", "4")
        )
        peaks.append(peak - floor)
        times.append(seconds)
        shutil.rmtree(ours)
        if against_mlx_lm:
            paths = "--hf-path", str(source), "--mlx-path", str(theirs)
            ratios.append(
                seconds / run("-m", "mlx_lm", "convert", *paths, "-q", "--q-bits", "4")[0]
            )
            shutil.rmtree(theirs)
    largest = max(
        4 * math.prod(shape) for shape in expected_tensors(OpenELMConfig.from_name(size)).values()
    )
    line = (
        f"{size}: peak {max(peaks) / 1e6:,.0f} MB above the interpreter with its imports "
        f"({floor / 1e6:,.0f} MB); largest tensor {largest / 1e6:,.0f} MB, bound "
        f"{(2.5 * largest + 300e6) / 1e6:,.0f} MB; {median(times):.1f} s"
    )
    if ratios:
        spread = f"({min(ratios):.2f}-{max(ratios):.2f}, {trials} pairs)"
        line += f", {median(ratios):.2f} of mlx_lm convert's time {spread}"
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="conversion", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("sizes", nargs="+", metavar="SIZE")
    add("--against-mlx-lm", action="store_true")
    add("--trials", type=int, default=1)
    add("--scratch", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    for size in args.sizes:
        with TemporaryDirectory(dir=args.scratch) as scratch:
            print(measure(size, Path(scratch), args.against_mlx_lm, args.trials), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
