"""Mutants of kernels that compute the same as the kernel, and why; see metal_mutants.py."""

ANY_LANE = "all lanes of the SIMD group have the value, and any of them may write it"
ALL_LANES = "all lanes write the same value to the same place of an output"
GUARDED = "the pairs of one turn more do not pass the comparison with HALF"
UNREAD = "nothing reads the value"
FADED = "the first keys of a SIMD group fade what was before them to 0"
EXACT = "16 bits hold the value exactly"
REACHED = "the last pivot is the end, before which enough tokens stand"
POSITIVE = "a mass that is known is at least 1, that of the likeliest token"
THREE = "4 leaves a remainder of 1 by 3, and so do its multiples here as r / 4"
SHARED = "query heads that share a key head make the same bits, and any of them may store them"
LAST_BIT = "a random number differs in the last of 32 bits, of which a float keeps 24"
LISTED = "it is in the list too, then, and stays before the others"
WIDER = "no token has this key, or what is beyond is dropped by the rank"
WASTE = "it works more for the same, or narrows in other steps"
SAME = "the cases that it decides otherwise do not occur, or do not differ"

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
        "constant up: sum[i] = (0 + 1);": FADED,
        "constant up: float most = -INFINITY, total = (0 + 1);": FADED,
        "constant up: constexpr int KEYS = (4 + 1);": "any number of keys a turn will do",
        "constant up: if (lane == (0 + 1)) {": ANY_LANE,
    },
    "sample": {
        "bound moved: uint stage = limit <= size ? 0 : 1, end = cold ? 0 : share < INFINITY ? "
        "2 : 1;": WASTE,
        "bound moved: uint stage = limit < size ? 0 : 1, end = cold ? 0 : share <= INFINITY ? "
        "2 : 1;": WASTE,
        "bound moved: for (; stage <= end; stage++) {": WASTE,
        "bound moved: if (n >= most) {": WASTE,
        "bound moved: if (!counting && total <= 0) total = sums[7];": POSITIVE,
        "bound moved: if (counting || total <= 0) {": POSITIVE,
        "constant up: if (!counting && total < (0 + 1)) total = sums[7];": POSITIVE,
        "constant up: if (counting || total < (0 + 1)) {": POSITIVE,
        "constant up: float total = -(1 + 1), lighter = 0, before = 0, weight = 0;": POSITIVE,
        "bound moved: for (uint j = 0; j <= 7; j++) {": REACHED,
        "constant up: for (uint j = 0; j < (7 + 1); j++) {": REACHED,
        "bound moved: for (uint i = self; inside >= 0 && i < size; i += threads) {": WASTE,
        "bound moved: for (uint side = 0; side <= (listed ? 1 : 2); side++) {": WASTE,
        "constant up: for (uint side = 0; side < (listed ? (1 + 1) : 2); side++) {": WASTE,
        "constant up: for (uint side = 0; side < (listed ? 1 : (2 + 1)); side++) {": WASTE,
        "bound moved: if (value > top || (value == top && id <= token_)) {": SAME,
        "comparison turned: if (value > top || (value >= top && id < token_)) {": SAME,
        "comparison turned: uint lowest = simd_min(top >= high ? token_ : size);": SAME,
        "bound moved: if (parts[g] > parts[0] || (parts[g] == parts[0] && winners[g] <= "
        "winners[0])) {": SAME,
        "comparison turned: if (parts[g] > parts[0] || (parts[g] >= parts[0] && winners[g] < "
        "winners[0])) {": SAME,
        "comparison turned: if (stays && rank - below + 1 >= uint(sums[0])) {": SAME,
        "comparison turned: if (bits > edge || (bits >= edge && id > last)) continue;": SAME,
        "comparison turned: if (r % 4 >= 3) {": SAME,
        "condition true: if (!listed) {": WASTE,
        "condition true: if (n > most) {": WASTE,
        "condition true: if (pair != hashed) {": WASTE,
        "statement dropped: n = size;": WASTE,
        "statement dropped: listed = below == 0;": WASTE,
        "statement dropped: hashed = pair;": WASTE,
        "times for over: uint from = first ? as_type<uint>(0.25f * degree) : low + part;": WASTE,
        "minus for plus: uint from = first ? as_type<uint>(0.25f / degree) : low - part;": WASTE,
        "constant up: uint part = first ? 0x800000 : (high - low + (7 + 1)) / 8;": WASTE,
        "constant up: uint part = first ? 0x800000 : (high - low + 7) / (8 + 1);": WASTE,
        "constant up: uint stage = limit < size ? 0 : 1, end = cold ? (0 + 1) : share < "
        "INFINITY ? 2 : 1;": WASTE,
        "constant up: uint stage = limit < size ? 0 : 1, end = cold ? 0 : share < INFINITY ? "
        "(2 + 1) : 1;": WASTE,
        "constant up: uint stage = limit < size ? 0 : 1, end = cold ? 0 : share < INFINITY ? "
        "2 : (1 + 1);": WASTE,
        "constant up: ADD((1 + 1))": WASTE,
        "constant up: ADD((1 + 1)) (2)": WASTE,
        "times for over: a += schedule[(r * 4 + 1) % 3];": THREE,
        "times for over: b += schedule[(r * 4 + 2) % 3] + r / 4 + 1;": THREE,
        "constant up: b += schedule[(r / 4 + 2) % 3] + r / (4 + 1) + 1;": LAST_BIT,
        "constant up: #define KEY(gap, i) (!by_id ? BITS(gap) : BITS(gap) < one_gap ? (0 + 1) "
        "\\": LISTED,
        "constant up: if (lane == (0 + 1)) parts[(c) * 32 + group] = part_; \\": ANY_LANE,
        "constant up: if (lane == (0 + 1)) parts[group] = best;": ANY_LANE,
        "constant up: if (lane == (0 + 1)) {": ANY_LANE,
        "constant up: if (self == (0 + 1)) {": ANY_LANE,
        "constant up: uint n = (0 + 1), below = 0, rank = 0;": UNREAD,
        "constant up: uint n = 0, below = (0 + 1), rank = 0;": UNREAD,
        "constant up: uint n = 0, below = 0, rank = (0 + 1);": UNREAD,
        "constant up: float total = -1, lighter = (0 + 1), before = 0, weight = 0;": UNREAD,
        "constant up: float total = -1, lighter = 0, before = (0 + 1), weight = 0;": UNREAD,
        "constant up: uint low = 0, high = edge + 1, one_gap = (0 + 1), inside = 0;": UNREAD,
        "constant up: uint low = 0, high = edge + 1, one_gap = 0, inside = (0 + 1);": UNREAD,
        "constant up: uint a = (0 + 1), b = 0, token_ = 0;": UNREAD,
        "constant up: uint a = 0, b = (0 + 1), token_ = 0;": UNREAD,
        "constant up: uint low = 0, high = edge + (1 + 1), one_gap = 0, inside = 0;": WIDER,
        "constant up: high = size + (1 + 1);": WIDER,
    },
    "store_and_attend": {
        "comparison turned: if (part > 0 && head % sharing >= 0) {": SHARED,
        "constant up: if (part > 0 && head % sharing == (0 + 1)) {": SHARED,
        "plus for minus: const device T* key = keys + size_t(min(first + k, count + 1)) * D;": (
            "the score of a key behind the last is not used"
        ),
        "constant up: constexpr int KEYS = (4 + 1);": "any number of keys a turn will do",
        "constant up: float most = -INFINITY, total = (0 + 1);": FADED,
        "constant up: sum[i] = (0 + 1);": FADED,
        "constant up: if (part == (0 + 1)) {": "any SIMD group may begin with the token itself",
        "constant up: if (lane == (0 + 1)) {": ANY_LANE,
    },
}
