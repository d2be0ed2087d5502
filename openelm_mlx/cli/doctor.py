"""`openelm doctor`: reports what a bug report needs, wrong results, and what slows down.

Any part of the report may fail: what failed is said in its place, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import BenchmarkError, MLXError, OptionError

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.results.document import Document

PACKAGES = {"openelm_mlx": "openelm-mlx", "mlx_lm": "mlx-lm"}
REMEDY = "update the system and mlx, and if that does not help, report this page"
OUTPUT = "openelm-first-run.json"
FINE = "this machine computes correctly, and nothing was found that would slow it down"


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine; what a bug report needs",
        description="Show what a bug report needs, whether this device computes correctly, "
        "what slows it down, and the remedy. The exit status is 1 if it computes wrong results.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    full = parser.add_argument_group("check and measure everything about this device")
    text = "compare each path of a kernel with the CPU and time what work costs: minutes"
    full.add_argument("--full", action="store_true", help=text)
    text = "with --full: few lengths and formats, for a first look"
    full.add_argument("--quick", action="store_true", help=text)
    text = f"with --full: the result as JSON, to be attached to an issue (default: {OUTPUT})"
    full.add_argument("--output", metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.full:
        return full(args)
    for name in ("quick", "output"):
        if getattr(args, name):
            raise OptionError(f"--{name} changes what --full does; give --full too")
    return page(args)


def full(args: argparse.Namespace) -> int:
    """Measure everything, write it, and print it; the exit status is 1 if anything is wrong.

    Ctrl-C keeps what was measured, and the exit status is then 130. If the process is ended from
    without, or by a fault of the GPU, what it had measured is in FILE.part.
    """
    from openelm_mlx.cli.benchmark import OUTPUTS, progress_bar, write
    from openelm_mlx.files import check_new, check_writable

    output = args.output or OUTPUT
    for name in (output, f"{output}.part"):
        check_new(name, "--output")
    check_writable(output, "--output")
    from openelm_mlx.benchmarks.doctor import measure
    from openelm_mlx.benchmarks.results.document import to_json, write_file

    part = Path(f"{output}.part")

    def keep(so_far: Document) -> None:
        with suppress(BenchmarkError):  # what cannot be written now is still measured
            write_file(part, to_json(so_far))

    # without the name of the file: that could be the user's, or have folders
    flags = [f"--{name}" for name in ("full", "quick", "json") if getattr(args, name)]
    command = " ".join(["openelm doctor", *flags])
    with progress_bar() as tick:
        document = measure(
            args.quick,
            command,
            tick or (lambda label, work: None),
            keep,
        )
    only = {**dict.fromkeys(OUTPUTS), "output": output, "json": args.json}
    write(document, argparse.Namespace(**only))
    part.unlink(missing_ok=True)
    print(f"written to {output}; please attach it to an issue", file=sys.stderr)
    if document.partial:
        return 130
    return 0 if document.first_run is not None and document.first_run.ok else 1


def page(args: argparse.Namespace) -> int:
    found: dict[str, Any] = {}
    advice: list[str] = []
    for part in (machine, caches, kernels, self_test):
        try:
            found |= part()
        except (MLXError, OptionError):  # MLX, or a setting of the user's: it says what to do
            raise
        except Exception as error:  # whatever it is, the rest is wanted then above all
            found[part.__name__] = f"failed: {type(error).__name__}: {error}"
            advice.append(f"{part.__name__.replace('_', ' ')}: {found[part.__name__]}")
    try:
        advice += hints(found)
    except KeyError as missing:  # the part that has it failed
        advice.append(f"without {missing} what slows this machine down is not known")
    wrong = found.setdefault("wrong_results", [found["self_test"]])
    if wrong:
        advice = [f"this device computes wrong results; {REMEDY}", *wrong, *advice]
    if args.json:
        print(json.dumps({"facts": found, "hints": advice}, default=str))
    else:
        show(found, advice)
    return 1 if wrong else 0


def show(found: Mapping[str, Any], advice: list[str]) -> None:
    from openelm_mlx.cli.models import size_text

    shown: dict[str, Any] = {}
    for key, value in found.items():
        label = key.removesuffix("_bytes")
        text = size_text(value) if label != key and value is not None else value
        shown[label] = f"{shown[label]} ({text})" if label in shown else text  # folder and size
    shown["load_average"] = f"{found.get('load_average', float('nan')):.1f}"
    del shown["wrong_results"]  # they are among the advice
    width = max(map(len, shown))
    for key, value in shown.items():
        name = PACKAGES.get(key) or key.replace("_", " ")
        print(f"{name:<{width}}  {'none' if value is None else value}")
    print()
    print("\n".join(f"! {hint}" for hint in advice) or FINE)


# --- the parts of the report


def machine() -> dict[str, Any]:
    """Report the machine, its software, and how exactly it multiplies."""
    from openelm_mlx.device import facts
    from openelm_mlx.settings import float32_products

    found = facts()
    exact = float32_products(found["backend"], found["chip"], os.environ)
    return found | nvidia() | {"float32_products": exact}


def nvidia() -> dict[str, Any]:
    """Report on Linux the first NVIDIA GPU, and from which wheel MLX's library is."""
    from openelm_mlx.mlx_wheels import mixture, nvidia_smi, wheels

    if not sys.platform.startswith("linux"):
        return {}
    gpu, found = nvidia_smi(), wheels()
    return {
        "nvidia_gpu": ", ".join(gpu.values()) or None,
        "mlx_library": found.library and f"{found.library} {found.versions[found.library]}",
        "mlx_mixture": mixture(found),
    }


def caches() -> dict[str, Any]:
    """Report where downloads and conversions are kept, their size, and the free disk space."""
    from openelm_mlx.engine.hub import hub_cache
    from openelm_mlx.engine.model_cache import conversions, conversions_folder

    return {
        "hub_cache": str(hub_cache()),
        "converted_cache": str(conversions_folder()),
        "converted_cache_bytes": sum(one.nbytes for one in conversions()),
        "free_disk_bytes": free_bytes(hub_cache()),
    }


def free_bytes(folder: Path) -> int:
    """Return the bytes free where `folder` is or would be made: a home may not exist."""
    place = next(above for above in (folder, *folder.parents) if os.path.exists(above))
    return shutil.disk_usage(place).free


def kernels() -> dict[str, Any]:
    """Report which kernels of ours run here; they are compared with their twins once more."""
    from openelm_mlx.model.kernels.kernel import choice
    from openelm_mlx.model.kernels.self_check import forget

    forget()
    choice.cache_clear()
    return {"kernels": str(choice())}


def self_test() -> dict[str, Any]:
    """Report whether this device computes as a reference does, and each way in which it does not.

    Tokens are compared in float32, log probabilities in the type that this device computes in.
    """
    from openelm_mlx.benchmarks.doctor import self_test as test

    wrong: list[str] = []
    try:
        right: int | str = test.matching_tokens()
    except Exception as error:  # of MLX: the other ways are tried all the same
        right = f"{type(error).__name__}: {error}; none"
    tokens = f"{right} of {len(test.TOKENS)} greedy tokens in float32 as on the reference device"
    if right != len(test.TOKENS):
        wrong.append(tokens)
    ways = list(test.results())
    wrong += [str(way) for way in ways if not way.ok]
    off = max((way.off for way in ways if way.off is not None), default=float("nan"))
    dtypes = ", ".join({way.dtype or "an unknown type": None for way in ways})
    names = "; ".join(way.name for way in ways if way.ok) or "nothing"
    return {
        "self_test": tokens,
        "computes_correctly": f"in {dtypes}, log probabilities off by {off:.1g} at most: {names}",
        "reference": test.compared_with(),
        "wrong_results": wrong,
    }


def hints(found: Mapping[str, Any]) -> list[str]:
    """List the facts that would make generation slow, each with its remedy."""
    advice = []
    if found["system"] == "Darwin" and found["machine"] == "x86_64":
        what = "this Python runs under Rosetta or on Intel"
        advice.append(f"{what}; install an arm64 Python to use Metal")
    if found.get("mlx_mixture"):
        advice.append(found["mlx_mixture"])
    elif found["backend"] == "cpu" and found.get("nvidia_gpu"):
        what = f"MLX computes on the processor beside a GPU ({found['nvidia_gpu']})"
        advice.append(f"{what}; install the extra cuda13 or cuda12 (docs/install.md)")
    if (found["system"], found["backend"], found["blas"]) == ("Linux", "cpu", "MLX's own"):
        advice.append(
            "MLX's reference BLAS is slow in float32; install OpenBLAS (apt install libopenblas0) "
            "and leave OPENELM_BLAS unset"
        )
    if found["backend"] == "cpu" and not found["cxx_compiler"]:
        advice.append("no C++ compiler: the compiled step runs unfused; install g++")
    if found["load_average"] > (found["cores"] or 1):
        advice.append(
            f"the machine is busy (load {found['load_average']:.1f}); close what else is running"
        )
    memory = found.get("gpu_memory_bytes") or found["memory_bytes"]
    if memory < 9e9:  # a machine of 8 GB has 8.6e9 bytes, or some less
        advice.append("8 GB of memory or less: prefer 4-bit models (--bits 4)")
    if found["free_disk_bytes"] < 10e9:
        advice.append("less than 10 GB of disk free: the larger models will not fit")
    return advice
