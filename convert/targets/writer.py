"""Write safetensors one tensor at a time: the header comes from the plan, so memory holds no more
than a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from openelm_mlx.convert.sources.raw import to_bytes
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.files import INDEX, WEIGHTS, TensorInfo, write_json

SHARD_BYTES = 5 << 30


def split(plan: Mapping[str, TensorInfo], limit: int = SHARD_BYTES) -> list[dict[str, TensorInfo]]:
    """The plan cut into shards of at most `limit` bytes, in order; a larger tensor gets a shard of
    its own.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in plan.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def header(plan: Mapping[str, TensorInfo], target_format: str = "mlx") -> bytes:
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt" if target_format == "hf" else "mlx"}
    }
    start = 0
    for name, info in plan.items():
        end = start + info.nbytes
        entries[name] = {
            "dtype": DTYPES[info.dtype].safetensors,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_weights(
    folder: Path,
    plan: Mapping[str, TensorInfo],
    arrays: Iterable[tuple[str, mx.array]],
    target_format: str = "mlx",
    limit: int = SHARD_BYTES,
) -> list[str]:
    """Write `arrays`, which come in the plan's order, as model.safetensors or shards; returns the
    file names.
    """
    shards = split(plan, limit)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    stream = iter(arrays)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(header(shard, target_format))
            for expected, info in shard.items():
                name, array = next(stream)
                data = to_bytes(array)
                if name != expected or len(data) != info.nbytes:
                    raise RuntimeError(
                        f"bug: planned {expected} of {info.nbytes} bytes, got {name} of {len(data)}"
                    )
                file.write(data)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in plan.values())},
            "weight_map": {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            },
        }
        write_json(folder / INDEX, index)
    return names
