"""Measure the memory of conversions beside what `--dry-run` says they need.

    python tests/tools/conversion_memory.py 1.1b/bfloat16 --methods verify gptq
    python tests/tools/conversion_memory.py 3b/4/6 --methods verify target-bpw

A model is a published size, the type or the bits of its random weights, and the layers to take, all
by default. Each conversion is a process of its own, whose anonymous memory (RssAnon of Linux) is
read every two milliseconds: the peak is what it takes above the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.measure.weights import padded_pieces, random_tensor
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.quantize.rounding import layout, quantized
from openelm_mlx.convert.targets.folder import write_weights
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES, FLOATS
from openelm_mlx.errors import OpenELMError
from openelm_mlx.files import TensorInfo, write_json
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import KEYS, QuantSpec, config_entry, matrices, planned

METHODS: dict[str, dict[str, Any]] = {
    "quantize": {"bits": 4},
    "verify": {"bits": 4, "verify": True},
    "target-bpw": {"target_bpw": 4.5},
    "gptq": {"bits": 4, "calibrate": "gptq"},
    "distill": {"bits": 4, "calibrate": "distill"},
}
LEARNING = ("gptq", "distill")


def write_model(folder: Path, config: OpenELMConfig, form: str, seed: int = 0) -> Path:
    """Write a folder of random weights in a type, or quantized to some bits in groups of 64.

    One tensor is in memory at a time.
    """
    dtype, spec = (form, None) if form in FLOATS else ("bfloat16", QuantSpec(int(form)))
    shapes, kind = expected_tensors(config), DTYPES[dtype].mlx
    plan = dict.fromkeys(matrices(shapes), spec)
    tensors: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        tensors |= layout(name, TensorInfo(dtype, shape), planned(plan, name))

    def arrays() -> Iterator[tuple[str, mx.array]]:
        for number, (name, shape) in enumerate(shapes.items()):
            like, key = mx.zeros(shape), mx.random.key(seed + number)
            yield from quantized(name, random_tensor(like, key, kind), planned(plan, name)).items()

    folder.mkdir(parents=True)
    write_weights(folder, tensors, arrays())
    raw = config.to_hf_dict()
    if (entry := config_entry(plan)) is not None:
        raw |= dict.fromkeys(KEYS, entry)
    write_json(folder / "config.json", raw)
    (folder / "tokenizer.model").write_bytes(padded_pieces(config.vocab_size))
    return folder


@dataclass
class Found:
    """A conversion's bytes and seconds, measured and as estimated before it."""

    peak: int
    needed: int
    seconds: float


class Peak(threading.Thread):
    """A thread that reads the anonymous memory of this process and keeps the largest value."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.largest = anonymous()
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.largest = max(self.largest, anonymous())
            time.sleep(0.002)

    def taken(self) -> int:
        self.over = True
        self.join()
        return max(self.largest, anonymous()) - self.start_bytes


def anonymous() -> int:
    """Return the bytes of this process's anonymous memory, without mapped files."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon; use Linux")


def measured(**fields: Any) -> Found:
    """Run one conversion in this process."""
    options = ConvertOptions(**fields)
    needed = convert(replace(options, dry_run=True)).memory_bytes
    peak, start = Peak(), time.perf_counter()
    peak.start()
    convert(options)
    return Found(peak.taken(), needed, time.perf_counter() - start)


def in_a_process(**fields: Any) -> Found:
    """Run one conversion in a process of its own."""
    words = [sys.executable, __file__, "--child", json.dumps(fields, default=str)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return Found(**json.loads(done.stdout))


def child(text: str) -> int:
    fields = json.loads(text)
    paths = ("source", "target", "calibration_text", "verify_text")
    fields |= {name: Path(fields[name]) for name in paths if name in fields}
    print(json.dumps(vars(measured(**fields))))
    return 0


def parsed(model: str) -> tuple[OpenELMConfig, str]:
    size, form, layers = (*model.split("/"), "", "")[:3]
    config = OpenELMConfig.from_name(size)
    if layers:
        config = replace(config, num_transformer_layers=int(layers))
    return config, form or "bfloat16"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="conversion_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="SIZE/FORM/LAYERS", help="such as 3b/4/6, or 270m")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--text", type=Path, help="measure and learn on this text, not on what the model writes")
    add("--bpw", type=float, help="for target-bpw; by default 4.5")
    add("--tokens", type=int, default=32768, help="to learn on")
    add("--scratch", type=Path, help="where to convert; by default the system's temporary folder")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child)
    print("| model | method | peak MB | needed MB | seconds |", "|" + "---|" * 5, sep="\n")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for number, model in enumerate(args.models):
            source = write_model(Path(scratch) / f"source-{number}", *parsed(model))
            for method in args.methods:
                fields = METHODS[method] | {"source": source, "target": Path(scratch) / "target"}
                if method == "target-bpw" and args.bpw:
                    fields["target_bpw"] = args.bpw
                if args.text and "verify" not in fields and method != "quantize":
                    fields["calibration_text"] = args.text
                if method in LEARNING:
                    fields["calibration_tokens"] = args.tokens
                try:
                    found = in_a_process(**fields, force=True)
                except (OpenELMError, subprocess.CalledProcessError) as error:
                    print(f"{model} {method}: {error}", file=sys.stderr)
                    continue
                sizes = f"{found.peak / 1e6:,.0f} | {found.needed / 1e6:,.0f}"
                print(f"| {model} | {method} | {sizes} | {found.seconds:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
