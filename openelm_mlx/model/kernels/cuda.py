"""Kernels on a GPU of NVIDIA's, from the same sources as on a Mac.

A header of macros says Metal's words in CUDA's: a threadgroup is a block, and a SIMD group of 32 is
a warp. Two things it cannot say, so `Launch` and `on_cuda` see to them: MLX rounds the grid up to
whole blocks, and hands a number over as a pointer where Metal has a reference.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx

if TYPE_CHECKING:
    from openelm_mlx.model.kernels.kernel import Kernel, Launch

HEADER = r"""
typedef unsigned int uint;
using bfloat16_t = __nv_bfloat16;
using bfloat = __nv_bfloat16;
using float16_t = __half;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#endif

namespace simd {
inline uint index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
// threads of this warp: the last one of a block may have fewer than 32
inline uint width() {
    uint left = blockDim.x * blockDim.y * blockDim.z - (index() & ~31u);
    return left < 32 ? left : 32;
}
inline uint lanes() { return 0xffffffffu >> (32 - width()); }
template <typename T, typename Both> T fold(T value, Both both) {
    for (uint step = 16; step; step /= 2) {
        T other = __shfl_down_sync(lanes(), value, step);
        if ((index() & 31) + step < width()) value = both(value, other);
    }
    return __shfl_sync(lanes(), value, 0);
}
}  // namespace simd
template <typename T> T simd_sum(T value) {
    return simd::fold(value, [](T a, T b) { return T(a + b); });
}
template <typename T> T simd_max(T value) {
    return simd::fold(value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T> T simd_min(T value) {
    return simd::fold(value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T> T simd_shuffle(T value, uint lane) {
    return __shfl_sync(simd::lanes(), value, lane);
}
template <typename T> T simd_shuffle_xor(T value, uint mask) {
    return __shfl_xor_sync(simd::lanes(), value, mask);
}
template <typename T> T simd_shuffle_down(T value, uint step) {
    return __shfl_down_sync(simd::lanes(), value, step);
}
template <typename T> T simd_shuffle_up(T value, uint step) {
    return __shfl_up_sync(simd::lanes(), value, step);
}
template <typename T> T simd_broadcast(T value, uint lane) { return simd_shuffle(value, lane); }
template <typename T> T simd_broadcast_first(T value) { return simd_shuffle(value, 0); }
template <typename T> T simd_prefix_inclusive_sum(T value) {
    for (uint step = 1; step < 32; step *= 2) {
        T other = __shfl_up_sync(simd::lanes(), value, step);
        if ((simd::index() & 31) >= step) value = T(value + other);
    }
    return value;
}
template <typename T> T simd_prefix_exclusive_sum(T value) {
    return T(simd_prefix_inclusive_sum(value) - value);
}
template <typename To, typename From> To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

namespace metal {
inline float rsqrt(float x) { return ::rsqrtf(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float cos(float x) { return ::cosf(x); }
inline float sin(float x) { return ::sinf(x); }
inline float exp(float x) { return ::expf(x); }
inline float exp2(float x) { return ::exp2f(x); }
inline float log(float x) { return ::logf(x); }
inline float log2(float x) { return ::log2f(x); }
inline float pow(float x, float y) { return ::powf(x, y); }
inline float floor(float x) { return ::floorf(x); }
inline float fma(float x, float y, float z) { return ::fmaf(x, y, z); }
inline float abs(float x) { return ::fabsf(x); }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
namespace precise { using namespace metal; }
}  // namespace metal

#define device
#define constant const
#define thread
#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp(simd::lanes())
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define threadgroups_per_grid gridDim
#define thread_position_in_grid                                                             \
    make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
               blockIdx.z * blockDim.z + threadIdx.z)
#define thread_index_in_threadgroup simd::index()
#define thread_index_in_simdgroup (simd::index() & 31)
#define simdgroup_index_in_threadgroup (simd::index() / 32)
#define threads_per_simdgroup 32u
"""


def on_cuda(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
    """Launch a kernel on a GPU of NVIDIA's."""
    numbers = tuple(
        name for name, array in zip(kernel.inputs, inputs, strict=True) if array.ndim == 0
    )
    outputs: list[mx.array] = made_for_cuda(kernel, numbers)(
        inputs=inputs,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )
    return outputs


@cache
def made_for_cuda(kernel: Kernel, numbers: tuple[str, ...]) -> Any:
    names, source = parameters(kernel, numbers)
    return mx.fast.cuda_kernel(
        kernel.name, names, list(kernel.outputs), source, HEADER + kernel.header
    )


def parameters(kernel: Kernel, numbers: tuple[str, ...]) -> tuple[list[str], str]:
    """Return the names of a kernel's inputs in CUDA, and its body; `numbers` are 0-dimensional."""
    names = [f"{name}_at" if name in numbers else name for name in kernel.inputs]
    references = "".join(f"    const auto& {name} = *{name}_at;\n" for name in numbers)
    return names, references + kernel.source
