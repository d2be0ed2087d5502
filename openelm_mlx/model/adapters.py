"""Adapters: low-rank parts that are added to some of a model's matrices.

LoRA (arXiv:2106.09685)     W' = W + scale b a
DoRA (arXiv:2402.09353)     the same, with every row scaled to its learned length
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from openelm_mlx.device import mx


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one matrix [rows, columns]; the arrays are float32."""

    a: mx.array  # [rank, columns]
    b: mx.array  # [rows, rank]
    scale: float
    magnitude: mx.array | None = None  # [rows], the lengths of the adapted rows (DoRA)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def merged(self, weight: mx.array) -> mx.array:
        """Return the adapted matrix in float32."""
        adapted = mx.addmm(weight.astype(mx.float32), self.b, self.a, alpha=self.scale)
        if self.magnitude is None:
            return adapted
        return adapted * (self.magnitude / mx.linalg.norm(adapted, axis=1))[:, None]


@dataclass(frozen=True, eq=False)
class Adapter:
    """The low-rank parts of an adapter by stem, as in `transformer.layers.3.ffn.proj_2`.

    `transformer.token_embeddings` is the input side, and `lm_head` the output side, of a tied
    model too: an adapter that leaves the two tied has the same `LowRank` under both.
    """

    name: str
    parts: Mapping[str, LowRank]
    base: str | None = None  # the fingerprint of its model, None if its files do not say
