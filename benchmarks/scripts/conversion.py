"""Memory and time of a conversion as the operating system measures them, of random weights in
published shapes.

    python -m openelm_mlx.benchmarks.scripts.conversion 270m 450m 1.1b            # peak memory of a float32 folder to 4 bits
    python -m openelm_mlx.benchmarks.scripts.conversion 270m --against-mlx-lm     # and whole-process time, alternating

Needs disk for the float32 weights and the result: 1.3 GB for 270m, 5 GB for 1.1b.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from openelm_mlx.benchmarks.measure.weights import padded_pieces, published
from openelm_mlx.convert.targets.writer import write_weights
from openelm_mlx.convert.tokenizers.tokenizer_json import build_tokenizer_json, tokenizer_config
from openelm_mlx.convert.tokenizers.tokenizer_model import read_tokenizer
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

IMPORTS = "import openelm_mlx.cli.main, openelm_mlx.convert.pipeline, mlx.core, numpy, sentencepiece, rich.progress"


def write_float32(config: OpenELMConfig, folder: Path) -> int:
    """A Hugging Face folder of seeded random float32 weights, written a tensor at a time; bytes of
    the largest tensor.
    """
    folder.mkdir(parents=True)
    plan = {name: TensorInfo("float32", shape) for name, shape in expected_tensors(config).items()}

    def arrays() -> Iterator[tuple[str, mx.array]]:
        for number, (name, (_, shape)) in enumerate(plan.items()):
            yield name, mx.random.normal(shape, scale=0.02, key=mx.random.key(number))

    write_weights(folder, plan, arrays())
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()), encoding="utf-8")
    pieces = folder / "tokenizer.model"
    pieces.write_bytes(padded_pieces((BUNDLED / "tokenizer.model").read_bytes(), config.vocab_size))
    model = read_tokenizer(pieces)
    (folder / "tokenizer.json").write_text(
        json.dumps(build_tokenizer_json(model)), encoding="utf-8"
    )  # for mlx-lm
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(model)), encoding="utf-8"
    )
    return max(4 * math.prod(info.shape) for info in plan.values())


LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process. Raises `BenchmarkError` with its last line when
    it fails.

    A small launcher starts it: a process's peak begins with that of the process it was forked from.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True
    )
    seconds, peak, status = json.loads(done.stdout)
    if status:
        raise BenchmarkError(
            f"{' '.join(command[:6])} ... failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    return seconds, peak * (
        1 if sys.platform == "darwin" else 1024
    )  # getrusage(2): bytes on macOS, KiB on Linux


def measure(size: str, scratch: Path, against_mlx_lm: bool, trials: int) -> None:
    source, ours, theirs = scratch / "source", scratch / "ours", scratch / "theirs"
    largest = write_float32(published(size), source)
    _, floor = run([sys.executable, "-c", IMPORTS])
    convert = [
        sys.executable,
        "-m",
        "openelm_mlx",
        "convert",
        str(source),
        "-o",
        str(ours),
        "--bits",
        "4",
    ]
    peaks, times, ratios = [], [], []
    for _ in range(trials):
        shutil.rmtree(ours, ignore_errors=True)
        seconds, peak = run(convert)
        peaks.append(peak - floor)
        times.append(seconds)
        if against_mlx_lm:
            shutil.rmtree(theirs, ignore_errors=True)
            other, _ = run(
                [
                    sys.executable,
                    "-m",
                    "mlx_lm",
                    "convert",
                    "--hf-path",
                    str(source),
                    "--mlx-path",
                    str(theirs),
                    "-q",
                    "--q-bits",
                    "4",
                ]
            )
            ratios.append(seconds / other)
    bound = 2.5 * largest + 300e6
    line = (
        f"{size}: peak {max(peaks) / 1e6:,.0f} MB above the interpreter with its imports ({floor / 1e6:,.0f} MB); largest "
        f"tensor {largest / 1e6:,.0f} MB, bound {bound / 1e6:,.0f} MB; {median(times):.1f} s"
    )
    if ratios:
        line += f", {median(ratios):.2f} of mlx_lm convert's time ({min(ratios):.2f}-{max(ratios):.2f}, {trials} pairs)"
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="conversion", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sizes", nargs="+", metavar="SIZE")
    parser.add_argument("--against-mlx-lm", action="store_true")
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument(
        "--scratch", type=Path, help="where to write (default: the system's temporary folder)"
    )
    args = parser.parse_args(argv)
    for size in args.sizes:
        with TemporaryDirectory(dir=args.scratch) as scratch:
            measure(size, Path(scratch), args.against_mlx_lm, args.trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
