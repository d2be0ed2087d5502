"""Quantize a model to 4 bits and load the result."""

from pathlib import Path
from tempfile import TemporaryDirectory

from openelm_mlx import generate, load
from openelm_mlx.convert import ConvertOptions, convert

source = load("openelm-tiny").path
with TemporaryDirectory() as scratch:
    target = Path(scratch) / "tiny-4bit"
    report = convert(ConvertOptions(source, target, bits=4))
    print(f"{report.bits_per_weight:.2f} bits per weight, {report.written_bytes:,} bytes")
    print(generate(load(str(target)), "Once upon a time", max_tokens=24))
