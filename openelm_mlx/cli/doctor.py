"""`openelm doctor`: what a bug report needs, and what would slow this machine down."""

from __future__ import annotations

import argparse
import json
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="facts about this machine", description="What a bug report needs, what is slow here, and the remedy."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.memory import facts, hints

    found = facts()
    advice = hints(found)
    if args.json:
        print(json.dumps({"facts": found, "hints": advice}, default=str))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    print()
    print("\n".join(f"! {hint}" for hint in advice) or "nothing found that would slow this machine down")
    return 0
