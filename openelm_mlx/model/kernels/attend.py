"""Attention of the newest tokens, told how many slots are filled, by one kernel.

MLX's fused kernels for NVIDIA's GPUs take no array as a mask (supports_sdpa_vector and
supports_sdpa_cudnn in mlx/backend/cuda), and a compiled step has nothing else: its buffers keep
their size. There the twin is several kernels that keep all scores in memory. On a Mac MLX's own
kernel takes the mask, so there this one is used only if OPENELM_KERNELS is all.
"""

from __future__ import annotations

from openelm_mlx.device import mx
from openelm_mlx.model.cache_kinds import Arrays, Growing, Mask, Place, Plain
from openelm_mlx.model.kernels.kernel import (
    MOST_ROWS,
    SIMD,
    TYPES,
    Kernel,
    in_use,
    integers,
    scalar,
)
from openelm_mlx.model.kernels.self_check import difference, noise

GROUPS = 32  # SIMD groups of a threadgroup
MOST_TOKENS = 32  # of a row; for more of them, keys should be read once for all

# The SIMD groups of a threadgroup take KEYS of `count` keys in turn, and each has a running softmax
# (arXiv:1805.02867); at the end the groups' results are weighed and added.
RUNNING = """
    for (int first = part * KEYS; first < count; first += 32 * KEYS) {
        float score[KEYS];
        float higher = most;
        for (int k = 0; k < KEYS; k++) {
            const device T* key = keys + size_t(min(first + k, count - 1)) * D;
            float product = 0;
            for (int i = 0; i < EACH; i++) product += query[i] * float(key[32 * i]);
            score[k] = product;
        }
        for (int k = 0; k < KEYS; k++) {
            float whole = simd_sum(score[k]);
            score[k] = first + k < count ? whole : -INFINITY;
            higher = max(higher, score[k]);
        }
        float fade = metal::precise::exp(most - higher);
        total *= fade;
        for (int i = 0; i < EACH; i++) sum[i] *= fade;
        for (int k = 0; k < KEYS; k++) {
            const device T* value = values + size_t(min(first + k, count - 1)) * D;
            float weight = metal::precise::exp(score[k] - higher);
            total += weight;
            for (int i = 0; i < EACH; i++) sum[i] += weight * float(value[32 * i]);
        }
        most = higher;
    }
    threadgroup float highest[32];
    threadgroup float totals[32];
    threadgroup float sums[32 * D];
    if (lane == 0) {
        highest[part] = most;
        totals[part] = total;
    }
    for (int i = 0; i < EACH; i++) sums[part * D + lane + 32 * i] = sum[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (part < EACH) {
        float share = metal::precise::exp(highest[lane] - simd_max(highest[lane]));
        float all = simd_sum(totals[lane] * share);
        float mine = 0;
        for (int other = 0; other < 32; other++) {
            mine += simd_shuffle(share, other) * sums[other * D + part * 32 + lane];
        }
        out[at + part * 32 + lane] = T(mine / all);
    }
"""

# One threadgroup a token and query head.
ATTEND = Kernel(
    "attend",
    ("queries", "buffer", "start", "sizes", "factor"),
    ("out",),
    """
    constexpr int EACH = D / 32;
    constexpr int KEYS = 4;
    int slots = sizes[0], heads = sizes[1], kv_heads = sizes[2], rows = sizes[3];
    int asked = sizes[4], length = sizes[5], each = sizes[6];
    int lane = thread_index_in_simdgroup, part = simdgroup_index_in_threadgroup;
    int head = threadgroup_position_in_grid.y;
    int row = threadgroup_position_in_grid.z / asked;
    int place = threadgroup_position_in_grid.z % asked;
    int token = length - asked + place;
    int count = (each ? start[row * length + token] : start[row] + token) + 1;
    size_t strip = size_t(row) * kv_heads + head * kv_heads / heads;
    const device T* keys = buffer + strip * slots * D + lane;
    const device T* values = keys + size_t(rows) * kv_heads * slots * D;
    size_t at = ((size_t(row) * heads + head) * asked + place) * D;
    float query[EACH], sum[EACH];
    for (int i = 0; i < EACH; i++) {
        query[i] = float(queries[at + lane + 32 * i]) * factor;
        sum[i] = 0;
    }
    float most = -INFINITY, total = 0;
    """
    + RUNNING,
)


def attend(
    q: mx.array, arrays: Arrays, place: Place, length: int, mask: Mask, scale: float
) -> mx.array:
    """Return the attention of q [B, heads, L or 1, D] over stored arrays, in the shape of q.

    `length` is L, that of the pass; the queries are those of its last tokens.
    """
    store = place.kind.store
    rows, heads, asked, _ = q.shape
    if in_use(ATTEND) and fits(q, arrays, place):
        return by_kernel(q, arrays[0], place.start, length, scale)
    if rows > 1 and isinstance(store, Plain):
        # Metal copies a mask that broadcasts over heads in every layer; one with all heads is
        # read as it is.
        mask = place.mask(length, heads)[..., -asked:, :]
    return store.attend(q, arrays, mask, scale)


def fits(q: mx.array, arrays: Arrays, place: Place) -> bool:
    """Return whether the kernel can run: one type, and slots that fill up in order."""
    kind, (rows, _, asked, head_dim) = place.kind, q.shape
    plain = isinstance(kind.store, Plain) and isinstance(kind.layout, Growing)
    one_type = q.dtype in TYPES and arrays[0].dtype == q.dtype
    few = asked <= MOST_TOKENS and rows * asked <= MOST_ROWS
    return plain and one_type and few and head_dim in (32, 64, 96, 128)


def by_kernel(
    q: mx.array, buffer: mx.array, start: mx.array, length: int, scale: float
) -> mx.array:
    rows, heads, asked, head_dim = q.shape
    kv_heads, slots = buffer.shape[2:4]
    (out,) = ATTEND(
        q,
        buffer,
        start,
        integers(slots, heads, kv_heads, rows, asked, length, start.ndim == 2),
        scalar(scale),
        grid=(SIMD * GROUPS, heads, rows * asked),
        threadgroup=(SIMD * GROUPS, 1, 1),
        shapes=[q.shape],
        dtypes=[q.dtype],
        template=(("T", q.dtype), ("D", head_dim)),
    )
    return out


def check() -> str:
    """Return how the kernel differs from its twin, "" if it does not."""
    q, buffer = noise(1, (2, 8, 3, 64), mx.bfloat16), noise(2, (2, 2, 2, 256, 64), mx.bfloat16)
    start = mx.array([200, 3])
    mask = Growing().visible((start[:, None] + mx.arange(3))[:, None], buffer.shape[-2])
    mine = by_kernel(q, buffer, start, 3, 0.125)
    return difference([mine], [Plain().attend(q, [buffer], mask, 0.125)])
