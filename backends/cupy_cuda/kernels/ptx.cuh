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

constexpr unsigned WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ unsigned smem_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
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

template <class V>
__device__ __forceinline__ V shfl_xor(V value, int mask) {
  return __shfl_xor_sync(WHOLE_WARP, value, mask);
}

__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(WHOLE_WARP, predicate); }

__device__ __forceinline__ bool any_sync(bool predicate) { return __any_sync(WHOLE_WARP, predicate); }

__device__ __forceinline__ void syncwarp() { __syncwarp(); }

__device__ __forceinline__ int popcount(unsigned bits) { return __popc(bits); }

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
