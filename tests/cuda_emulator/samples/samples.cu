// Small kernels, right ones and wrong ones, on which the emulator is tested.
#include "samples.cuh"

template <class T, int ADDEND>
__global__ void scaled(const T* __restrict__ x, T* __restrict__ y, float factor, int n, long long stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i * stride] = from_float<T>(factor * to_float<T>(x[i]) + ADDEND);
}

struct Params {
  const float* x;
  float* y;
  double factor;
  int n;
};

__global__ void scaled_by_structure(const Params params) {
  const float factor = static_cast<float>(params.factor);
  for (int i = threadIdx.x; i < params.n; i += blockDim.x) params.y[i] = params.x[i] * factor;
}

__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

template <class T>
__global__ void round_trip(const float* x, T* y, float* z, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = from_float<T>(x[i]);
    z[i] = unpack2<T>(pack2<T>(0, x[i])).y;
  }
}

// d (16, 16) = a (16, 16) b (16, 16), or a b^T; by one warp.
template <class T, bool TRANSPOSED>
__global__ void product(const T* a, const T* b, float* d) {
  extern __shared__ __align__(128) unsigned char smem[];
  T* tiles = reinterpret_cast<T*>(smem);
  const int lane = lane_of();
  for (int i = lane; i < 32; i += 32) {
    for (int chunk = 0; chunk < 2; chunk++) {
      cp_async_16(tiles + i * 8 + chunk * 256, (chunk ? b : a) + i * 8, true);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  unsigned left[4], right[4];
  ldmatrix_x4(left, tiles + lane % 16 * 16 + lane / 16 * 8);
  if constexpr (TRANSPOSED) {
    ldmatrix_x4(right, tiles + 256 + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4_trans(right, tiles + 256 + lane % 16 * 16 + lane / 16 * 8);
  }
  for (int n = 0; n < 2; n++) {
    float acc[4] = {};
    const unsigned columns[2] = {right[2 * n], right[2 * n + 1]};
    mma_m16n8k16<T>(acc, left, columns);
    for (int e = 0; e < 4; e++) d[(lane / 4 + e / 2 * 8) * 16 + 8 * n + lane % 4 * 2 + e % 2] = acc[e];
  }
}

enum Operands { ROWS, REGISTERS, COLUMNS };

template <class T, Operands OPERANDS, bool ADDS>
__device__ void multiply_step(float (&sums)[8][4], const unsigned (&left)[4], const T* left_rows, const T* rows) {
  if constexpr (OPERANDS == ROWS) {
    wgmma_rows<T, ADDS>(sums, wgmma_operand(left_rows, 1024, 1024), wgmma_operand(rows, 1024, 1024));
  } else if constexpr (OPERANDS == REGISTERS) {
    wgmma_rows<T, ADDS>(sums, left, wgmma_operand(rows, 1024, 1024));
  } else {
    wgmma_columns<T, ADDS>(sums, left, wgmma_operand(rows, 1024, 1024));
  }
}

// d (64, 64) = a (64, 64) b^T, or a b for COLUMNS, twice, with a in shared memory for ROWS; by a warpgroup.
template <class T, Operands OPERANDS, bool FENCES, bool WAITS>
__global__ void warpgroup_product(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char smem[];
  T* tiles = reinterpret_cast<T*>(smem);
  const int lane = lane_of(), first = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = threadIdx.x; i < 1024; i += 128) {
    const int row = i / 8 % 64, chunk = i % 8;
    const T* from = (i < 512 ? a : b) + row * 64 + chunk * 8;
    cp_async_16(tiles + i / 512 * 4096 + row * 64 + (chunk ^ row % 8) * 8, from, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (FENCES) wgmma_proxy_fence();
  __syncthreads();
  float sums[8][4] = {};
  for (int turn = 0; turn < 2; turn++) {
    wgmma_fence();
    for (int step = 0; step < 4; step++) {
      const T* rows = tiles + 4096 + (OPERANDS == COLUMNS ? step * 1024 : step * 16);
      unsigned left[4];
      for (int i = 0; i < 4; i++) {
        const T* pair = a + (first + i % 2 * 8) * 64 + 16 * step + lane % 4 * 2 + i / 2 * 8;
        left[i] = pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
      }
      if (turn > 0 || step > 0) {
        multiply_step<T, OPERANDS, true>(sums, left, tiles + step * 16, rows);
      } else {
        multiply_step<T, OPERANDS, false>(sums, left, tiles + step * 16, rows);
      }
    }
    wgmma_commit();
  }
  wgmma_wait<WAITS ? 0 : 1>();
  for (int n = 0; n < 8; n++)
    for (int e = 0; e < 4; e++) d[(first + e / 2 * 8) * 64 + 8 * n + lane % 4 * 2 + e % 2] = sums[n][e];
  wgmma_wait<0>();
}

// d (64, 128) = a (64, 16) b, with b (16, 128) in shared memory, its halves apart; or a b^T, with b (128, 16).
template <class T, bool BY_COLUMNS>
__global__ void wide_product(const T* a, const T* b, float* d) {
  extern __shared__ __align__(1024) unsigned char smem[];
  T* tile = reinterpret_cast<T*>(smem);
  const int lane = lane_of(), first = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = threadIdx.x; i < 256; i += 128) {
    const int row = BY_COLUMNS ? i / 16 : i / 2, chunk = BY_COLUMNS ? i % 16 : i % 2;
    const int group = BY_COLUMNS ? row / 8 * 2 + chunk / 8 : row / 8;
    cp_async_16(tile + group * 512 + row % 8 * 64 + (chunk % 8 ^ row % 8) * 8, b + i * 8, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  wgmma_proxy_fence();
  __syncthreads();
  unsigned left[4];
  for (int i = 0; i < 4; i++) {
    const T* pair = a + (first + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8;
    left[i] = pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
  }
  float sums[16][4] = {};
  wgmma_fence();
  if constexpr (BY_COLUMNS) {
    wgmma_columns<T, true>(sums, left, wgmma_operand(tile, 2048, 1024));
  } else {
    wgmma_rows<T, true>(sums, left, wgmma_operand(tile, 1024, 1024));
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int n = 0; n < 16; n++)
    for (int e = 0; e < 4; e++) d[(first + e / 2 * 8) * 128 + 8 * n + lane % 4 * 2 + e % 2] = sums[n][e];
}

__global__ void products_of_warpgroups_differ(float* d) {
  extern __shared__ __align__(1024) unsigned char smem[];
  float sums[8][4] = {};
  const unsigned left[4] = {};
  for (int i = threadIdx.x; i < 2048; i += 128) reinterpret_cast<float*>(smem)[i] = 0;
  __syncthreads();
  wgmma_rows<half, false>(sums, left, wgmma_operand(smem + threadIdx.x / 64 * 32, 1024, 1024));
  wgmma_commit();
  wgmma_wait<0>();
  d[threadIdx.x] = sums[0][0];
}

// A row of out for each collective.
__global__ void collectives(const int* x, int* out) {
  const int i = threadIdx.x;
  out[i] = shfl_xor(x[i], 5);
  out[blockDim.x + i] = static_cast<int>(ballot(x[i] % 2 != 0));
  out[2 * blockDim.x + i] = any_sync(x[i] == 40);
  out[3 * blockDim.x + i] = popcount(static_cast<unsigned>(x[i]));
  out[4 * blockDim.x + i] = static_cast<int>(match_any(x[i] % 3));
}

__global__ void block_sums(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* parts = reinterpret_cast<float*>(smem);
  const float sum = warp_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (lane_of() == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  out[blockIdx.x] = 0;
  for (int i = 0; i < blockDim.x / 32; i++) out[blockIdx.x] += parts[i];
}

// Three groups of a copy each; the last asks for zeros. At most UNFINISHED are under way when they are read.
template <int UNFINISHED>
__global__ void copies(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* own = reinterpret_cast<float*>(smem) + threadIdx.x * 12;
  for (int i = 0; i < 3; i++) {
    cp_async_16(own + 4 * i, x + threadIdx.x * 12 + 4 * i, i < 2);
    cp_async_commit();
  }
  cp_async_wait<UNFINISHED>();
  for (int i = 0; i < 12; i++) out[threadIdx.x * 12 + i] = own[i];
}

// Each thread reads what one of another warp wrote.
template <bool BARRIER>
__global__ void reversed(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* values = reinterpret_cast<float*>(smem);
  values[threadIdx.x] = x[threadIdx.x];
  if constexpr (BARRIER) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The same in a warp, for which a vote is no barrier and syncwarp is one.
template <bool SYNC>
__global__ void reversed_in_warp(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* values = reinterpret_cast<float*>(smem);
  values[lane_of()] = x[lane_of()];
  if constexpr (SYNC) syncwarp();
  else any_sync(true);
  out[lane_of()] = values[31 - lane_of()];
}

// Its second round may store before the first has been read.
template <bool BARRIER>
__global__ void reversed_twice(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* values = reinterpret_cast<float*>(smem);
  for (int i = 0; i < 2; i++) {
    values[threadIdx.x] = x[i * blockDim.x + threadIdx.x];
    __syncthreads();
    out[i * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
    if constexpr (BARRIER) __syncthreads();
  }
}

__global__ void add_atomically(int* total, unsigned* bits) {
  atomic_add(total, 1);
  atomic_or(bits, 1u << lane_of());
}

__global__ void add_plainly(int* total) { *total += 1; }

__global__ void mark_plainly(int* flag) { *flag = 1; }

__global__ void half_a_warp_votes(int* out) {
  if (lane_of() < 16) out[threadIdx.x] = any_sync(true);
}

__global__ void halves_of_a_warp_part(int* out) {
  if (lane_of() < 16) out[threadIdx.x] = any_sync(true);
  else out[threadIdx.x] = any_sync(false);
}

__global__ void half_a_block_waits() {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

// EARLY: before it has waited for the kernel before. LETS_FIRST: lets the one behind begin before that, too.
template <bool EARLY, bool LETS_FIRST>
__global__ void increments(const int* x, int* y) {
  if (LETS_FIRST) let_kernel_behind_begin();
  if (EARLY) y[threadIdx.x] = x[threadIdx.x] + 1;
  wait_for_kernel_before();
  if (!LETS_FIRST) let_kernel_behind_begin();
  if (!EARLY) y[threadIdx.x] = x[threadIdx.x] + 1;
}

__global__ void increments_alone(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x] + 1; }

__global__ void halves_of_a_block_wait_apart() {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
  else
    __syncthreads();
}

__global__ void reads_unwritten(float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  out[threadIdx.x] = reinterpret_cast<float*>(smem)[threadIdx.x];
}

__global__ void stores_shared(int at) {
  extern __shared__ __align__(128) unsigned char smem[];
  smem[at] = 1;
}

__global__ void stores_global(float* x, long long at) { x[at] = 1; }

__global__ void stores_vector(float* x, int at) { *reinterpret_cast<float4*>(x + at) = float4{1, 2, 3, 4}; }

__global__ void divides(int* x) { x[0] = 1000 / x[0]; }

__global__ void copies_from(const float* x, int at, int to) {
  extern __shared__ __align__(128) unsigned char smem[];
  cp_async_16(smem + to, x + at, true);
}

__global__ void loads_matrices_at(int at) {
  extern __shared__ __align__(128) unsigned char smem[];
  unsigned r[4];
  ldmatrix_x4(r, smem + at);
}

__global__ void touches_a_copy(const float* x, float* out) {
  extern __shared__ __align__(128) unsigned char smem[];
  cp_async_16(smem, x, true);
  *out = *reinterpret_cast<float*>(smem);
}

struct Box {
  TensorMap map;
  uint4* out;
  int n, i_group, i_head, at;
};

// A box, as it lies in shared memory `at` bytes behind its start.
__global__ void copies_box(const __grid_constant__ Box box) {
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned long long* arrival = reinterpret_cast<unsigned long long*>(smem);
  if (threadIdx.x == 0) {
    mbarrier_init(arrival, 1);
    wgmma_proxy_fence();
    mbarrier_arrive(arrival, box.n);
    bulk_copy_rows(smem + box.at, box.map, box.i_group, box.i_head, arrival);
  }
  __syncthreads();
  mbarrier_wait(arrival, 0);
  for (int i = threadIdx.x; i < box.n / 16; i += blockDim.x)
    box.out[i] = reinterpret_cast<const uint4*>(smem + box.at)[i];
}

// From `from` bytes behind x on, through shared memory, by one thread.
__global__ void copies_bulk(const char* x, char* out, int from, int to, int bytes, int mbarrier) {
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned long long* arrival = reinterpret_cast<unsigned long long*>(smem + mbarrier);
  mbarrier_init(arrival, 1);
  wgmma_proxy_fence();
  mbarrier_arrive(arrival, bytes);
  bulk_copy(smem + to, x + from, bytes, arrival);
  wait_for_kernel_before();
  mbarrier_wait(arrival, 0);
  for (int i = 0; i < bytes; i++) out[i] = static_cast<char>(smem[to + i]);
}

enum Fault {
  NONE, ONE_WAITS_FOR_ALL, NO_WAIT, ONE_WAITS, WRONG_PARITY,
  NO_FENCE_AFTER_WRITES, NO_FENCE_AFTER_READS, NO_FENCE_AFTER_INIT,
  NO_BARRIER_AFTER_WRITES, NO_BARRIER_AFTER_READS, NO_BARRIER_AFTER_INIT, NO_BARRIER_AT_END,
  TOO_MANY_BYTES, TOO_FEW_BYTES, NO_ARRIVAL, TWO_ARRIVALS, TWO_INITS, NO_INIT, WAIT_AFTER_END,
  END_OF_COPY, COPY_AT_END, TOUCHED_MBARRIER, OVERWRITTEN_COPY, TWO_COPIES
};

struct Ring {
  TensorMap map;
  const float* numbers;
  const half *a, *last;
  float *sums, *products;
  int n;
  Fault fault;
};

// Of n tiles (64, 64) and as many times 64 numbers: products (64, 64) += a (64, 64) tile^T, sums (n, 64, 2) of halves
// of the tiles' rows times the numbers. Two stages; the engine fills one while the other one is used. The threads
// themselves copy the last tile.
__global__ void ring(const __grid_constant__ Ring ring) {
  extern __shared__ __align__(1024) unsigned char smem[];
  constexpr int TILE = 8192, NUMBERS = 256;
  half* tiles = reinterpret_cast<half*>(smem);
  float* numbers = reinterpret_cast<float*>(smem + 2 * TILE);
  unsigned long long* arrivals = reinterpret_cast<unsigned long long*>(smem + 2 * TILE + 2 * NUMBERS);
  const int thread = threadIdx.x, lane = lane_of(), first = thread / 32 * 16 + lane / 4;
  auto has = [&](Fault fault) { return ring.fault == fault; };
  auto ask = [&](int i) {
    const int stage = i % 2;
    if (i == ring.n - 1) {
      for (int chunk = thread; chunk < 512; chunk += 128)
        cp_async_16(tiles + stage * TILE / 2 + chunk / 8 * 64 + (chunk % 8 ^ chunk / 8 % 8) * 8,
                    ring.last + chunk * 8, true);
      if (thread < 16) cp_async_16(numbers + stage * 64 + thread * 4, ring.numbers + i * 64 + thread * 4, true);
      cp_async_commit();
      cp_async_wait<0>();
      wgmma_proxy_fence();
      if (thread == 0) mbarrier_arrive(arrivals + stage, 0);
    }
    if (i == ring.n - 1 || thread > 0) return;
    const int announced = TILE + NUMBERS + 16 * has(TOO_FEW_BYTES) - 16 * has(TOO_MANY_BYTES);
    if (!has(NO_ARRIVAL)) mbarrier_arrive(arrivals + stage, announced);
    if (has(TWO_ARRIVALS)) mbarrier_arrive(arrivals + stage, announced);
    bulk_copy_rows(tiles + stage * TILE / 2, ring.map, 0, i, arrivals + stage);
    bulk_copy(numbers + stage * 64, ring.numbers + i * 64, NUMBERS, arrivals + stage);
    if (has(TWO_COPIES)) bulk_copy(numbers + stage * 64, ring.numbers + i * 64, NUMBERS, arrivals + stage);
    if (has(OVERWRITTEN_COPY)) numbers[stage * 64] = 0;
  };

  for (int i = thread; i < (2 * TILE + 2 * NUMBERS + 16) / 4; i += 128) reinterpret_cast<float*>(smem)[i] = 0;
  if (!has(NO_FENCE_AFTER_WRITES)) wgmma_proxy_fence();
  if (!has(NO_BARRIER_AFTER_WRITES)) __syncthreads();
  if (thread == 0) {
    for (int stage = 0; stage < 2 && !has(NO_INIT); stage++) mbarrier_init(arrivals + stage, 1);
    if (has(TWO_INITS)) mbarrier_init(arrivals + 1, 1);
    if (!has(NO_FENCE_AFTER_INIT)) wgmma_proxy_fence();
  }
  ask(0);
  float products[8][4] = {};
  for (int i = 0; i < ring.n; i++) {
    const int stage = i % 2;
    if (i == 0 && has(NO_BARRIER_AFTER_INIT)) {
      if (thread >= 32) return;
      any_sync(true);
    } else if (i == 0 || !has(NO_BARRIER_AFTER_READS)) {
      __syncthreads();
    }
    if (i + 1 < ring.n) ask(i + 1);
    const bool one_waits = has(ONE_WAITS_FOR_ALL) || has(ONE_WAITS);
    if (!has(NO_WAIT) && (!one_waits || lane == 0))
      mbarrier_wait(arrivals + stage, has(WRONG_PARITY) && i == 2 ? 0 : i / 2 % 2);
    if (has(ONE_WAITS_FOR_ALL)) syncwarp();
    if (has(ONE_WAITS)) any_sync(true);  // which is no barrier
    const half* tile = tiles + stage * TILE / 2;
    const int row = thread / 2;
    float sum = 0;
    for (int column = thread % 2 * 32; column < thread % 2 * 32 + 32; column++)
      sum += to_float(tile[row * 64 + (column / 8 ^ row % 8) * 8 + column % 8]) * numbers[stage * 64 + column];
    ring.sums[i * 128 + thread] = sum;
    wgmma_fence();
    for (int step = 0; step < 4; step++) {
      unsigned left[4];
      for (int e = 0; e < 4; e++) {
        const half* pair = ring.a + (first + e % 2 * 8) * 64 + 16 * step + lane % 4 * 2 + e / 2 * 8;
        left[e] = pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
      }
      wgmma_rows<half, true>(products, left, wgmma_operand(tile + step * 16, 1024, 1024));
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (!has(NO_FENCE_AFTER_READS)) wgmma_proxy_fence();
  }
  if (!has(NO_BARRIER_AT_END)) __syncthreads();
  if (thread == 0) {
    if (has(TOUCHED_MBARRIER)) ring.sums[0] = reinterpret_cast<float*>(arrivals)[0];
    if (has(END_OF_COPY) || has(COPY_AT_END)) ask(0);
    for (int stage = 0; stage < 2 && !has(COPY_AT_END); stage++) mbarrier_invalidate(arrivals + stage);
  }
  if (has(WAIT_AFTER_END) && thread == 0) mbarrier_wait(arrivals, 0);
  for (int n = 0; n < 8; n++)
    for (int e = 0; e < 4; e++) ring.products[(first + e / 2 * 8) * 64 + 8 * n + lane % 4 * 2 + e % 2] = products[n][e];
}

enum HandoverFault {
  WELL, NOT_WAITED_FOR_FREE, GIVEN_BACK_EARLY, GIVEN_BACK_BY_ONE_LANE, GIVEN_BACK_BY_ONE_WARP, GIVEN_BACK_TWICE,
  SYNC_OF_TOO_MANY, NO_SYNC, NO_ARRIVALS
};

// out (n, 64): numbers (n, 64), each row backwards. One warp has them brought to two stages, two warps use them; last (64)
// is the last row of out, handed among these two.
__global__ void hands_over(const float* numbers, float* out, float* last, int n, int fault) {
  extern __shared__ __align__(1024) unsigned char smem[];
  float* stages = reinterpret_cast<float*>(smem);
  float* handed = stages + 128;
  unsigned long long *full = reinterpret_cast<unsigned long long*>(handed + 64), *free = full + 2;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int stage = 0; stage < 2; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(free + stage, fault == NO_ARRIVALS ? 0 : 2);
    }
    wgmma_proxy_fence();
  }
  __syncthreads();
  if (thread >= 64) {
    give_registers_back<24>();
    for (int i = 0; i < n && thread == 64; i++) {
      if (fault != NOT_WAITED_FOR_FREE) mbarrier_wait(free + i % 2, i / 2 % 2 ^ 1);
      mbarrier_arrive(full + i % 2, 256);
      bulk_copy(stages + i % 2 * 64, numbers + i * 64, 256, full + i % 2);
    }
    if (fault == SYNC_OF_TOO_MANY) sync_first<64>();
    return;
  }
  take_registers<40>();
  float number = 0;
  for (int i = 0; i < n; i++) {
    auto give_back = [&]() {
      if (fault != GIVEN_BACK_BY_ONE_LANE) syncwarp();
      if (thread % 32 == 0 && (fault != GIVEN_BACK_BY_ONE_WARP || thread == 0)) mbarrier_arrive(free + i % 2);
      if (thread % 32 == 0 && fault == GIVEN_BACK_TWICE) mbarrier_arrive(free + i % 2);
    };
    mbarrier_wait(full + i % 2, i / 2 % 2);
    if (fault == GIVEN_BACK_EARLY) give_back();
    number = stages[i % 2 * 64 + 63 - thread];
    wgmma_proxy_fence();
    out[i * 64 + thread] = number;
    if (fault != GIVEN_BACK_EARLY) give_back();
  }
  handed[thread] = number;
  if (fault != NO_SYNC) sync_first<64>();
  last[63 - thread] = handed[63 - thread];
}
