"""Query and key norm, rotation, and storing keys and values in place, by one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openelm_mlx.device import mx

if TYPE_CHECKING:
    from openelm_mlx.model.cache import Place
    from openelm_mlx.model.cache_kinds import Arrays
    from openelm_mlx.model.decoder import Projection


def store_heads(projection: Projection, arrays: Arrays, place: Place) -> tuple[mx.array, Arrays]:
    """Store the new keys and values of a step; return the queries [B, q_heads, L or 1, D] and the
    arrays, in each of which the slots of the new tokens have changed.
    """
    q, kv = projection.heads()
    # put_along_axis is one kernel on a GPU; slice_update with an array start is two.
    stored = [
        mx.put_along_axis(buffer, place.slots(part.shape), part, axis=-2)
        for buffer, part in zip(arrays, place.kind.store.pack(kv), strict=True)
    ]
    return q, stored
