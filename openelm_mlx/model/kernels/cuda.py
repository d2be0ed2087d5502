"""Kernels on an NVIDIA GPU, from the same sources as on a Mac.

A header of macros translates Metal's words into CUDA's: a threadgroup is a block, of whole warps,
and a SIMD group is a warp. CUDA's compiler (NVRTC), which MLX has loaded, takes a tenth of a second
for a kernel; `mx.fast.cuda_kernel` would put MLX's headers before it, and compile for seconds in
each process.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from openelm_mlx.device import mx

if TYPE_CHECKING:
    from openelm_mlx.model.kernels.kernel import Kernel, Launch

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
OPTIONS = ("--device-as-default-execution-space", "--std=c++17")
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.bool_: "bool",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.uint8: "unsigned char",
    mx.complex64: "complex64_t",
}

HEADER = r"""
typedef unsigned int uint;
typedef unsigned int uint32_t;
typedef int int32_t;
struct complex64_t { float real, imag; };
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)

// They round to even as MLX's do, and compute in float.
struct float16_t {
    unsigned short bits;
    float16_t() = default;
    float16_t(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};
struct bfloat16_t {
    unsigned short bits;
    bfloat16_t() = default;
    bfloat16_t(float x) {
        uint u = __float_as_uint(x);
        bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
    operator float() const { return __uint_as_float(uint(bits) << 16); }
};

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
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline float min(float a, float b) { return ::fminf(a, b); }
namespace precise { using namespace metal; }
}  // namespace metal

#define LANES 0xffffffffu
inline uint index_in_block() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
template <typename T, typename Both> T folded(T value, Both both) {
    for (uint step = 16; step; step /= 2) {
        value = both(value, __shfl_xor_sync(LANES, value, step));
    }
    return value;
}
template <typename T> T simd_sum(T value) {
    return folded(value, [](T a, T b) { return T(a + b); });
}
template <typename T> T simd_max(T value) {
    return folded(value, [](T a, T b) { return metal::max(a, b); });
}
template <typename T> T simd_min(T value) {
    return folded(value, [](T a, T b) { return metal::min(a, b); });
}
template <typename T> T simd_shuffle(T value, uint lane) {
    return __shfl_sync(LANES, value, lane);
}
template <typename T> T simd_shuffle_xor(T value, uint mask) {
    return __shfl_xor_sync(LANES, value, mask);
}
template <typename T> T simd_shuffle_down(T value, uint step) {
    return __shfl_down_sync(LANES, value, step);
}
template <typename T> T simd_shuffle_up(T value, uint step) {
    return __shfl_up_sync(LANES, value, step);
}
template <typename T> T simd_broadcast(T value, uint lane) { return simd_shuffle(value, lane); }
template <typename T> T simd_broadcast_first(T value) { return simd_shuffle(value, 0); }
template <typename T> T simd_prefix_inclusive_sum(T value) {
    for (uint step = 1; step < 32; step *= 2) {
        T other = __shfl_up_sync(LANES, value, step);
        if ((index_in_block() & 31) >= step) value = T(value + other);
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

#define device
#define constant const
#define thread
#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define threadgroups_per_grid gridDim
#define thread_position_in_grid                                                             \
    make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
               blockIdx.z * blockDim.z + threadIdx.z)
#define thread_index_in_threadgroup index_in_block()
#define thread_index_in_simdgroup (index_in_block() & 31)
#define simdgroup_index_in_threadgroup (index_in_block() / 32)
#define threads_per_simdgroup 32u
"""


def on_cuda(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
    """Launch a kernel on an NVIDIA GPU. Raises `RuntimeError` if it does not compile."""
    outputs: list[mx.array] = mx.fast.precompiled_cuda_kernel(
        name=kernel.name,
        compiled_source=compiled(text(kernel, inputs, launch), architecture()),
        inputs=inputs,
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
        scalars=[],
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        ensure_row_contiguous=True,
    )
    return outputs


def text(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> str:
    """Return the CUDA of a kernel for these types. A number without dimensions is a reference, as
    in Metal, though MLX hands over a pointer.
    """
    parameters, lines = [], []
    for name, array in zip(kernel.inputs, inputs, strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {name}{'_at' * (array.ndim == 0)}")
        if array.ndim == 0:
            lines.append(f"const {TYPES[array.dtype]}& {name} = *{name}_at;")
    for name, dtype in zip(kernel.outputs, launch.dtypes, strict=True):
        parameters.append(f"{TYPES[dtype]}* {name}")
    for name, value in launch.template:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {TYPES[value]};")
        else:
            what = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {what} {name} = {str(value).lower()};")
    head = f'extern "C" __global__ void {kernel.name}({", ".join(parameters)}) {{'
    return "\n".join([HEADER, kernel.header, head, *lines, kernel.source, "}"])


@cache
def architecture() -> str:
    """Return this GPU's instructions, such as sm_90."""
    return str(mx.device_info()["architecture"])


@cache
def nvrtc() -> ctypes.CDLL:
    """Return the compiler that MLX has loaded. Raises `OSError` if there is none."""
    for name in LIBRARIES[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(LIBRARIES[-1])


@cache
def compiled(source: str, architecture: str) -> bytes:
    """Return the machine code of a kernel. Raises `RuntimeError` with what the compiler says."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    at, size_at = ctypes.byref(program), ctypes.byref(size)
    options = [word.encode() for word in (*OPTIONS, f"--gpu-architecture={architecture}")]
    given = (ctypes.c_char_p * len(options))(*options)
    library.nvrtcCreateProgram(at, source.encode(), b"kernel.cu", 0, None, None)
    try:
        failed = library.nvrtcCompileProgram(program, len(options), given)
        what = "ProgramLog" if failed else "CUBIN"
        getattr(library, f"nvrtcGet{what}Size")(program, size_at)
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
    finally:
        library.nvrtcDestroyProgram(at)
    if failed:
        raise RuntimeError(f"CUDA's compiler refuses a kernel: {buffer.value.decode()}")
    return buffer.raw
