"""Write the Metal source of every kernel, type and template; on a Mac, compile and run them.

    python tests/tools/metal_compile.py FOLDER              write FOLDER/custom_kernel_*.metal
    python tests/tools/metal_compile.py FOLDER --compile    and compile each with `xcrun metal`
    python tests/tools/metal_compile.py FOLDER --run        and hold each against its twin, by MLX

MLX writes the sources, as it would compile them. `--run` first tries a kernel of one line, in a
process of its own: where the GPU cannot run that (as that of a virtual machine may not), nothing is
run and nothing has failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from kernel_cases import Case, apart, spread, stores, sums, templates
from metal_source import HEADERS, sources

from openelm_mlx.device import kind, mx
from openelm_mlx.model.kernels.kernel import on_metal, running

COMPILER = ["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-fno-fast-math", "-Wall"]
PROBE = """
import mlx.core as mx
double = mx.fast.metal_kernel("double", ["x"], ["y"], "y[thread_position_in_grid.x] = 2 * x[0];")
(y,) = double(inputs=[mx.array([3.0])], grid=(32, 1, 1), threadgroup=(32, 1, 1),
              output_shapes=[(32,)], output_dtypes=[mx.float32])
raise SystemExit(y.tolist() != [6.0] * 32)
"""


def write(folder: Path) -> list[Path]:
    """Write the sources and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in sources(templates()).items():
        paths.append(folder / f"{name}.metal")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def compiles(path: Path) -> bool:
    """Compile a source and print what the compiler says of it."""
    where = ["-I", str(HEADERS), "-c", str(path), "-o", str(path.with_suffix(".air"))]
    done = subprocess.run([*COMPILER, *where], capture_output=True, text=True)
    print(f"{'compiled' if done.returncode == 0 else 'FAILED'}  {path.name}\n{done.stderr}", end="")
    return done.returncode == 0


def runs_kernels() -> bool:
    """Tell whether this GPU runs a kernel at all. It is tried, as a fault ends the process."""
    return subprocess.run([sys.executable, "-c", PROBE], capture_output=True).returncode == 0


def agrees(case: Case) -> bool:
    """Hold a kernel against its twin and print which of its results differ."""
    wanted = case.call()
    mx.eval(wanted)
    with running(on_metal, frozenset({case.kernel})):
        found = case.call()
    wrong = [n for n, (a, b) in enumerate(zip(wanted, found, strict=True)) if apart(a, b)]
    if wrong:
        print(f"DIFFERS  {case.kernel} {case.title}: results {wrong}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compile", action="store_true", help="with `xcrun metal`")
    parser.add_argument("--run", action="store_true", help="on the GPU of this Mac")
    options = parser.parse_args()
    paths = write(options.folder)
    print(f"{len(paths)} sources in {options.folder}")
    failed = 0
    if options.compile:
        failed += sum(not compiles(path) for path in paths)
    if options.run and kind() != "metal":
        print(f"nothing runs: MLX computes on {kind()} here")
    elif options.run and not runs_kernels():
        print("nothing runs: the GPU of this machine cannot run a kernel of one line")
    elif options.run:
        cases = [*templates(), *spread(sums(), 100), *spread(stores(), 400)]
        failed += sum(not agrees(case) for case in cases)
        print(f"{len(cases)} calls run")
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
