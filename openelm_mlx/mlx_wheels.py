"""Tell which of MLX's wheels is here on Linux: that of the processor, or one for NVIDIA GPUs.

Each of them installs mlx/lib/libmlx.so, and the last one installed overwrites the others' file.
Installers do not know that the wheels exclude each other, so this finds out whose library is there.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions

CPU, GPUS = "mlx-cpu", ("mlx-cuda-12", "mlx-cuda-13")
LIBRARY = "mlx/lib/libmlx.so"
SECONDS = 5  # that nvidia-smi may take


@dataclass(frozen=True)
class Wheels:
    """The wheels installed, with their versions, and the one whose library is on the disk."""

    versions: dict[str, str]
    library: str | None

    @property
    def gpu(self) -> str | None:
        """The wheel for a GPU, if there is one."""
        return next((name for name in reversed(GPUS) if name in self.versions), None)

    def again(self, name: str) -> str:
        """Return the command that puts the library of a wheel on the disk.

        A wheel that is not installed has to be of the version that the others have.
        """
        versions = [self.versions.get(name), *self.versions.values()]
        version = next((f"=={one}" for one in versions if one), "")
        return f"pip install --force-reinstall --no-deps {name}{version}"


def wheels(among: Iterable[Distribution] | None = None) -> Wheels:
    """Find the wheels among distributions, by default those of this Python."""
    versions: dict[str, str] = {}
    library = None
    for one in distributions() if among is None else among:
        name = (one.metadata["Name"] or "").lower().replace("_", "-")
        if name not in (CPU, *GPUS) or name in versions:
            continue
        versions[name] = one.version
        path = one.locate_file(LIBRARY)
        try:
            if path.stat().st_size == size_in(one.read_text("RECORD") or ""):  # type: ignore
                library = name
        except OSError:
            continue
    return Wheels(versions, library)


def size_in(record: str) -> int | None:
    """Return the size of the library that a wheel brought, as its RECORD says."""
    sizes = [row[2] for row in csv.reader(record.splitlines()) if row and row[0] == LIBRARY]
    return int(sizes[0]) if sizes and sizes[0].isdigit() else None


def mixture(found: Wheels) -> str | None:
    """Say in one line what is wrong with the wheels, and the remedy; None if nothing is."""
    gpu = found.gpu
    if gpu is None or found.library in GPUS:
        return None
    if found.library is None:
        return f"the library of MLX is damaged; run `{found.again(gpu)}`"
    what = f"{found.library}'s library lies over that of {gpu}"
    return f"{what}, so the GPU is not used; run `{found.again(gpu)}`"


def why_not(error: ImportError, found: Wheels) -> str:
    """Say in one line why MLX cannot be imported on Linux, and the remedy."""
    what = f"MLX cannot start ({error})"
    if not found.versions:
        return f"{what}; run `pip install 'mlx[cpu]'`"
    if found.library is None:
        return f"{what}; run `{found.again(found.gpu or CPU)}`"
    if found.library != CPU:
        needs = f"{found.library} needs an NVIDIA GPU, its driver and the packages nvidia-*"
        return f"{what}: {needs}; without a GPU run `{found.again(CPU)}`"
    return f"{what}; run `{found.again(CPU)}`"


def nvidia_smi() -> dict[str, str]:
    """Return name, driver and memory of the first NVIDIA GPU; nothing without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    keys = ("name", "driver_version", "memory.total")
    query = [f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.partition("\n")[0].split(", ")
    return dict(zip(keys, first, strict=False)) if len(first) == len(keys) else {}
