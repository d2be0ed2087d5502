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


def load_golden(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """Return the model of a golden checkpoint, tokens, and CoreNet's logits for them."""
    import numpy as np

    from openelm_mlx.convert.opening import config_for, open_source
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.device import mx
    from openelm_mlx.model.decoder import OpenELM

    path = GOLDEN / name / "checkpoint.pt"
    source = open_source(path)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    options = ConvertOptions(source=path, target=folder / "unused", **FLAGS.get(name, {}))
    model = OpenELM(config_for(path, shapes, options))
    model.load_weights([(name, source.load(name)) for name in source.tensors])
    golden = np.load(GOLDEN / name / "golden.npz")
    return model, mx.array(golden["input_ids"]), golden["logits"]
