"""Temperature, top-k, top-p, min-p and the draw of a token, by one kernel.

The operations of MLX that do the same sort all logits, which is about ten kernels on a GPU. This
kernel sorts nothing: it narrows down which token is the last one to stay. Not measured on a Mac;
docs/performance.md counts what it saves.
"""

from __future__ import annotations

import math

from openelm_mlx.device import mx
from openelm_mlx.model.draws import COLD, Limits, noisy, remaining
from openelm_mlx.model.kernels.kernel import SIMD, Kernel, in_use
from openelm_mlx.model.kernels.self_check import difference, noise

# MLX refuses a threadgroup for which a GPU has not enough registers (metal/custom_kernel.cpp): of
# fewer threads than 1024 each may have more of them. CUDA's compiler uses 56.
MOST_THREADS, LIST = 768, 512

# One threadgroup a row. A gap is how far a logit lies below the highest, divided by temperature; as
# gaps are positive, their bits have the same order. Tokens are ordered by gap, then by id, and a
# filter keeps the first ones: those up to the token (edge, last).
#
# For top-k (stage 0), then for top-p (stage 1), the interval [low, high) of gaps that has this
# token is narrowed to one of 8 parts, by counts or masses of all tokens before each part, until it
# has at most LIST tokens; where more than these have one gap, it becomes an interval of their ids.
# The tokens in it are listed, and each is compared with all others. Sums have a fixed order, so
# that runs repeat, but another one than those of MLX: where the mass reaches top-p within the last
# bits, one token more or less may stay. Counts are floats, which are exact below 2 ** 24.
#
# A row of logits is read once for the highest, once or twice to narrow, twice to list, and once to
# draw, unless all that stay are in the list. For each logit read, narrowing costs 8 comparisons and
# sums. Random bits are those of MLX (Threefry, metal/kernels/random.metal), made for the tokens
# that stay: one hash gives those of a token in the lower half of the ids and of one in the upper.
SAMPLE = Kernel(
    "sample",
    ("x", "temperature", "top_k", "top_p", "min_p", "keys", "positions"),
    ("token",),
    """
    #define GAP(i) ((best - float(x[base + (i)])) / degree)
    #define BITS(gap) (as_type<uint>(gap) & 0x7FFFFFFF)
    #define KEY(gap, i) (!by_id ? BITS(gap) : BITS(gap) < one_gap ? 0 \\
        : BITS(gap) == one_gap ? (i) + 1 : 0xFFFFFFFF)
    #define COLUMN(c, value) { \\
        float part_ = simd_sum(float(value)); \\
        if (lane == 0) parts[(c) * 32 + group] = part_; \\
    }
    #define ADD(columns) \\
        threadgroup_barrier(mem_flags::mem_threadgroup); \\
        if (self < (columns)) { \\
            float sum_ = 0; \\
            for (uint g = 0; g < groups; g++) sum_ += parts[self * 32 + g]; \\
            sums[self] = sum_; \\
        } \\
        threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint size = VOCAB, most = LIST, FINITE = 0x7F7FFFFF;
    threadgroup float parts[8 * 32];
    threadgroup float sums[8];
    threadgroup uint edges[2];
    threadgroup uint winners[32];
    threadgroup float list_gaps[512];
    threadgroup uint list_ids[512];
    threadgroup float list_weights[512];
    uint row = threadgroup_position_in_grid.x, base = row * size;
    uint self = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
    uint groups = threads / 32;
    float degree = temperature[row];
    bool cold = degree <= 1e-30f;

    float best = -INFINITY;
    for (uint i = self; i < size; i += threads) best = metal::max(best, float(x[base + i]));
    best = simd_max(best);
    if (lane == 0) parts[group] = best;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint g = 0; g < groups; g++) best = metal::max(best, parts[g]);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    uint edge = FINITE, last = size;
    uint limit = TOP_K ? uint(top_k[row]) : size;
    float share = TOP_P ? float(top_p[row]) : INFINITY;
    bool listed = false;  // whether the list has all that stay
    uint n = 0, below = 0, rank = 0;
    float total = -1, lighter = 0, before = 0, weight = 0;
    uint stage = limit < size ? 0 : 1, end = cold ? 0 : share < INFINITY ? 2 : 1;
    for (; stage < end; stage++) {
        bool counting = stage == 0;
        if (!listed) {
            uint low = 0, high = edge + 1, one_gap = 0, inside = 0;
            bool by_id = false, first = true;
            n = size;
            do {
                if (n > most) {
                    if (!by_id && high - low == 1) {
                        by_id = true;
                        one_gap = low;
                        low = 1;
                        high = size + 1;
                    }
                    uint part = first ? 0x800000 : (high - low + 7) / 8;
                    uint from = first ? as_type<uint>(0.25f / degree) : low + part;
                    first = false;
                    uint pivots[8];
                    float heads[8];
                    for (uint j = 0; j < 8; j++) {
                        pivots[j] = j < 7 ? metal::min(from + j * part, high) : high;
                        heads[j] = 0;
                    }
                    for (uint i = self; i < size; i += threads) {
                        float gap = GAP(i);
                        uint key = KEY(gap, i);
                        float w = counting ? 1 : metal::precise::exp(-gap);
                        for (uint j = 0; j < 8; j++) heads[j] += key < pivots[j] ? w : 0;
                    }
                    for (uint j = 0; j < 8; j++) COLUMN(j, heads[j])
                    ADD(8)
                    if (!counting && total < 0) total = sums[7];
                    float wanted = counting ? float(limit) : share * total;
                    for (uint j = 0; j < 7; j++) {
                        if (sums[j] < wanted) low = metal::max(low, pivots[j]);
                        else high = metal::min(high, pivots[j]);
                    }
                }
                float under = 0, mass = 0;
                inside = 0;
                for (uint i = self; i < size; i += threads) {
                    float gap = GAP(i);
                    uint key = KEY(gap, i);
                    if (key < low) {
                        under += 1;
                        mass += metal::precise::exp(-gap);
                    } else if (key < high) {
                        inside++;
                    }
                }
                COLUMN(0, under)
                COLUMN(1, mass)
                COLUMN(2, inside)
                ADD(3)
                below = uint(sums[0]);
                lighter = sums[1];
                n = uint(sums[2]);
            } while (n > most);
            listed = below == 0;
            uint at = simd_prefix_exclusive_sum(inside);
            for (uint g = 0; g < group; g++) at += uint(parts[2 * 32 + g]);
            for (uint i = self; inside > 0 && i < size; i += threads) {
                float gap = GAP(i);
                uint key = KEY(gap, i);
                if (key >= low && key < high) {
                    list_gaps[at] = gap;
                    list_ids[at] = i;
                    list_weights[at] = metal::precise::exp(-gap);
                    at++;
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            rank = below;
            before = lighter;
            if (self < n) {
                float mine = list_gaps[self];
                uint id = list_ids[self];
                weight = list_weights[self];
                for (uint j = 0; j < n; j++) {
                    float other = list_gaps[j], its = list_weights[j];
                    bool sooner = other < mine || (other == mine && list_ids[j] < id);
                    rank += sooner ? 1 : 0;
                    before += sooner ? its : 0;
                }
            }
        }
        if (counting || total < 0) {
            COLUMN(0, rank < limit ? weight : 0)
            ADD(1)
            total = lighter + sums[0];
        }
        bool stays = self < n && rank < limit
            && (counting || rank == 0 || before < share * total);
        COLUMN(0, stays ? 1 : 0)
        ADD(1)
        if (stays && rank - below + 1 == uint(sums[0])) {
            float gap = list_gaps[self];
            edges[0] = BITS(gap);
            edges[1] = list_ids[self];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (sums[0] > 0) {  // unless fewer can be drawn at all
            edge = edges[0];
            last = edges[1];
        }
    }

    uint half_size = (size + 1) / 2, many = listed ? n : half_size, hashed = size;
    uint a = 0, b = 0, token_ = 0;
    float top = -INFINITY;
    for (uint i = self; i < many; i += threads) {
        for (uint side = 0; side < (listed ? 1 : 2); side++) {
            uint id = listed ? list_ids[i] : i + side * half_size;
            if (id >= size) continue;
            float gap = listed ? list_gaps[i] : GAP(id);
            uint bits = BITS(gap);
            if (bits > edge || (bits == edge && id > last)) continue;
            if (MIN_P && gap > float(min_p[row])) continue;
            float value = -gap;
            if (!cold) {
                uint pair = id < half_size ? id : id - half_size;
                if (pair != hashed) {
                    hashed = pair;
                    a = keys[2 * row];
                    b = keys[2 * row + 1] + uint(positions[row]);
                    uint schedule[3] = {a, b, a ^ b ^ 0x1BD11BDA};
                    uint turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
                    a += pair;
                    b += pair + half_size < size ? pair + half_size : 0;
                    for (uint r = 0; r < 20; r++) {
                        uint by = turns[r % 8];
                        a += b;
                        b = (b << by | b >> (32 - by)) ^ a;
                        if (r % 4 == 3) {
                            a += schedule[(r / 4 + 1) % 3];
                            b += schedule[(r / 4 + 2) % 3] + r / 4 + 1;
                        }
                    }
                }
                float even = metal::min(float(id < half_size ? a : b) / 4294967296.0f, 0.99999994f);
                value += -metal::precise::log(-metal::precise::log(even));
            }
            if (value > top || (value == top && id < token_)) {
                top = value;
                token_ = id;
            }
        }
    }
    float high = simd_max(top);
    uint lowest = simd_min(top == high ? token_ : size);
    if (lane == 0) {
        parts[group] = high;
        winners[group] = lowest;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (self == 0) {
        for (uint g = 1; g < groups; g++) {
            if (parts[g] > parts[0] || (parts[g] == parts[0] && winners[g] < winners[0])) {
                parts[0] = parts[g];
                winners[0] = winners[g];
            }
        }
        token[row] = winners[0];
    }
""",
)


def draw_token(logits: mx.array, limits: Limits, keys: mx.array, positions: mx.array) -> mx.array:
    """Draw one token a row, [B] uint32, from logits [B, vocab] of any float type.

    `keys` [B, 2] uint32 and `positions` [B] int32 decide the noise, as in `draws.gumbel`.
    """
    draws = draw_by_kernel if in_use(SAMPLE) else draw_by_operations
    return draws(logits, limits, keys, positions)


def draw_by_kernel(
    logits: mx.array, limits: Limits, keys: mx.array, positions: mx.array
) -> mx.array:
    """Draw what `draw_by_operations` draws, which is the twin."""
    rows, vocab = logits.shape
    threads = min(MOST_THREADS, -(-vocab // SIMD) * SIMD)
    temperature, top_k, top_p, min_p, _ = limits
    (tokens,) = SAMPLE(
        logits,
        temperature,
        *(temperature if given is None else given for given in (top_k, top_p, min_p)),
        keys,
        positions,
        grid=(threads * rows, 1, 1),
        threadgroup=(threads, 1, 1),
        shapes=[(rows,)],
        dtypes=[mx.uint32],
        template=(
            ("VOCAB", vocab),
            ("LIST", min(LIST, threads)),
            ("TOP_K", top_k is not None),
            ("TOP_P", top_p is not None),
            ("MIN_P", min_p is not None),
        ),
    )
    return tokens


def draw_by_operations(
    logits: mx.array, limits: Limits, keys: mx.array, positions: mx.array
) -> mx.array:
    """Draw a token a row; it computes in float32."""
    gaps = remaining(logits.astype(mx.float32), limits)
    return mx.argmax(noisy(-gaps, limits.temperature, keys, positions), axis=-1)


def check() -> str:
    """Return how the kernel differs from its twin, "" if it does not.

    Of the rows one is greedy, the others have each filter alone and all of them, and top-p with
    more tokens than the list holds. Half of the logits are equal to others.
    """
    limits = Limits(
        mx.array([COLD, 1.0, 1.0, 1.0, 1.0, 50.0, 0.7]),
        mx.array([1, 40, 4096, 4096, 4096, 4096, 900]),
        mx.array([0.9, math.inf, 0.9, math.inf, math.inf, 0.9, 0.8]),
        mx.array([3.0, math.inf, math.inf, 3.0, math.inf, math.inf, 5.0]),
    )
    rows = limits.temperature.size
    logits = mx.floor(noise(1, (rows, 4096), mx.bfloat16) * 16) / 4
    keys, positions = mx.random.split(mx.random.key(2), rows), mx.arange(rows)
    mine = draw_by_kernel(logits, limits, keys, positions)
    return difference([mine], [draw_by_operations(logits, limits, keys, positions)])
