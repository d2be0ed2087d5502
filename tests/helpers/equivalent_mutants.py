"""Mutants of kernels that compute the same as the kernel, and why; see metal_mutants.py."""

ANY_LANE = "all lanes of the SIMD group have the value, and any of them may write it"
ALL_LANES = "all lanes write the same value to the same place of an output"
GUARDED = "the pairs of one turn more do not pass the comparison with HALF"
UNREAD = "nothing reads the value"
FADED = "the first keys of a SIMD group fade what was before them to 0"
EXACT = "16 bits hold the value exactly"

EQUIVALENT = {
    "add_rms_norm": {
        "narrowed: T rounded = float(T(mine[i] * scale[0]));": EXACT,
        "statement dropped: mine[i] = 0;": UNREAD,
        "constant up: mine[i] = (0 + 1);": UNREAD,
        "constant up: if (thread_index_in_simdgroup == (0 + 1)) "
        "parts[simdgroup_index_in_threadgroup] = squares;": ANY_LANE,
        "constant up: if (thread_index_in_simdgroup == (0 + 1)) {": ANY_LANE,
    },
    "norm_rope_store": {
        "bound moved: for (int i = 0; i <= PAIRS; i++) { (2)": GUARDED,
        "bound moved: for (int i = 0; i <= PAIRS; i++) { (3)": GUARDED,
        "bound moved: for (int i = 0; i <= PAIRS; i++) { (4)": GUARDED,
        "bound moved: int slot = position <= keep || ring == 0 ? position : "
        "keep + (position - keep) % ring;": "the ring begins at the slot keep, too",
        "condition true: if (NORM) scale = metal::precise::rsqrt(simd_sum(squares) / float(D) + "
        "eps);": UNREAD,
        "times for over: constexpr int PAIRS = (HALF + 31) * 32;": GUARDED,
        "constant up: constexpr int PAIRS = (HALF + (31 + 1)) / 32;": GUARDED,
        "constant up: float scale = (1 + 1);": UNREAD,
    },
    "norm_rope_store, packed": {
        "bound moved: for (int i = 0; i <= PAIRS; i++) {": GUARDED,
        "bound moved: word |= shift <= 0 ? bits >> -shift : bits << shift;": "0 shifts nothing",
        "constant up: word |= shift < (0 + 1) ? bits >> -shift : bits << shift;": "likewise",
        "comparison turned: if (lane >= 0) {": ALL_LANES,
        "condition true: if (lane == 0) {": ALL_LANES,
        "constant up: if (lane == (0 + 1)) {": ANY_LANE,
        "narrowed: T edge = below ? low : high;": EXACT,
        "narrowed: T whole = nearest(edge / step);": EXACT,
        "narrowed: T bias = 0;": EXACT,
        "not accumulated: for (int w = lane; w < WORDS; w = 32) {": "a group has at most 32 words",
        "constant up: for (int w = lane; w < WORDS; w += (32 + 1)) {": "likewise",
    },
    "attend": {
        "plus for minus: const device T* key = keys + size_t(min(first + k, count + 1)) * D;": (
            "the score of a key beyond the last is not used, and behind the keys lie the values"
        ),
        "plus for minus: float share = metal::precise::exp(highest[lane] + "
        "simd_max(highest[lane]));": "a factor that all shares have is divided by",
        "statement dropped: sum[i] = 0;": FADED,
        "constant up: sum[i] = (0 + 1);": FADED,
        "constant up: float most = -INFINITY, total = (0 + 1);": FADED,
        "constant up: constexpr int KEYS = (4 + 1);": "any number of keys a turn will do",
        "constant up: if (lane == (0 + 1)) {": ANY_LANE,
    },
}
