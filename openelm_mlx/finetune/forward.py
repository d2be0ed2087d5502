"""The pass of a training step over packed rows."""

from __future__ import annotations

from openelm_mlx.device import mx, nn
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.model.cache import NoCache
from openelm_mlx.model.cache_kinds import Mask
from openelm_mlx.model.decoder import OpenELM


class PackedRows(NoCache):
    """A cache for one pass over packed rows: a token sees the earlier ones of its own segment."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        length = batch.segments.shape[1]
        self.sees = (same & mx.tri(length, dtype=mx.bool_))[:, None]

    def positions(self, length: int) -> mx.array:
        return self.batch.positions

    def mask(self, length: int) -> Mask:
        return self.sees


def token_losses(model: OpenELM, batch: Batch) -> mx.array:
    """Return the negative log-likelihood of each target in nats, [rows, length] float32."""
    hidden = model.hidden(batch.tokens, [PackedRows(batch)] * len(model.layers))
    logits = model.logits(hidden).astype(mx.float32)
    return nn.losses.cross_entropy(logits, batch.targets)
