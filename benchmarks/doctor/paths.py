"""Each path that a kernel takes on a GPU, in the shapes of the published models, beside the CPU.

MLX chooses kernels by type, by number of rows, by length and by width of a head, so each path has
its case here. The same function runs on the CPU device of the same MLX, on the same inputs in
float32. Kernels of ours are compared with their twins (kernels/self_check.py), and the twins'
operations here; only the draw has both here, as its tokens must be those of the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from openelm_mlx import device
from openelm_mlx.benchmarks.results.first_run import Compared
from openelm_mlx.device import mx
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Context, Controls, Filters, draw, seed_key
from openelm_mlx.errors import reason
from openelm_mlx.model.decoder import swiglu
from openelm_mlx.model.heads import VALUE, Projection, rotary
from openelm_mlx.model.kernels.kernel import choice, twins

Run = Callable[..., Any]

# Differences that rounding explains, as shares of the largest value. Matrix units of Apple's
# M5 and later and of NVIDIA's GPUs multiply float32 in TF32, which has 11 bits.
LIMITS = {mx.float32: 2e-3, mx.float16: 4e-3, mx.bfloat16: 3e-2}
PACKED = 4  # times the limit: a CPU adds products of packed weights in 16 bits; one was off by 0.08
EXACT_TYPES = 1e-5  # in float32 on the CPU, where only the order of sums differs
HEADS = ((64, 12, 3), (128, 24, 6))  # width, heads, key/value heads: 270m, and 3b at its widest
QUANTIZED = {
    "affine": [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)],
    "mxfp4": [(4, 32)],
    "mxfp8": [(8, 32)],
    "nvfp4": [(4, 16)],
}
SAMPLING = (
    SamplingOptions(temperature=0.8),
    SamplingOptions(temperature=0.8, top_k=40),
    SamplingOptions(temperature=0.8, top_p=0.9),
    SamplingOptions(temperature=0.8, top_k=200, top_p=0.95, min_p=0.02),
)
VOCAB = 32000


@dataclass(frozen=True)
class Case:
    name: str
    run: Run
    arrays: Sequence[mx.array]
    limit: float


def compared(case: Case) -> Compared:
    """Run a case on this device and on the CPU; an error is a result, too."""
    try:
        mx.eval(case.arrays)
        start = time.perf_counter()
        mine = listed(case.run(*case.arrays))
        mx.eval(mine)
        seconds = time.perf_counter() - start
        pairs = zip(mine, on_cpu(case.run, case.arrays), strict=True)
        off = min(max(distance(*pair) for pair in pairs), 1e30)  # JSON has no infinity
        return Compared(case.name, off <= case.limit, off, case.limit, seconds)
    except Exception as error:  # what a device cannot do is what is asked here
        why = f"{type(error).__name__}: {reason(error)}"
        return Compared(case.name, False, None, case.limit, error=why)


def listed(out: Any) -> list[mx.array]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def on_cpu(run: Run, arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return what `run` gives on the CPU, with every float in float32 and no kernel of ours."""
    wide = [a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]
    mx.eval(wide)
    with mx.stream(mx.cpu), twins():
        out = listed(run(*wide))
        mx.eval(out)
    return out


def distance(a: mx.array, b: mx.array) -> float:
    """Return the largest difference as a share of the largest value; of integers, how many differ.

    It is infinite if one is not finite where the other is.
    """
    if not mx.issubdtype(b.dtype, mx.floating):
        return float((a != b).mean())
    a = a.astype(mx.float32)
    finite = mx.isfinite(b)
    if not mx.all(mx.where(finite, mx.isfinite(a), a == b)).item():
        return float("inf")
    largest = float(mx.where(finite, mx.abs(b), 0).max())
    return float(mx.where(finite, mx.abs(a - b), 0).max()) / max(largest, 1e-30)


def cases(quick: bool) -> Iterator[Case]:
    """Yield every case; `quick` leaves out most lengths and formats."""
    gpu = device.kind() != "cpu"
    for dtype, limit in LIMITS.items() if gpu else ((mx.float32, EXACT_TYPES),):
        make = Maker(dtype, limit, quick)
        for width, heads, kv in HEADS[: 1 if quick else None]:
            yield from make.heads(width, heads, kv)
            yield from make.attention(width, heads, kv)
        for rows, columns in ((1536, 1280), (3072, 2048))[: 1 if quick else None]:
            yield from make.products(rows, columns)
            yield from make.quantized(rows, columns)
    yield from choices()


class Maker:
    """The cases of one type."""

    def __init__(self, dtype: mx.Dtype, limit: float, quick: bool) -> None:
        self.dtype, self.limit, self.quick = dtype, limit, quick
        self.seed = 0

    def random(self, *shape: int) -> mx.array:
        self.seed += 1
        return mx.random.normal(shape, key=mx.random.key(self.seed)).astype(self.dtype)

    def case(self, name: str, run: Run, *arrays: mx.array, limit: float | None = None) -> Case:
        with_twins = partial(without_kernels, run)
        limit = self.limit if limit is None else limit
        return Case(f"{name_of(self.dtype)} {name}", with_twins, arrays, limit)

    def heads(self, width: int, heads: int, kv: int) -> Iterator[Case]:
        """Norm and rotation of heads, and storing in a buffer."""
        total, at = heads + 2 * kv, f"heads of {width}"
        weights = mx.random.normal((heads + kv, 2, width // 2), key=mx.random.key(1))
        table = mx.concatenate([weights, mx.full((kv, 2, width // 2), VALUE)])

        def turned(x: mx.array, table: mx.array) -> Any:
            turn = rotary(mx.arange(1000, 1000 + x.shape[1])[None], width, 10000.0)
            both = table + 1j * table[:, ::-1]
            return Projection(x, both, turn, heads, 1e-6, None, False).heads()

        for length in (1, 7):
            x = self.random(1, length, total, width)
            yield self.case(f"norm and rotation of {length}, {at}", turned, x, table)
        for slot in (0, 255):
            place = mx.broadcast_to(mx.array([slot])[None, None, :, None], (1, 2 * kv, 1, width))
            new, buffer = self.random(1, 2 * kv, 1, width), self.random(1, 2 * kv, 256, width)
            store = partial(mx.put_along_axis, axis=-2)
            yield self.case(f"store at {slot}, {at}", store, buffer, place, new, limit=0)

    def attention(self, width: int, heads: int, kv: int) -> Iterator[Case]:
        """One token over a buffer, and prompts: MLX takes other kernels from 9 tokens on."""
        at = f"heads of {width}"

        def attend(q: mx.array, kvs: mx.array, mask: mx.array | str = "causal") -> mx.array:
            k, v = mx.split(kvs, 2, axis=1)
            attention = mx.fast.scaled_dot_product_attention
            return attention(q, k, v, scale=width**-0.5, mask=mask)

        for slots in (256,) if self.quick else (256, 1024, 2048):
            q, kvs = self.random(1, heads, 1, width), self.random(1, 2 * kv, slots, width)
            mask = (mx.arange(slots) <= slots - 60)[None, None, None]
            yield self.case(f"attention of 1 over {slots} slots, {at}", attend, q, kvs, mask)
        for length in (2, 9) if self.quick else (2, 8, 9, 64, 512):
            total = length + 100
            q, kvs = self.random(1, heads, length, width), self.random(1, 2 * kv, total, width)
            yield self.case(f"attention of {length}, causal, {at}", attend, q, kvs)
            window = mx.arange(total) <= mx.arange(100, total)[:, None]
            window = (window & (mx.arange(total) > 40))[None, None]
            yield self.case(f"attention of {length}, window, {at}", attend, q, kvs, window)

    def products(self, rows: int, columns: int) -> Iterator[Case]:
        w, norm = self.random(rows, columns) * columns**-0.5, self.random(columns)
        shape = f"{rows} x {columns}"
        for tokens in (1, 4) if self.quick else (1, 4, 16, 64):
            x = self.random(tokens, columns)
            yield self.case(f"product, {tokens} x {shape}", lambda x, w: x @ w.T, x, w)
        x, residual = self.random(1, columns), self.random(1, rows)
        yield self.case(
            f"product and residual, {shape}", lambda x, w, r: mx.addmm(r, x, w.T), x, w, residual
        )
        yield self.case(f"norm of {columns}", lambda x, w: mx.fast.rms_norm(x, w, 1e-6), x, norm)
        gate = self.random(2, rows)
        yield self.case(f"gate of {rows}", lambda x: swiglu(*mx.split(x, 2)), gate)

    def quantized(self, rows: int, columns: int) -> Iterator[Case]:
        w = (self.random(rows, columns) * columns**-0.5).astype(self.dtype)
        for mode, forms in QUANTIZED.items():
            for bits, group in forms[:1] if self.quick else forms:
                how: Any = {"group_size": group, "bits": bits, "mode": mode}
                with mx.stream(mx.cpu):  # the same bits for both
                    parts: Any = mx.quantize(w.astype(mx.float32), **how)
                    packed = [half(part, self.dtype) for part in parts]
                    mx.eval(packed)
                name = f"{mode} {bits} bits by {group}"
                product = partial(mx.quantized_matmul, transpose=True, **how)
                for tokens in (1,) if self.quick else (1, 4, 64):
                    x = self.random(tokens, columns)
                    about = f"{name}, {tokens} x {rows} x {columns}"
                    yield self.case(about, product, x, *packed, limit=PACKED * self.limit)
                ids, look = mx.array([3, 900]), partial(looked_up, how)
                yield self.case(f"{name}, rows of an embedding", look, ids, *packed)


def half(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def looked_up(how: dict[str, Any], ids: mx.array, *packed: mx.array) -> mx.array:
    rows: Any = [array[ids] for array in packed]
    return mx.dequantize(*rows, **how)


def without_kernels(run: Run, *arrays: mx.array) -> Any:
    with twins():
        return run(*arrays)


def choices() -> Iterator[Case]:
    """The greedy choice, also among equals, and tokens drawn with each filter, the same as on a
    CPU with the same seed.
    """
    logits = 4 * mx.random.normal((8, VOCAB), key=mx.random.key(5))
    for name, values in (("argmax", logits), ("argmax of equals", mx.round(logits))):
        yield Case(name, partial(mx.argmax, axis=-1), [values], 0)
    for options in SAMPLING:

        def drawn(logits: mx.array, options: SamplingOptions = options) -> mx.array:
            filters, rows = Filters.of([options]), logits.shape[0]
            keys = mx.repeat(seed_key(7), rows, axis=0)
            positions = mx.arange(rows, dtype=mx.int32)
            controls = Controls.of([options] * rows, filters, VOCAB)
            newest = mx.zeros((rows,), mx.uint32)
            return draw(logits, filters, Context(controls, keys, positions, newest))

        used = Filters.of([options])
        names = [name for name in ("top_k", "top_p", "min_p") if getattr(used, name)]
        name = f"draw, {', '.join(names) or 'temperature'}"
        if choice().names:
            yield Case(f"{name}, by kernels of ours", drawn, [logits], 0)
        yield Case(name, partial(without_kernels, drawn), [logits], 0)
