"""The model card of a fine-tuning: what was trained, on what, with which losses, and its use."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_card(folder: Path, report: Any) -> None:
    """Write README.md into the folder of a result."""
