"""Calls of the model's functions that have a kernel: for every shape of the published sizes and of
the golden checkpoints, every type, and lengths at the borders of blocks and windows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
from golden_set import FLAGS, GOLDEN

from openelm_mlx.convert.opening import config_for, open_source
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.device import mx, nn
from openelm_mlx.model.cache import Place
from openelm_mlx.model.cache_kinds import CacheKind, Plain, Quantized, Window
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, layer_shapes
from openelm_mlx.model.draws import COLD, Limits
from openelm_mlx.model.heads import Projection, head_table, rotary
from openelm_mlx.model.kernels import sample
from openelm_mlx.model.kernels.add_rms_norm import Sum, sum_and_norm
from openelm_mlx.model.kernels.attend import ATTEND, attend
from openelm_mlx.model.kernels.kernel import in_use
from openelm_mlx.model.kernels.norm_rope_store import store_heads
from openelm_mlx.model.kernels.store_and_attend import store_and_attend

MOST = int(os.environ.get("OPENELM_KERNEL_CASES", "18"))  # of each test; 100000 is all
TYPES = (mx.bfloat16, mx.float16, mx.float32)
KINDS = {
    "plain": CacheKind(),
    "8 bits": CacheKind(Quantized(8, 64)),
    "4 bits": CacheKind(Quantized(4, 32)),
    "window": CacheKind(Plain(), Window(300, 4)),
    "window, 4 bits": CacheKind(Quantized(4, 64), Window(300, 4)),
    "window, 5 bits": CacheKind(Quantized(5, 64), Window(300, 4)),
    "8 bits of 128": CacheKind(Quantized(8, 128)),
}
BORDERS = (0, 255, 256, 257, 511)  # of blocks; and of the window above:
RING = (3, 4, 331, 332, 700)


T = TypeVar("T")


def spread(items: Iterable[T], most: int = MOST) -> list[T]:
    """Return at most so many of the items, from all over."""
    items = list(items)
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items


@dataclass(frozen=True)
class Case:
    """A call that launches one kernel, once, where kernels are in use."""

    kernel: str
    title: str
    call: Callable[[], list[mx.array]]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def sum_case(dtype: mx.Dtype, rows: int, width: int, size: float = 1.0, eps: float = 1e-6) -> Case:
    """A sum and its norm; `size` is that of the values."""

    def call() -> list[mx.array]:
        norm = nn.RMSNorm(width, eps=eps)
        norm.weight = 1 + 0.3 * normal(3, width, dtype=dtype)
        residual, added = (size * normal(seed, rows, width, dtype=dtype) for seed in (1, 2))
        return list(sum_and_norm(Sum(residual.astype(dtype), added.astype(dtype)), norm))

    return Case("add_rms_norm", f"{dtype} {rows} x {width}", call)


def store_case(
    dtype: mx.Dtype,
    heads: tuple[int, int, int],
    kind: str = "plain",
    starts: tuple[int, ...] = (255,),
    length: int = 1,
    last: bool = True,
    norm: bool = True,
    each: bool = False,
    eps: float = 1e-6,
    size: float = 1.0,
    fill: tuple[float, ...] = (),
) -> Case:
    """A token or more of each row, stored from the positions `starts` on. `heads` are those of
    queries and keys, and their width; with `each`, every token has a position of its own. The
    first rows are filled with one number each where `fill` has them, and others then have few.
    """
    q_heads, kv_heads, width = heads

    def call() -> list[mx.array]:
        cached, start = KINDS[kind], mx.array(starts)
        if each:
            start = start[:, None] + mx.arange(length)
        slots = cached.layout.slots_for(max(starts) + length, 256)
        place = Place(start, cached, slots)
        norms = tuple(1 + 0.3 * normal(seed, width, dtype=dtype) for seed in (1, 2))
        table = head_table(norms if norm else (None, None), q_heads, kv_heads, width)
        rows, count = len(starts), q_heads + 2 * kv_heads
        raw = size * normal(3, rows, length, count, width)
        if fill:
            same = mx.array(fill)[:, None, None, None] * mx.ones(raw.shape[1:])
            raw = mx.concatenate([same, mx.round(2 * raw[len(fill) :]) / 2])
        one = Projection(
            raw.astype(dtype),
            table,
            rotary(place.positions(length), width, 10000.0),
            q_heads,
            eps if norm else None,
            norms if norm else None,
            last,
        )
        old = cached.store.pack(normal(4, 2, rows, kv_heads, slots, width, dtype=dtype))
        queries, stored = store_heads(one, old, place)
        return [queries, *stored]

    title = f"{dtype} {heads} {kind} {starts} x {length} {last} {norm} {each}"
    return Case("norm_rope_store", title, call)


def attend_case(
    dtype: mx.Dtype,
    heads: tuple[int, int, int],
    starts: tuple[int, ...],
    length: int = 1,
    asked: int | None = None,
    each: bool = False,
    free: int = 5,
) -> Case:
    """The last `asked` tokens of each row attend; `heads` are those of queries and keys, and their
    width. `free` slots and more lie behind a row's tokens: for the kernel they are not a number.
    """
    q_heads, kv_heads, width = heads

    def call() -> list[mx.array]:
        start = mx.array(starts)
        if each:
            start = start[:, None] + mx.array([(7 * i) % 5 for i in range(length)])
        slots = max(starts) + length + free
        place = Place(start, CacheKind(), slots)
        q = normal(1, len(starts), q_heads, asked or length, width, dtype=dtype)
        buffer = normal(2, 2, len(starts), kv_heads, slots, width, dtype=dtype)
        if in_use(ATTEND):
            filled = place.positions(length).max(axis=1)[:, None] >= mx.arange(slots)
            buffer = mx.where(filled[None, :, None, :, None], buffer, mx.array(mx.nan, dtype))
        mask = place.mask(length)[..., -(asked or length) :, :]
        return [attend(q, [buffer], place, length, mask, 0.25)]

    return Case("attend", f"{dtype} {heads} {starts} x {length} {asked} {each}", call)


def apart(wanted: mx.array, found: mx.array) -> bool:
    """Tell more than rounding. Packed words are equal, and bfloat16; what is one unit of a norm in
    float16 is up to two of its product with a weight.
    """
    assert wanted.shape == found.shape and wanted.dtype == found.dtype
    if wanted.dtype in (mx.bfloat16, mx.uint32):
        return not mx.array_equal(wanted, found).item()
    units = 2 if wanted.dtype == mx.float16 else 16
    size = mx.maximum(mx.abs(wanted), 1).astype(mx.float32)
    gap = mx.abs(wanted.astype(mx.float32) - found.astype(mx.float32)) / size
    return gap.max().item() > units * mx.finfo(wanted.dtype).eps


def draw_case(
    dtype: mx.Dtype,
    rows: int,
    vocab: int,
    listed: int = 512,
    threads: int = 768,
    filtered: bool = True,
    hot: bool = False,
) -> Case:
    """A token of each row, under filters by chance; at most `listed` are compared with each other.

    Rows are flat, steep, have equal logits, forbid most tokens, or have no numbers. If they are
    `hot`, many are flat, and no token that stays is rare.
    """

    def call() -> list[mx.array]:
        rng = np.random.default_rng(vocab)

        def some(off: float, *values: float) -> list[float]:
            return [off if rng.random() < 0.3 else float(rng.choice(values)) for _ in range(rows)]

        temperature = mx.array([100.0] * rows if hot else some(1.0, COLD, 1e-9, 0.5, 3.0))
        few, shares = ([], [0.5, math.inf]) if hot else ([1, 2, 4, 8], [0.0, 0.25, 0.5, 0.9])
        top_k = mx.array([int(k) for k in some(vocab, *few, vocab // 2, vocab - 1)])
        top_p = mx.array(some(math.inf, *shares, 0.999))
        min_p = mx.array(some(math.inf, 0.0, 1.0, 3.0))
        sizes = [0, 0, 60] if hot else [0, 0.3, 1, 3, 30]
        logits = rng.normal(size=(rows, vocab)) * rng.choice(sizes, size=(rows, 1))
        coarse = rng.random(rows) < 0.5
        logits[coarse] = np.round(logits[coarse])
        forbidden = rng.random((rows, vocab)) < rng.choice([0, 0, 0.6], size=(rows, 1))
        logits[forbidden] = -np.inf
        logits[rng.random(rows) < 0.3, vocab // 2] = 1
        logits[-1] = np.nan
        with patch.multiple(sample, LIST=listed, MOST_THREADS=threads):
            token = sample.draw_by_kernel(
                mx.array(logits.astype(np.float32)).astype(dtype),
                Limits(temperature, *((top_k, top_p, min_p) if filtered else ())),
                mx.random.split(mx.random.key(vocab), rows),
                mx.arange(rows),
            )
        return [token]

    title = f"{dtype} {rows} x {vocab}, {listed} listed, {filtered} {hot}"
    return Case("sample", title, call)


# --- what the broken kernels are shown: few cases that leave no part of a kernel unused

BF16 = mx.bfloat16
SMALL: dict[str, Any] = {"size": 1e-3, "eps": 1e-5}  # values that show whether eps is added
REVEALING = {
    "add_rms_norm": [
        sum_case(BF16, 2, 201),
        sum_case(BF16, 1, 4096),
        sum_case(BF16, 3, 70, **SMALL),
    ],
    "norm_rope_store": [
        store_case(BF16, (3, 2, 66), "window", (0, 3, 331, 700), 3, last=False),
        store_case(BF16, (2, 1, 64), "plain", (5, 255), 2, last=False, each=True, **SMALL),
        store_case(BF16, (2, 1, 64), "plain", (5,), 3, norm=False),
    ],
    "norm_rope_store, packed": [  # broken behind the part that it shares with the one before
        store_case(BF16, (2, 1, 96), "4 bits", (5, 9, 6, 255), fill=(0, 1e-7, -1.5)),
        store_case(BF16, (1, 3, 64), "window, 5 bits", (0, 700, 331, 5), 3),
        store_case(BF16, (1, 3, 128), "8 bits of 128", (1, 2, 3, 9), 3),
    ],
}


REVEALING["attend"] = [
    attend_case(mx.float32, (4, 2, 64), (0, 133), 2, 1),
    attend_case(mx.float32, (1, 1, 32), (3, 0), 3, each=True),
    attend_case(BF16, (1, 1, 32), (150, 400), free=0),
]


def attended_case(
    heads: tuple[int, int, int],
    starts: tuple[int, ...],
    norm: bool = True,
    size: float = 1.0,
    eps: float = 1e-6,
) -> Case:
    """A token of each row, stored, and its attention; slots behind it are not numbers."""
    q_heads, kv_heads, width = heads

    def call() -> list[mx.array]:
        rows, place = len(starts), Place(mx.array(starts), CacheKind(), 256)
        norms = tuple(1 + 0.3 * normal(seed, width, dtype=BF16) for seed in (1, 2))
        table = head_table(norms if norm else (None, None), q_heads, kv_heads, width)
        raw = (size * normal(3, rows, 1, q_heads + 2 * kv_heads, width)).astype(BF16)
        given = (eps, norms) if norm else (None, None)
        turn = rotary(place.positions(1), width, 10000.0)
        one = Projection(raw, table, turn, q_heads, *given, last=True)
        behind = (mx.arange(256) >= mx.array(starts)[:, None])[:, None, :, None]
        buffer = normal(4, 2, rows, kv_heads, 256, width, dtype=BF16)
        buffer = mx.where(behind, mx.array(mx.nan, BF16), buffer)
        out, stored = store_and_attend(one, [buffer], place, place.mask(1), width**-0.5)
        return [out, *stored]

    return Case("store_and_attend", f"{heads} {starts} {norm}", call)


REVEALING["store_and_attend"] = [
    attended_case((6, 3, 64), (0, 3, 130, 255)),
    attended_case((2, 1, 96), (20,), **SMALL),
    attended_case((2, 1, 32), (5,), norm=False, size=10),
]
REVEALING["sample"] = [
    draw_case(mx.float32, 150, 71),
    draw_case(mx.float32, 300, 90, listed=8, threads=32),
    draw_case(mx.float32, 800, 126, listed=8, threads=32, hot=True),
    draw_case(BF16, 40, 41, threads=32, filtered=False),
    draw_case(mx.float32, 60, 1100, listed=16),
]


# --- all shapes


@cache
def configs() -> dict[str, OpenELMConfig]:
    """Return the configurations of the published sizes and of the golden checkpoints."""
    found = {name: OpenELMConfig.from_name(name) for name in PUBLISHED}
    for name in ("tied-gqa4", "untied-mha", *FLAGS, "openelm-nano", "openelm-tiny"):
        path = GOLDEN / name / "checkpoint.pt"
        options = ConvertOptions(source=path, target=path, **FLAGS.get(name, {}))
        shapes = {name: info.shape for name, info in open_source(path).tensors.items()}
        found[name] = config_for(path, shapes, options)
    return found


def sums() -> Iterator[Case]:
    widths = sorted({config.model_dim for config in configs().values()})
    for width, rows, dtype in product(widths, (1, 5), TYPES):
        yield sum_case(dtype, rows, width)


def stores() -> Iterator[Case]:
    heads = sorted(
        {
            (shape.q_heads, shape.kv_heads, config.head_dim)
            for config in configs().values()
            for shape in layer_shapes(config)
        }
    )
    for shape, (kind, cached), dtype in product(heads, KINDS.items(), TYPES):
        if isinstance(cached.store, Quantized) and shape[2] % cached.store.group_size:
            continue
        starts = RING if isinstance(cached.layout, Window) else BORDERS
        for start in starts:
            yield store_case(dtype, shape, kind, (start,))
        yield store_case(dtype, shape, kind, starts)
        yield store_case(dtype, shape, kind, starts, 3, last=False)
        yield store_case(dtype, shape, kind, starts[:2], 9, last=True, each=True)
        yield store_case(dtype, shape, kind, starts[1:3], 2, norm=False)


def templates() -> Iterator[Case]:
    """One call for each type and template of a kernel."""
    for dtype in TYPES:
        yield sum_case(dtype, 1, 1280)
        yield draw_case(dtype, 1, 7)
        yield draw_case(dtype, 1, 32000, filtered=False)
        yield store_case(dtype, (12, 3, 128), starts=(1,) * 9)  # positions that are no constants
        for kind, norm in product(KINDS, (True, False)):
            yield store_case(dtype, (12, 3, 128), kind, norm=norm)
