// Included by a kernel, as the package's kernels include theirs.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}
