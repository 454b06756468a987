// All inline assembly and all hardware intrinsics of the kernels; everything else is plain CUDA C++.
//
// No header of the CUDA toolkit is needed, so that NVRTC alone can compile: half and bf16 are own types. Below sm_80
// there is no asynchronous copy and no bfloat16: the copies are done at once, and products take steps of 8 channels.
#pragma once

struct half {
  unsigned short bits;
};

struct bf16 {
  unsigned short bits;
};

template <class T>
constexpr bool IS_BF16 = false;

template <>
constexpr bool IS_BF16<bf16> = true;

constexpr unsigned WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ unsigned smem_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// A kernel may be launched to begin while the one before it still runs (backend.py). Until it has waited, it reads nothing
// that the other one writes, and writes nothing that the other one reads; then the other one has ended, and what it wrote
// is seen.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Programs of the kernel behind begin once all of this one have asked for it, or are through.
__device__ __forceinline__ void let_kernel_behind_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes to shared memory; zeros where not valid, and then no access to global memory.
__device__ __forceinline__ void cp_async_16(void* smem, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

__device__ __forceinline__ void cp_async_4(void* smem, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(smem)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
#else
  *static_cast<unsigned*>(smem) = valid ? *static_cast<const unsigned*>(global) : 0u;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most N of this thread's youngest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row)));
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row)));
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_m16n8k16<half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_m16n8k8(d, a[0], a[1], b[0]);
  mma_m16n8k8(d, a[2], a[3], b[1]);
}
#endif

// ---- wgmma (sm_90a): the four warps of a warpgroup multiply 64 rows, each warp 16 of them, and find the sums where
// mma.sync would leave them. Operands in shared memory are rows of 128 bytes whose chunks of 16 are permuted by the row
// (place_of in common.cuh), in groups of eight rows at multiples of 1024 bytes. The threads go on meanwhile.

// Shows what this thread has written to shared memory to products that come after the next barrier; and the bulk copy
// engine may then write where this thread has read or written.
__device__ __forceinline__ void wgmma_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before a product that takes registers which threads have touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define FOUR(kind, n) kind(d[n][0]), kind(d[n][1]), kind(d[n][2]), kind(d[n][3])
#define SUMS(kind) \
  FOUR(kind, 0), FOUR(kind, 1), FOUR(kind, 2), FOUR(kind, 3), FOUR(kind, 4), FOUR(kind, 5), FOUR(kind, 6), FOUR(kind, 7)
#define SUMS_128(kind) \
  SUMS(kind), FOUR(kind, 8), FOUR(kind, 9), FOUR(kind, 10), FOUR(kind, 11), FOUR(kind, 12), FOUR(kind, 13), \
      FOUR(kind, 14), FOUR(kind, 15)
#define NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(columns, type, names, adds, operands, transposes)                                                    \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
  "." type " {" names "}, " operands ", adds, 1, 1, " transposes ";\n}"

// Until at most N of the warpgroup's youngest groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The sums are read after this alone.
__device__ __forceinline__ void wgmma_pin(float (&d)[8][4]) { asm volatile("" : SUMS("+f")); }

__device__ __forceinline__ void wgmma_pin(float (&d)[16][4]) { asm volatile("" : SUMS_128("+f")); }

// How wgmma finds an operand: `stride` bytes from each eight rows to the next ones, `leading` from 64 columns to the
// next.
__device__ __forceinline__ unsigned long long wgmma_operand(const void* tile, int stride, int leading) {
  constexpr unsigned long long SWIZZLED_BY_128_BYTES = 1ULL << 62;
  return SWIZZLED_BY_128_BYTES | static_cast<unsigned long long>(stride >> 4) << 32 |
         static_cast<unsigned>(leading >> 4) << 16 | smem_address(tile) >> 4;
}

// The operand so many bytes behind, a multiple of 16, without a carry into what is not the address.
__device__ __forceinline__ unsigned long long wgmma_advance(unsigned long long operand, int bytes) {
  return (operand & ~0xffffffffULL) | (static_cast<unsigned>(operand) + static_cast<unsigned>(bytes >> 4));
}

#define MULTIPLY_AS(type, columns, sums, names, adds, operands, transposes, ...)                             \
  if constexpr (ADDS) {                                                                                      \
    asm volatile(WGMMA(columns, type, names, adds, operands, transposes) : sums("+f") : "n"(1), __VA_ARGS__  \
                 : "memory");                                                                                \
  } else {                                                                                                   \
    asm volatile(WGMMA(columns, type, names, adds, operands, transposes) : sums("=f") : "n"(0), __VA_ARGS__  \
                 : "memory");                                                                                \
  }
#define MULTIPLY(...)                \
  if constexpr (IS_BF16<T>) {        \
    MULTIPLY_AS("bf16", __VA_ARGS__) \
  } else {                           \
    MULTIPLY_AS("f16", __VA_ARGS__)  \
  }
#define ROWS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// d = a b^T of 16 columns, added to d if ADDS; 64 rows of b, or 128. a in shared memory, or in registers as mma.sync
// takes it.
template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_rows(float (&d)[8][4], unsigned long long a, unsigned long long b) {
  MULTIPLY("64", SUMS, NAMES, "%32", "%33, %34", "0, 0", "l"(a), "l"(b))
}

template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_rows(float (&d)[16][4], unsigned long long a, unsigned long long b) {
  MULTIPLY("128", SUMS_128, NAMES_128, "%64", "%65, %66", "0, 0", "l"(a), "l"(b))
}

template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_rows(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
  MULTIPLY("64", SUMS, NAMES, "%32", "{%33, %34, %35, %36}, %37", "0", ROWS, "l"(b))
}

template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_rows(float (&d)[16][4], const unsigned (&a)[4], unsigned long long b) {
  MULTIPLY("128", SUMS_128, NAMES_128, "%64", "{%65, %66, %67, %68}, %69", "0", ROWS, "l"(b))
}

// The same with b instead of b^T: 16 rows of 64 or 128 columns, read by columns.
template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_columns(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
  MULTIPLY("64", SUMS, NAMES, "%32", "{%33, %34, %35, %36}, %37", "1", ROWS, "l"(b))
}

template <class T, bool ADDS>
__device__ __forceinline__ void wgmma_columns(float (&d)[16][4], const unsigned (&a)[4], unsigned long long b) {
  MULTIPLY("128", SUMS_128, NAMES_128, "%64", "{%65, %66, %67, %68}, %69", "1", ROWS, "l"(b))
}

#undef FOUR
#undef SUMS
#undef SUMS_128
#undef NAMES
#undef NAMES_128
#undef WGMMA
#undef MULTIPLY
#undef MULTIPLY_AS
#undef ROWS

// ---- the bulk copy engine (sm_90a): one thread asks, and an mbarrier in shared memory tells all when the bytes are there

// What the engine knows of a tensor: CUtensorMap of the driver's API (launcher.py), in the kernel's argument.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// A phase ends when so many threads have arrived and the bytes that they announced are there.
__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// Its memory may have another use then.
__device__ __forceinline__ void mbarrier_invalidate(unsigned long long* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Until the phase of this parity, 0 for the first one, has ended; the phase before the first one has.
__device__ __forceinline__ void mbarrier_wait(unsigned long long* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred has_ended;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 has_ended, [%0], %1;\n"
      "@!has_ended bra again;\n}" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
}

// Both at multiples of 16 bytes, and so many.
__device__ __forceinline__ void bulk_copy(void* smem, const void* global, int bytes, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   smem_address(smem)),
               "l"(global), "r"(bytes), "r"(smem_address(barrier))
               : "memory");
}

// The box of rows that begins with a group of eight of them, of a head.
__device__ __forceinline__ void bulk_copy_rows(void* smem, const TensorMap& map, int i_group, int i_head,
                                               unsigned long long* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %2, %2, %3, %4}], [%5];" ::"r"(smem_address(smem)),
      "l"(&map), "r"(0), "r"(i_group), "r"(i_head), "r"(smem_address(barrier))
      : "memory");
}

// ---- a warpgroup of its own for what needs few registers (sm_90a)

// A barrier of the first THREADS threads of a program.
template <int THREADS>
__device__ __forceinline__ void sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Registers of each thread of the warpgroup from here on, a multiple of eight.
template <int COUNT>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Waits until others have given them back.
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Keeps in registers what would otherwise be worked out anew where it is used.
template <class V>
__device__ __forceinline__ void keep(V*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// a times b bytes behind the pointer, in the order that is written: the compiler would make all of several such addresses
// first.
template <class V>
__device__ __forceinline__ V* bytes_behind(V* pointer, unsigned a, unsigned b) {
  V* behind;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(behind) : "r"(a), "r"(b), "l"(pointer));
  return behind;
}

// The i-th number of global memory from a kept address on, of which the compiler no longer knows what memory it is of.
__device__ __forceinline__ int load_kept(const int* global, unsigned i) {
  int value;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(bytes_behind(global, i, 4)) : "memory");
  return value;
}

// a b + c inside [0, 1]; NaN is 0. In one instruction, which the compiler does not make of a minimum and a maximum.
__device__ __forceinline__ float saturated(float a, float b, float c) {
  float inside;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(inside) : "f"(a), "f"(b), "f"(c));
  return inside;
}

// To 1e-7 between 1/2 and 2, elsewhere to 22 bits: one instruction instead of the twenty of log2f.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To 22 bits, 0 below the smallest normal number.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class V>
__device__ __forceinline__ V shfl_xor(V value, int mask) {
  return __shfl_xor_sync(WHOLE_WARP, value, mask);
}

// Of lane `lane`.
template <class V>
__device__ __forceinline__ V shfl(V value, int lane) {
  return __shfl_sync(WHOLE_WARP, value, lane);
}

__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(WHOLE_WARP, predicate); }

__device__ __forceinline__ bool any_sync(bool predicate) { return __any_sync(WHOLE_WARP, predicate); }

// A bit for each lane with the same number.
__device__ __forceinline__ unsigned match_any(int number) { return __match_any_sync(WHOLE_WARP, number); }

__device__ __forceinline__ void syncwarp() { __syncwarp(); }

__device__ __forceinline__ int popcount(unsigned bits) { return __popc(bits); }

// Its place; -1 if none is set.
__device__ __forceinline__ int highest_bit(unsigned bits) { return 31 - __clz(static_cast<int>(bits)); }

__device__ __forceinline__ void atomic_or(unsigned* pointer, unsigned bits) { atomicOr(pointer, bits); }

__device__ __forceinline__ void atomic_add(int* pointer, int n) { atomicAdd(pointer, n); }

template <class T>
__device__ __forceinline__ float to_float(T value);

template <>
__device__ __forceinline__ float to_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ float to_float<half>(half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

template <>
__device__ __forceinline__ float to_float<bf16>(bf16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ half from_float<half>(float value) {
  half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}
#endif

// Two numbers in one register, the first in its low half.
template <class T>
__device__ __forceinline__ unsigned pack2(float low, float high);

template <>
__device__ __forceinline__ unsigned pack2<half>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return from_float<half>(low).bits | static_cast<unsigned>(from_float<half>(high).bits) << 16;
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ unsigned pack2<bf16>(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
#endif

template <class T>
__device__ __forceinline__ float2 unpack2(unsigned packed) {
  const T low{static_cast<unsigned short>(packed & 0xffffu)};
  const T high{static_cast<unsigned short>(packed >> 16)};
  return float2{to_float(low), to_float(high)};
}
