// CUDA C++ as g++ reads it: the language's words, its vector types, and what a thread can ask the runtime for.
//
// It is included before every kernel source. A CUDA thread is a fiber; it gives way to others at a collective of its
// warp and at a barrier of its block, and nowhere else (runtime.cpp).
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {

struct Site {
    const char* file;
    int line;
};

struct Thread {
    void* stack_pointer;
    uint3 index;
    int lane;
};

extern Thread* current;
extern uint3 block_index;
extern uint3 block_dim, grid_dim;
extern unsigned char* shared_memory;

// A collective of the warp: the lane that comes last calls the operation with every lane's argument.
using Operation = void (*)(void* const* arguments);
void collective(Operation operation, const char* name, void* argument, Site site);

// All threads of the block; gives the number of votes.
int barrier(bool vote, const char* name, Site site);
void barrier_of_first(int threads, const char* name, Site site);

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int groups);
void check_shared(const void* address, int bytes, const char* name, Site site);
void check_atomic(const void* address, int bytes, const char* name, Site site);

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bytes");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// How a kernel is called: its arguments by address, as cudaLaunchKernel takes them.
struct Kernel {
    void (*call)(const void* function, void* const* arguments);
    const void* function;
    int arguments;
    const int* sizes;
    const char* kinds;  // one letter an argument: p pointer, f floating point, i integer, s anything else
};

template <class Argument>
constexpr char kind_of() {
    if (std::is_pointer_v<Argument>) return 'p';
    if (std::is_floating_point_v<Argument>) return 'f';
    return std::is_integral_v<Argument> ? 'i' : 's';
}

// Reads the arguments, which are no memory of the kernel's.
template <class... Arguments, std::size_t... I>
__attribute__((no_sanitize("thread"))) void call_with(const void* function, void* const* arguments,
                                                      std::index_sequence<I...>) {
    reinterpret_cast<void (*)(Arguments...)>(const_cast<void*>(function))(*static_cast<Arguments*>(arguments[I])...);
}

template <class... Arguments>
void call_kernel(const void* function, void* const* arguments) {
    call_with<Arguments...>(function, arguments, std::index_sequence_for<Arguments...>{});
}

template <class... Arguments>
Kernel describe(void (*function)(Arguments...)) {
    static const int sizes[] = {int(sizeof(Arguments))..., 0};
    static const char kinds[] = {kind_of<Arguments>()..., 0};
    auto* address = reinterpret_cast<const void*>(function);
    return {call_kernel<Arguments...>, address, int(sizeof...(Arguments)), sizes, kinds};
}

}  // namespace emulator

#define EMULATOR_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __CUDA_ARCH__ 800
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_dim)
#define gridDim (::emulator::grid_dim)
constexpr int warpSize = 32;

inline void __syncthreads(EMULATOR_SITE) { ::emulator::barrier(false, "__syncthreads", site); }
inline int __syncthreads_or(int vote, EMULATOR_SITE) {
    return ::emulator::barrier(vote != 0, "__syncthreads_or", site) > 0;
}
inline int __syncthreads_and(int vote, EMULATOR_SITE) {
    return ::emulator::barrier(vote == 0, "__syncthreads_and", site) == 0;
}
inline int __syncthreads_count(int vote, EMULATOR_SITE) {
    return ::emulator::barrier(vote != 0, "__syncthreads_count", site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int __float_as_int(float x) { return ::emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return ::emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return ::emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return ::emulator::bits<float>(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline T __ldg(const T* address) { return *address; }

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return a != a || b < a ? b : a;
    else return std::common_type_t<A, B>(b) < std::common_type_t<A, B>(a) ? b : a;
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return a != a || b > a ? b : a;
    else return std::common_type_t<A, B>(b) > std::common_type_t<A, B>(a) ? b : a;
}
