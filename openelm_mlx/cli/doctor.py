"""`openelm doctor`: what a bug report needs, whether this machine computes rightly, and what would slow it down."""

from __future__ import annotations

import argparse
import json
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine; what a bug report needs",
        description="What a bug report needs, whether this device computes what it should, what is slow here, and the remedy.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.memory import facts, hints, size_text
    from openelm_mlx.self_test import TOKENS, matching_tokens

    found = facts()
    try:
        right = matching_tokens()
        found["self_test"] = f"{right} of {len(TOKENS)} greedy tokens of the bundled model as on the reference device"
    except RuntimeError as error:  # of MLX: the facts are wanted then above all
        right, found["self_test"] = 0, f"MLX failed: {error}"
    advice = hints(found)
    if right < len(TOKENS):
        advice.insert(0, "this device computes something else than it should; update the system and mlx, then report this page")
    if args.json:
        print(json.dumps({"facts": found, "hints": advice}, default=str))
        return 0
    shown = {name.removesuffix("_bytes"): size_text(value) if name.endswith("_bytes") and value is not None else value
             for name, value in found.items() if name != "converted_cache_bytes"}  # fmt: skip
    shown["converted_cache"] = f"{found['converted_cache']} ({size_text(found['converted_cache_bytes'])})"
    shown["load_average"] = f"{found['load_average']:.1f}"
    width = max(map(len, shown))
    for name, value in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {'none' if value is None else value}")
    print()
    print("\n".join(f"! {hint}" for hint in advice) or "nothing found that would be wrong or slow on this machine")
    return 0
