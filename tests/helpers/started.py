"""The command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys

HELP = """import sys
from openelm_mlx.cli import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit:
    print(*sys.modules)
"""


def help_of(*command: str) -> tuple[str, set[str]]:
    """Return what a command's --help prints, and the modules that are imported by then."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command], capture_output=True, text=True, check=True
    )
    *shown, modules = done.stdout.splitlines()
    return "\n".join(shown), set(modules.split())
