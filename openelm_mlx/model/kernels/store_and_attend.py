"""One token's heads normed, rotated and stored, and their attention, by one kernel.

The kernel does the work of `norm_rope_store` and `attend` in one launch, for steps of a token a row
over plain keys and values of few slots. Where slots are many, attention is more than its launch. It
is in use on NVIDIA's GPUs (docs/performance.md), and not measured on a Mac.

The function `store_and_attend` is where every step of every device enters: where this kernel is not
in use or does not fit, `store_heads` and `attend` do the work, by a kernel or by operations each.
"""

from __future__ import annotations

from openelm_mlx.device import mx
from openelm_mlx.model.cache_kinds import Arrays, CacheKind, Growing, Mask, Place, Plain
from openelm_mlx.model.heads import Projection, head_table, rotary
from openelm_mlx.model.kernels.attend import GROUPS, RUNNING, attend
from openelm_mlx.model.kernels.kernel import (
    SIMD,
    TYPES,
    Kernel,
    in_use,
    integers,
    scalar,
    twins,
)
from openelm_mlx.model.kernels.norm_rope_store import store_heads
from openelm_mlx.model.kernels.self_check import difference, noise

MOST_SLOTS = 512  # a launch saved is worth less than the best attention where slots are many

# One threadgroup a query head. Its first three SIMD groups make the new query, key and value, each
# rounded to T; the query heads that share a key head all make the key, and the first of them stores
# it. Stored slots are read only below the position of the token.
STORE_AND_ATTEND = Kernel(
    "store_and_attend",
    ("qkv", "q_norm", "k_norm", "rotation", "start", "sizes", "eps", "factor", "buffer"),
    ("out",),
    """
    constexpr int EACH = D / 32;
    constexpr int HALF = D / 2;
    constexpr int KEYS = 4;
    int slots = sizes[0], heads = sizes[1], kv_heads = sizes[2], rows = sizes[3];
    int lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
    int head = threadgroup_position_in_grid.y, row = threadgroup_position_in_grid.z;
    int sharing = heads / kv_heads;
    int kv_head = head / sharing;
    int count = start[row];
    size_t strip = (size_t(row) * kv_heads + kv_head) * slots;
    size_t between = size_t(rows) * kv_heads * slots;  // keys and values
    threadgroup float fresh[3 * D];
    if (part < 3) {
        int which = part == 0 ? head : heads + (part - 1) * kv_heads + kv_head;
        const device T* x = qkv + (size_t(row) * (heads + 2 * kv_heads) + which) * D;
        const device float* turn = (const device float*)rotation + size_t(row) * 2 * D;
        device T* to = (device T*)buffer + (strip + (part - 1) * between + count) * D;
        float squares = 0;
        for (int pair = lane; pair < HALF; pair += 32) {
            float a = float(x[pair]), b = float(x[pair + HALF]);
            squares += a * a + b * b;
        }
        float scale = metal::precise::rsqrt(simd_sum(squares) / float(D) + eps);
        for (int pair = lane; pair < HALF; pair += 32) {
            float u = float(x[pair]), v = float(x[pair + HALF]);
            if (NORM && part < 2) {  // rounded to T, as the norm of the twin gives it
                u = float(T(u * scale));
                v = float(T(v * scale));
                u *= part == 0 ? float(q_norm[pair]) : float(k_norm[pair]);
                v *= part == 0 ? float(q_norm[pair + HALF]) : float(k_norm[pair + HALF]);
            }
            float c = turn[2 * pair], s = turn[2 * pair + 1];
            T one = T(part < 2 ? u * c - v * s : u), other = T(part < 2 ? v * c + u * s : v);
            fresh[part * D + pair] = float(one);
            fresh[part * D + pair + HALF] = float(other);
            if (part > 0 && head % sharing == 0) {
                to[pair] = one;
                to[pair + HALF] = other;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const device T* keys = buffer + strip * D + lane;
    const device T* values = keys + between * D;
    size_t at = (size_t(row) * heads + head) * D;
    float query[EACH], sum[EACH];
    for (int i = 0; i < EACH; i++) {
        query[i] = fresh[lane + 32 * i] * factor;
        sum[i] = 0;
    }
    float most = -INFINITY, total = 0;
    if (part == 0) {  // begins with the token itself
        float product = 0;
        for (int i = 0; i < EACH; i++) {
            product += query[i] * fresh[D + lane + 32 * i];
            sum[i] = fresh[2 * D + lane + 32 * i];
        }
        most = simd_sum(product);
        total = 1;
    }
    """
    + RUNNING,
    in_place=("buffer",),
)


def store_and_attend(
    projection: Projection, arrays: Arrays, place: Place, mask: Mask, scale: float
) -> tuple[mx.array, Arrays]:
    """Store the new keys and values of a step; return the attention of its queries over everything
    stored, [B, q_heads, L or 1, D], and the arrays as `store_heads` does.
    """
    if in_use(STORE_AND_ATTEND) and fits(projection.raw, arrays, place):
        return by_kernel(projection, arrays, place, scale)
    q, arrays = store_heads(projection, arrays, place)
    return attend(q, arrays, place, projection.raw.shape[1], mask, scale), arrays


def fits(raw: mx.array, arrays: Arrays, place: Place) -> bool:
    """Return whether the kernel can run and pays: a token a row, and few slots that fill in order.

    MLX gives a kernel fewer than 8 elements as constants.
    """
    _, length, _, head_dim = raw.shape
    plain = isinstance(place.kind.store, Plain) and isinstance(place.kind.layout, Growing)
    one_type = raw.dtype in TYPES and arrays[0].dtype == raw.dtype
    few = length == 1 and arrays[0].size >= 8 and arrays[0].shape[-2] <= MOST_SLOTS
    return plain and one_type and few and head_dim in (32, 64, 96, 128)


def by_kernel(
    projection: Projection, arrays: Arrays, place: Place, scale: float
) -> tuple[mx.array, Arrays]:
    raw, q_heads = projection.raw, projection.q_heads
    rows, _, _, head_dim = raw.shape
    kv_heads, slots = arrays[0].shape[2:4]
    q_norm, k_norm = projection.norms or (raw, raw)  # without a norm these are not read
    (out,) = STORE_AND_ATTEND(
        raw,
        q_norm,
        k_norm,
        projection.rotation,
        place.start,
        integers(slots, q_heads, kv_heads, rows),
        scalar(projection.eps or 0.0),
        scalar(scale),
        arrays[0],
        grid=(SIMD * GROUPS, q_heads, rows),
        threadgroup=(SIMD * GROUPS, 1, 1),
        shapes=[(rows, q_heads, 1, head_dim)],
        dtypes=[raw.dtype],
        template=(("T", raw.dtype), ("D", head_dim), ("NORM", projection.eps is not None)),
    )
    return out, mx.depends(arrays, [out])


def check() -> str:
    """Return how the kernel differs from its twin on a token of two rows, "" if it does not."""
    for dtype in TYPES:
        mine = attended_noise(dtype)
        with twins():
            twin = attended_noise(dtype)
        if text := difference(mine, twin):
            return f"{dtype}: {text}"
    return ""


def attended_noise(dtype: mx.Dtype) -> list[mx.array]:
    """Return the attention and the changed array of random inputs, at positions 200 and 3."""
    norms = noise(1, (64,), dtype), noise(2, (64,), dtype)
    place = Place(mx.array([200, 3]), CacheKind(), 256)
    raw, rotation = noise(3, (2, 1, 8, 64), dtype), rotary(place.positions(1), 64, 10000.0)
    one = Projection(raw, head_table(norms, 4, 2, 64), rotation, 4, 1e-6, norms, last=False)
    buffer = noise(4, (2, 2, 2, 256, 64), dtype)
    out, arrays = store_and_attend(one, [buffer], place, place.mask(1), 0.125)
    return [out, *arrays]
