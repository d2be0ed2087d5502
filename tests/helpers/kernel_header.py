"""The header of the kernels that MLX compiles for a processor, compiled once for all of them.

MLX starts g++ for every kernel that it fuses, which takes a second of a processor, and nearly all
of that goes into one header. A `.gch` beside the kernels' sources is found before the header.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-w"]  # MLX's; with others, g++ reads the header itself
HEADER = Path("mlx", "backend", "cpu", "compiled_preamble.h")


def precompile() -> None:
    """Compile the header to where MLX writes kernels, unless it is there or nobody reads it."""
    target = Path(tempfile.gettempdir(), "mlx", version("mlx"), "cpu", f"{HEADER}.gch")
    spec = find_spec("mlx")
    includes = [
        Path(place, "include") for place in (spec and spec.submodule_search_locations) or ()
    ]
    found = [place for place in includes if (place / HEADER).exists()]
    if target.exists() or not found or sys.platform != "linux" or not shutil.which("g++"):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f"{os.getpid()}.gch")
    source = ["-x", "c++-header", str(found[0] / HEADER)]
    done = subprocess.run(["g++", *FLAGS, "-I", str(found[0]), *source, "-o", str(made)])
    if done.returncode == 0:
        made.replace(target)
