"""Where the checkpoints with CoreNet's logits lie, and what must be said of those whose shapes do
not tell it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
NANO = GOLDEN / "openelm-nano"
FLAGS: dict[str, dict[str, Any]] = {
    "noqknorm-gqa2": {"head_dim": 64},
    "noglu-gqa2": {"rope_base": 500.0},
}
