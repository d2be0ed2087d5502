"""Query and key norm, rotation, and storing keys and values in place, by one kernel.

The twin takes three kernels, and a copy of the entire buffer wherever MLX cannot reuse it: a GPU
that is still at the step before holds its buffers. This kernel writes to the buffers it is given.
Cosines and sines are read from the table that the twin has: both rotate by the same bits, and the
table is one launch a step beside others, not one a layer. Not measured on a Mac.
"""

from __future__ import annotations

from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.model.cache_kinds import Arrays, CacheKind, Place, Plain, Quantized, Store, Window
from openelm_mlx.model.heads import Projection, head_table, rotary
from openelm_mlx.model.kernels.kernel import (
    MOST_ROWS,
    SIMD,
    TYPES,
    Kernel,
    in_use,
    integers,
    scalar,
    twins,
)
from openelm_mlx.model.kernels.self_check import difference, noise

MOST_HEAD_DIM = 256

# One SIMD group a head and token, a threadgroup of its own. An element and its partner in the
# rotation are a pair, and each lane has the pairs lane, lane + 32, ... `start` has the position of
# the first token of each row, or of every token if `each`; with `last`, only the last token of a
# row has queries. `rotation` has the angles of every token twice (`rotary`), forwards first: those
# are read. Code that follows, PLAIN or PACKED, stores keys and values at the number `at`.
HEADS = """
    constexpr int HALF = D / 2;
    constexpr int PAIRS = (HALF + 31) / 32;
    int q_heads = sizes[0], kv_heads = sizes[1], rows = sizes[2], length = sizes[3];
    int slots = sizes[4], keep = sizes[5], ring = sizes[6], last = sizes[7], each = sizes[8];
    int lane = thread_index_in_simdgroup;
    int head = threadgroup_position_in_grid.y;
    int token = threadgroup_position_in_grid.z;
    int row = token / length, place = token % length;
    bool query = head < q_heads;
    if (query && last && place + 1 < length) return;
    const device T* x = qkv + (size_t(token) * (q_heads + 2 * kv_heads) + head) * D;
    float a[PAIRS], b[PAIRS];
    float squares = 0;
    for (int i = 0; i < PAIRS; i++) {
        int pair = lane + 32 * i;
        a[i] = pair < HALF ? float(x[pair]) : 0.0f;
        b[i] = pair < HALF ? float(x[pair + HALF]) : 0.0f;
        squares += a[i] * a[i] + b[i] * b[i];
    }
    if (head < q_heads + kv_heads) {
        float scale = 1;
        if (NORM) scale = metal::precise::rsqrt(simd_sum(squares) / float(D) + eps);
        const device float* turn = (const device float*)rotation + size_t(token) * 2 * D;
        for (int i = 0; i < PAIRS; i++) {
            int pair = lane + 32 * i;
            if (pair < HALF) {
                float u = a[i], v = b[i];
                if (NORM) {  // rounded to T, as the norm of the twin gives it
                    u = float(T(u * scale));
                    v = float(T(v * scale));
                    u *= query ? float(q_norm[pair]) : float(k_norm[pair]);
                    v *= query ? float(q_norm[pair + HALF]) : float(k_norm[pair + HALF]);
                }
                float c = turn[2 * pair], s = turn[2 * pair + 1];
                a[i] = u * c - v * s;
                b[i] = v * c + u * s;
            }
        }
    }
    if (query) {
        int kept = last ? 1 : length;
        device T* to = q + ((size_t(row) * q_heads + head) * kept + (last ? 0 : place)) * D;
        for (int i = 0; i < PAIRS; i++) {
            int pair = lane + 32 * i;
            if (pair < HALF) {
                to[pair] = T(a[i]);
                to[pair + HALF] = T(b[i]);
            }
        }
        return;
    }
    int position = each ? start[token] : start[row] + place;
    int slot = position < keep || ring == 0 ? position : keep + (position - keep) % ring;
    int stored = head - q_heads;  // keys, then values: buffers are [2, rows, kv_heads, slots, n]
    size_t strip = size_t(stored / kv_heads * rows + row) * kv_heads + stored % kv_heads;
    size_t at = strip * slots + slot;
"""

PLAIN = """
    device T* to = (device T*)buffer + at * D;
    for (int i = 0; i < PAIRS; i++) {
        int pair = lane + 32 * i;
        if (pair < HALF) {
            to[pair] = T(a[i]);
            to[pair + HALF] = T(b[i]);
        }
    }
"""

# A value halfway between two steps: MLX's kernels for GPUs round it away from zero, its loops for
# processors to the even one.
HALFWAY = """
#if defined(__METAL_VERSION__) || defined(__CUDACC__)
#define nearest(x) round(x)
#else
#define nearest(x) rint(x)
#endif
"""

# The formula of mx.quantize (mlx/backend/cpu/quantized.cpp): the value of the largest magnitude is
# one of the steps. A group's values are one stream of bits.
PACKED = """
    constexpr int WORDS = GROUP * BITS / 32;
    constexpr float MOST = (1 << BITS) - 1;
    threadgroup float values[D];
    for (int i = 0; i < PAIRS; i++) {
        int pair = lane + 32 * i;
        if (pair < HALF) {
            values[pair] = float(T(a[i]));
            values[pair + HALF] = float(T(b[i]));
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int group = 0; group < D / GROUP; group++) {
        int first = group * GROUP;
        float low = values[first + lane], high = low;
        for (int e = lane + 32; e < GROUP; e += 32) {
            low = min(low, values[first + e]);
            high = max(high, values[first + e]);
        }
        low = simd_min(low);
        high = simd_max(high);
        bool below = fabs(low) > fabs(high);
        float step = max((high - low) / MOST, 1e-7f);
        step = below ? step : -step;
        float edge = below ? low : high;
        float whole = nearest(edge / step);
        float bias = 0;
        if (whole != 0) {
            step = edge / whole;
            bias = edge;
        }
        size_t number = at * (D / GROUP) + group;
        if (lane == 0) {
            ((device T*)scales)[number] = T(step);
            ((device T*)biases)[number] = T(bias);
        }
        for (int w = lane; w < WORDS; w += 32) {
            uint word = 0;
            for (int e = 32 * w / BITS; e * BITS < 32 * w + 32; e++) {
                float value = nearest((values[first + e] - bias) / step);
                uint bits = uint(min(max(value, 0.0f), MOST));
                int shift = e * BITS - 32 * w;  // below 0 where the word before has a part of it
                word |= shift < 0 ? bits >> -shift : bits << shift;
            }
            ((device uint*)words)[number * WORDS + w] = word;
        }
    }
"""

GIVEN = ("qkv", "q_norm", "k_norm", "rotation", "start", "sizes", "eps")
NORM_ROPE_STORE = Kernel(
    "norm_rope_store", (*GIVEN, "buffer"), ("q",), HEADS + PLAIN, in_place=("buffer",)
)
# The two have one name, by which both are in use or neither is.
PARTS = ("words", "scales", "biases")
NORM_ROPE_PACK = Kernel("norm_rope_store", (*GIVEN, *PARTS), ("q",), HEADS + PACKED, HALFWAY, PARTS)


def store_heads(projection: Projection, arrays: Arrays, place: Place) -> tuple[mx.array, Arrays]:
    """Store the new keys and values of a step; return the queries [B, q_heads, L or 1, D] and the
    arrays, in each of which the slots of the new tokens have changed.
    """
    if in_use(NORM_ROPE_STORE) and fits(projection.raw, arrays):
        return by_kernel(projection, arrays, place)
    q, kv = projection.heads()
    # put_along_axis is one kernel on a GPU; slice_update with an array start is two.
    stored = [
        mx.put_along_axis(buffer, place.slots(part.shape), part, axis=-2)
        for buffer, part in zip(arrays, place.kind.store.pack(kv), strict=True)
    ]
    return q, stored


def fits(raw: mx.array, arrays: Arrays) -> bool:
    """Return whether the kernel can run: pairs in a head, one type, arrays it may write to, and
    tokens that a grid can hold.

    MLX gives a kernel fewer than 8 elements as constants.
    """
    rows, length, _, head_dim = raw.shape
    one_type = raw.dtype in TYPES and arrays[-1].dtype == raw.dtype
    large, few = all(array.size >= 8 for array in arrays), rows * length <= MOST_ROWS
    return one_type and large and few and head_dim % 2 == 0 and 8 <= head_dim <= MOST_HEAD_DIM


def by_kernel(projection: Projection, arrays: Arrays, place: Place) -> tuple[mx.array, Arrays]:
    raw, store = projection.raw, place.kind.store
    rows, length, heads, head_dim = raw.shape
    kept = 1 if projection.last else length
    template: list[tuple[str, Any]] = [("T", raw.dtype), ("D", head_dim)]
    template.append(("NORM", projection.eps is not None))
    kernel = NORM_ROPE_STORE
    if isinstance(store, Quantized):
        kernel = NORM_ROPE_PACK
        template += [("BITS", store.bits), ("GROUP", store.group_size)]
    layout = place.kind.layout
    keep, ring = (layout.keep, layout.ring) if isinstance(layout, Window) else (0, 0)
    kv_heads, slots = arrays[0].shape[2:4]
    q_heads = projection.q_heads
    each = place.start.ndim == 2
    sizes = integers(q_heads, kv_heads, rows, length, slots, keep, ring, projection.last, each)
    q_norm, k_norm = projection.norms or (raw, raw)  # without a norm these are not read
    (q,) = kernel(
        raw,
        q_norm,
        k_norm,
        projection.rotation,
        place.start,
        sizes,
        scalar(projection.eps or 0.0),
        *arrays,
        grid=(SIMD, heads, rows * length),
        threadgroup=(SIMD, 1, 1),
        shapes=[(rows, q_heads, kept, head_dim)],
        dtypes=[raw.dtype],
        template=tuple(template),
    )
    return q, mx.depends(arrays, [q])


def check() -> str:
    """Return how the kernel differs from its twin on three tokens of two rows, "" if it does not.

    Packed values are compared as what they stand for: rounding may tell one step from the next.
    """
    cases: list[tuple[mx.Dtype, Store]] = [(dtype, Plain()) for dtype in TYPES]
    for dtype, store in [*cases, (mx.bfloat16, Quantized(8, 64))]:
        mine = stored_noise(dtype, CacheKind(store, Window(20, 3)))
        with twins():
            twin = stored_noise(dtype, CacheKind(store, Window(20, 3)))
        if text := difference(mine, twin):
            return f"{store} in {dtype}: {text}"
    return ""


def stored_noise(dtype: mx.Dtype, kind: CacheKind) -> list[mx.array]:
    """Return the queries, and the arrays that `store_heads` has changed, of random inputs."""
    norms = noise(1, (64,), dtype), noise(2, (64,), dtype)
    place = Place(mx.array([2, 70]), kind, 52)
    rotation = rotary(place.positions(3), 64, 10000.0)
    raw, weights = noise(3, (2, 3, 7, 64), dtype), head_table(norms, 3, 2, 64)
    projection = Projection(raw, weights, rotation, 3, 1e-6, norms, last=False)
    queries, arrays = store_heads(
        projection, kind.store.pack(noise(4, (2, 2, 2, 52, 64), dtype)), place
    )
    if isinstance(kind.store, Quantized):
        form: Any = {"group_size": kind.store.group_size, "bits": kind.store.bits}
        words, scales, biases = arrays
        arrays = [mx.dequantize(words, scales, biases, **form)]
    return [queries, *arrays]
