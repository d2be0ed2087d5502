"""mlx-lm: its own model class, cache and loop on the same folder."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.utils import load_model

from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.device import facts, mx, nn, utils
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.engine.loading import cast


class MlxLm:
    """A model of mlx-lm."""

    engine = "mlx-lm"
    notes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, load_seconds: float) -> None:
        self.model, self.load_seconds, self.version = model, load_seconds, facts()["mlx_lm"]
        parameters: Any = utils.tree_flatten(model.parameters())
        self.nbytes = sum(array.nbytes for _, array in parameters)

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Generate as `generate_step` does unasked, greedily.

        The memory is that of its weights and what the run added to them.
        """
        found: list[int] = []
        seconds: list[float] = []
        streams: Any = [generation_stream]
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with wired_limit(self.model, streams):
            start = perf_counter()
            for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=tokens):
                seconds.append(perf_counter() - start)
                found.append(int(token))
        mx.synchronize(generation_stream)
        return Timed(tuple(found), tuple(seconds), self.nbytes + mx.get_peak_memory() - before)

    def close(self) -> None:
        del self.model
        mx.clear_cache()


def open_session(folder: Path, dtype: str) -> MlxLm:
    start = perf_counter()
    model, _ = load_model(folder, lazy=True)
    model.update(utils.tree_map(lambda array: cast(array, DTYPES[dtype].mlx), model.parameters()))
    mx.eval(model.parameters())
    return MlxLm(model, perf_counter() - start)
