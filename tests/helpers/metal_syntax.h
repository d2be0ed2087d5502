// Metal's words for a C++ front end, with its address spaces: pointers of one are not of another.
// Nothing here runs, and clang says what does not fit; metal_shim.h is what runs.
typedef unsigned int uint;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned short ushort;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;
struct uint3 { uint x, y, z; };
struct complex64_t { float real, imag; };
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

namespace metal {
template <typename T> T simd_sum(T);
template <typename T> T simd_product(T);
template <typename T> T simd_max(T);
template <typename T> T simd_min(T);
template <typename T> T simd_or(T);
template <typename T> T simd_and(T);
template <typename T> T simd_xor(T);
template <typename T> T simd_prefix_inclusive_sum(T);
template <typename T> T simd_prefix_exclusive_sum(T);
template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
template <typename T> T simd_shuffle_down(T, ushort);
template <typename T> T simd_shuffle_up(T, ushort);
template <typename T> T simd_broadcast(T, ushort);
template <typename T> T simd_broadcast_first(T);
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
struct simd_vote {
  typedef uint64_t vote_t;
  explicit operator vote_t() const;
};
simd_vote simd_ballot(bool);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed };
struct atomic_uint { uint value; };
struct atomic_int { int value; };
#define ATOMIC(space, A, N)                                            \
  N atomic_load_explicit(const volatile space A*, memory_order);       \
  void atomic_store_explicit(volatile space A*, N, memory_order);      \
  N atomic_fetch_add_explicit(volatile space A*, N, memory_order);     \
  N atomic_fetch_max_explicit(volatile space A*, N, memory_order);     \
  N atomic_fetch_min_explicit(volatile space A*, N, memory_order);     \
  N atomic_fetch_or_explicit(volatile space A*, N, memory_order);
ATOMIC(device, atomic_uint, uint) ATOMIC(threadgroup, atomic_uint, uint)
ATOMIC(device, atomic_int, int) ATOMIC(threadgroup, atomic_int, int)

#define MATH                                                                                   \
  float cos(float); float sin(float); float exp(float); float exp2(float); float log(float);   \
  float log2(float); float sqrt(float); float rsqrt(float); float tanh(float);                 \
  float pow(float, float);
namespace precise { MATH }
namespace fast { MATH }
using namespace precise;
float floor(float); float ceil(float); float rint(float); float round(float); float trunc(float);
float fabs(float); float fma(float, float, float); float abs(float); uint abs(int);
bool isnan(float); bool isinf(float);
#define LIKE(T) T max(T, T); T min(T, T); T clamp(T, T, T); T select(T, T, bool);
LIKE(int) LIKE(uint) LIKE(float) LIKE(half) LIKE(bfloat) LIKE(int64_t) LIKE(uint64_t)
uint popcount(uint); uint clz(uint); uint ctz(uint); uint mulhi(uint, uint); uint rotate(uint, uint);
}  // namespace metal
template <typename To, typename From> To as_type(From);
using namespace metal;
