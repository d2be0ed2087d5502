"""`openelm doctor`: reports what a bug report needs, wrong results, and what slows down."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"
# Greedy tokens in float32 on the CPU, each from one pass over the entire text. The second best is
# never nearer than 0.2 in logits: rounding changes none of them, a wrong kernel changes most.
TOKENS = (444, 310, 261, 583, 872, 1086, 523, 4024, 272, 262, 523, 429, 310, 492, 651, 2422)
PACKAGES = {"openelm_mlx": "openelm-mlx", "mlx_lm": "mlx-lm"}


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine; what a bug report needs",
        description="Show what a bug report needs, whether this device computes correctly, "
        "what slows it down, and the remedy.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.cli.models import size_text
    from openelm_mlx.device import facts

    found = facts() | caches()
    try:
        right = matching_tokens()
        tokens = f"{right} of {len(TOKENS)} greedy tokens of the bundled model"
        found["self_test"] = f"{tokens} as on the reference device"
    except RuntimeError as error:  # of MLX: the facts are wanted then above all
        right, found["self_test"] = 0, f"MLX failed: {error}"
    advice = hints(found)
    if right < len(TOKENS):
        remedy = "update the system and mlx, and if that does not help, report this page"
        advice.insert(0, f"this device computes wrong results; {remedy}")
    if args.json:
        print(json.dumps({"facts": found, "hints": advice}, default=str))
        return 0
    shown: dict[str, Any] = {}
    for key, value in found.items():
        label = key.removesuffix("_bytes")
        text = size_text(value) if label != key and value is not None else value
        shown[label] = f"{shown[label]} ({text})" if label in shown else text  # folder and size
    shown["load_average"] = f"{found['load_average']:.1f}"
    width = max(map(len, shown))
    for key, value in shown.items():
        name = PACKAGES.get(key) or key.replace("_", " ")
        print(f"{name:<{width}}  {'none' if value is None else value}")
    print()
    fine = "this machine computes correctly, and nothing was found that would slow it down"
    print("\n".join(f"! {hint}" for hint in advice) or fine)
    return 0


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


def hints(found: Mapping[str, Any]) -> list[str]:
    """List the facts that would make generation slow, each with its remedy."""
    advice = []
    if found["system"] == "Darwin" and found["machine"] == "x86_64":
        what = "this Python runs under Rosetta or on Intel"
        advice.append(f"{what}; install an arm64 Python to use Metal")
    if found["system"] == "Linux" and found["blas"] == "MLX's own":
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
    if found["memory_bytes"] < 9e9:  # a machine of 8 GB has 8.6e9 bytes, or some less
        advice.append("8 GB of memory or less: prefer 4-bit models (--bits 4)")
    if found["free_disk_bytes"] < 10e9:
        advice.append("less than 10 GB of disk free: the larger models will not fit")
    return advice


def matching_tokens() -> int:
    """Count how many of `TOKENS`, from the first on, the compiled step gives on this device."""
    from openelm_mlx import load, stream_generate

    engine = load("openelm-tiny", dtype="float32")
    events = stream_generate(engine, PROMPT, max_tokens=len(TOKENS), ignore_eos=True)
    pairs = zip((event.token for event in events), TOKENS, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(TOKENS))
