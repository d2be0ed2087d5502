"""A small checkpoint that convert takes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from golden_set import NANO

LONG_AGO = time.time() - 60


def checkpoint(folder: Path, scale: float = 1.0) -> Path:
    """A folder with a CoreNet checkpoint as Apple's releases look, all files older than a
    moment.
    """
    folder.mkdir(parents=True)
    for name in ("checkpoint.pt", "config.yaml", "tokenizer.model"):
        shutil.copy(NANO / name, folder / name)
    if scale != 1.0:
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text + f"# {scale}\n")
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))
    return folder
