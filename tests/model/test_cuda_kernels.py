"""Kernels on an NVIDIA GPU: they compile for it, and where there is one they are right."""

from __future__ import annotations

import numpy as np
import pytest
from nvrtc import ForCuda

from openelm_mlx import EngineOptions, generate, load
from openelm_mlx.device import mx
from openelm_mlx.model.kernels.cuda import compiled, text
from openelm_mlx.model.kernels.kernel import NAMES_BY_BACKEND, Kernel, Launch, check_of, running

# Every word of the header, in two SIMD groups.
WORDS = Kernel(
    "words",
    ("x", "scale", "store"),
    ("y",),
    """
    uint3 place = thread_position_in_grid;
    uint i = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
    threadgroup float parts[64];
    parts[i] = float(x[place.x]) * scale;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    thread float other = parts[63 - i];
    float sum = simd_sum(other), most = simd_max(other), least = simd_min(other);
    simdgroup_barrier(mem_flags::mem_none);
    uint before = simd_prefix_exclusive_sum(1u), upto = simd_prefix_inclusive_sum(1u);
    float next = simd_shuffle_down(other, 1), first = simd_broadcast_first(other);
    float swapped = simd_shuffle_xor(other, 1) - simd_shuffle(other, lane ^ 1);
    float one = metal::precise::exp(metal::precise::log(metal::precise::rsqrt(1.0f)));
    ((device T*)store)[i] = T(simd_broadcast(other, 1));
    device float* to = y + i * 8;
    to[0] = sum; to[1] = metal::max(most, -INFINITY); to[2] = least; to[3] = float(before);
    to[4] = float(upto) + swapped; to[5] = lane == 0 ? next : 0; to[6] = first;
    to[7] = one + as_type<float>(as_type<uint>(0.0f)) + float(simdgroup_index_in_threadgroup);
    """,
    in_place=("store",),
)
ALL = NAMES_BY_BACKEND["cuda"]
LAUNCH = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "shapes": [(64, 8)]}


def words(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    store = mx.zeros(64, dtype)
    mx.eval(store)
    x, scale = mx.arange(64).astype(dtype), mx.array(2.0)
    settings = {**LAUNCH, "dtypes": [mx.float32], "template": (("T", dtype),)}
    (y,) = WORDS(x, scale, store, **settings)
    return y, mx.depends([store], [y])[0]


def test_a_number_is_read_through_a_pointer_of_another_name():
    kernel = Kernel("half", ("x", "scale"), ("y",), "y[0] = T(x[0] * scale) / N;")
    launch = Launch((32, 1, 1), (32, 1, 1), [(1,)], [mx.bfloat16], (("T", mx.float16), ("N", 2)))
    assert text(kernel, [mx.zeros(1), mx.array(2.0)], launch).endswith(
        'extern "C" __global__ void half(const float* x, const float* scale_at, bfloat16_t* y) {\n'
        "const float& scale = *scale_at;\nusing T = float16_t;\nconstexpr int N = 2;\n"
        "y[0] = T(x[0] * scale) / N;\n}"
    )


@pytest.mark.needs("NVRTC")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_kernel_compiles_for_cuda(dtype):
    compiler, engine = ForCuda(), load("openelm-tiny", dtype=dtype)
    with running(compiler, frozenset(ALL)):
        words(getattr(mx, dtype))
        for name in set(ALL) - {"norm_rope_store"}:
            check_of(name)  # which it is not to agree with
        for bits in (None, 4):
            options = EngineOptions(compiled=False, kv_bits=bits)
            generate(engine, "Once", max_tokens=2, engine_options=options)
    assert {*compiler.names} == {*ALL, "words"}


@pytest.mark.needs("NVRTC")
def test_what_the_compiler_says_is_told():
    with pytest.raises(RuntimeError, match="CUDA's compiler refuses a kernel: kernel.cu.1.: error"):
        compiled("wrong", "sm_90")


@pytest.mark.needs("CUDA")
def test_metals_words_mean_the_same_in_cuda():
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        y, store = words(dtype)
        turned = 2.0 * np.arange(64)[::-1]
        for first, count in ((0, 32), (32, 32)):
            other = turned[first : first + count]
            wanted = np.zeros((count, 8), np.float32)
            wanted[:, :3] = other.sum(), other.max(), other.min()
            wanted[:, 3], wanted[:, 4] = np.arange(count), np.arange(count) + 1
            wanted[0, 5], wanted[:, 6], wanted[:, 7] = other[1], other[0], 1 + first // 32
            np.testing.assert_array_equal(np.array(y)[first : first + count], wanted)
            there = np.array(store[first : first + count].astype(mx.float32))
            np.testing.assert_array_equal(there, np.full(count, other[1]))


@pytest.mark.needs("CUDA")
@pytest.mark.parametrize("name", ALL)
def test_each_kernel_is_its_twin_on_this_gpu(name):
    assert check_of(name) == ""
