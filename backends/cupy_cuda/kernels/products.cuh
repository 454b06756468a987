// Products of tiles in shared memory, with their results in registers in the layout of mma.sync: element e of column
// tile n of row tile m of a thread is row 16 m + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2.
//
// Half precision takes the tensor cores; float32 takes multiply-adds on the same layout, so that all else is shared.
#pragma once

#include "common.cuh"

// Rows of a tile as left operand: M_TILES times 16 rows by D, in registers.
template <class T, int D, int M_TILES>
struct Fragments {
  unsigned r[M_TILES][D / 16][4];
};

template <class T>
constexpr bool IS_HALF = sizeof(T) == 2;

template <class T, int D>
__device__ __forceinline__ void load_fragment(unsigned (&a)[4], const T* tile, int first_row, int step) {
  const int lane = lane_of();
  ldmatrix_x4(a, tile + place_of<T, D>(first_row + lane % 16, 2 * step + lane / 16));
}

template <class T, int D, int M_TILES>
__device__ __forceinline__ void load_fragments(Fragments<T, D, M_TILES>& fragments, const T* tile, int first_row) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int step = 0; step < D / 16; step++)
      load_fragment<T, D>(fragments.r[m][step], tile, first_row + 16 * m, step);
}

template <class T, int M, int N>
__device__ __forceinline__ void multiply(float (&acc)[M][N][4], const unsigned (&a)[M][4], const unsigned (&b)[4],
                                         int n) {
  const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
  for (int m = 0; m < M; m++) {
    mma_m16n8k16<T>(acc[m][n], a[m], first);
    mma_m16n8k16<T>(acc[m][n + 1], a[m], second);
  }
}

// acc += a b^T, both with rows of D numbers; a in registers.
template <class T, int D, int M, int N>
__device__ __forceinline__ void scores(float (&acc)[M][N][4], const Fragments<T, D, M>& a, const T* b) {
  const int lane = lane_of();
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    unsigned fragment[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) fragment[m][e] = a.r[m][step][e];
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      unsigned keys[4];
      ldmatrix_x4(keys, b + place_of<T, D>(8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      multiply<T>(acc, fragment, keys, n);
    }
  }
}

// The same with rows from first_row on of a tile in shared memory.
template <class T, int D, int M, int N>
__device__ __forceinline__ void scores(float (&acc)[M][N][4], const T* a, int first_row, const T* b) {
  const int lane = lane_of();
  if constexpr (IS_HALF<T>) {
    // Four steps are what the permutation of chunks repeats after.
#pragma unroll 4
    for (int step = 0; step < D / 16; step++) {
      unsigned fragment[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) load_fragment<T, D>(fragment[m], a, first_row + 16 * m, step);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned keys[4];
        ldmatrix_x4(keys, b + place_of<T, D>(8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
        multiply<T>(acc, fragment, keys, n);
      }
    }
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS<T, D>; chunk++) {
      Vec4 rows[M][2];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          rows[m][e] = *reinterpret_cast<const Vec4*>(
              a + place_of<T, D>(first_row + 16 * m + 8 * e + lane / 4, chunk));
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const Vec4 key = *reinterpret_cast<const Vec4*>(b + place_of<T, D>(column_of(n, e), chunk));
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              float& sum = acc[m][n][2 * i + e];
              sum += rows[m][i].x * key.x;
              sum += rows[m][i].y * key.y;
              sum += rows[m][i].z * key.z;
              sum += rows[m][i].w * key.w;
            }
        }
    }
  }
}

// Whether registers have room for rows that are a left operand throughout a loop.
template <class T, int D>
constexpr bool CAN_KEEP = IS_HALF<T> && D <= KEPT_HEAD;

// M_TILES times 16 rows of a tile as left operand of scores: with KEPT read once, and kept in registers.
template <class T, int D, int M_TILES, bool KEPT>
struct LeftRows {
  const T* tile;
  int first_row;
  Fragments<T, KEPT ? D : 16, M_TILES> fragments;

  __device__ __forceinline__ LeftRows() = default;
  __device__ __forceinline__ LeftRows(const T* tile, int first_row) : tile(tile), first_row(first_row) {
    if constexpr (KEPT) load_fragments<T, D, M_TILES>(fragments, tile, first_row);
  }

  // acc = rows b^T.
  template <int N>
  __device__ __forceinline__ void multiply(float (&acc)[M_TILES][N][4], const T* b) const {
    clear(acc);
    if constexpr (KEPT) {
      scores<T, D, M_TILES, N>(acc, fragments, b);
    } else {
      scores<T, D, M_TILES, N>(acc, tile, first_row, b);
    }
  }
};

// ---- by wgmma: a warpgroup's 64 rows, 16 of each warp; under way on return

template <int TILES = 8, int N>
__device__ __forceinline__ float (&tiles_of(float (&acc)[1][N][4], int n))[TILES][4] {
  static_assert(N % TILES == 0);
  return reinterpret_cast<float(&)[TILES][4]>(acc[0][n]);
}

// Column tiles of a product: the more, the less often its left operand is read.
template <int N>
constexpr int AT_ONCE = N % 16 == 0 ? 16 : 8;

// Rows of D numbers in shared memory, where 64 columns lie behind the same rows' 64 before. Worked out once for all tiles:
// from an address it takes many instructions, which the products would wait for.
template <class T, int D>
struct Operand {
  unsigned long long bits;

  __device__ __forceinline__ explicit Operand(const T* tile)
      : bits(wgmma_operand(tile, TILE_BYTES<T, D, 8>, TILE_BYTES<T, 64, 8>)) {}

  // Eight rows after the other from `row` on, chunk after chunk from `chunk` on.
  __device__ __forceinline__ unsigned long long at(int row, int chunk) const {
    return wgmma_advance(bits, place_of<T, D>(row, chunk) * static_cast<int>(sizeof(T)));
  }

  // The rows from a multiple of eight on.
  __device__ __forceinline__ Operand from(int row) const {
    Operand rows = *this;
    rows.bits = at(row, 0);
    return rows;
  }
};

// acc = a b^T, a in registers.
template <class T, int D, int N>
__device__ __forceinline__ void begin_scores(float (&acc)[1][N][4], const Fragments<T, D, 1>& a,
                                             const Operand<T, D>& b) {
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < N; n += AT_ONCE<N>) {
    auto& sums = tiles_of<AT_ONCE<N>>(acc, n);
    wgmma_rows<T, false>(sums, a.r[0][0], b.at(8 * n, 0));
#pragma unroll
    for (int step = 1; step < D / 16; step++) wgmma_rows<T, true>(sums, a.r[0][step], b.at(8 * n, 2 * step));
  }
  wgmma_commit();
}

// The same, both in shared memory.
template <class T, int D, int N>
__device__ __forceinline__ void begin_scores(float (&acc)[1][N][4], const Operand<T, D>& a, const Operand<T, D>& b) {
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < N; n += AT_ONCE<N>) {
    auto& sums = tiles_of<AT_ONCE<N>>(acc, n);
    wgmma_rows<T, false>(sums, a.at(0, 0), b.at(8 * n, 0));
#pragma unroll
    for (int step = 1; step < D / 16; step++) wgmma_rows<T, true>(sums, a.at(0, 2 * step), b.at(8 * n, 2 * step));
  }
  wgmma_commit();
}

// First of the rows that the warpgroup multiplies, of a program of so many warps. By a shuffle, as the compiler then knows
// that it is the same for the warp, and forms operands in registers of the warp.
template <int WARPS>
__device__ __forceinline__ int warpgroup_row() {
  return WARPS > 4 ? shfl(warp_of() / 4 * 64, 0) : 0;
}

// acc is finished, and so is all but the LEFT youngest of what has begun.
template <int LEFT, int N>
__device__ __forceinline__ void finish(float (&acc)[1][N][4]) {
  wgmma_wait<LEFT>();
#pragma unroll
  for (int n = 0; n < N; n += AT_ONCE<N>) wgmma_pin(tiles_of<AT_ONCE<N>>(acc, n));
}

// The same of a program's rows, those of this warpgroup: as they are kept.
template <int WARPS, class T, int D, bool KEPT, int N>
__device__ __forceinline__ void begin_scores(float (&acc)[1][N][4], const LeftRows<T, D, 1, KEPT>& a,
                                             const Operand<T, D>& b) {
  if constexpr (KEPT) {
    begin_scores(acc, a.fragments, b);
  } else {
    begin_scores(acc, Operand<T, D>(a.tile).from(warpgroup_row<WARPS>()), b);
  }
}

// Left operand from results: columns 16 step to 16 step + 15.
template <class T, int M, int N>
__device__ __forceinline__ void pack_fragments(unsigned (&a)[M][4], const float (&p)[M][N][4], int step) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[m][2 * i] = pack2<T>(p[m][2 * step + i][0], p[m][2 * step + i][1]);
      a[m][2 * i + 1] = pack2<T>(p[m][2 * step + i][2], p[m][2 * step + i][3]);
    }
}

template <class T, int D>
__device__ __forceinline__ void load_columns(unsigned (&b)[4], const T* tile, int step, int n) {
  const int lane = lane_of();
  ldmatrix_x4_trans(b, tile + place_of<T, D>(16 * step + lane % 16, n + lane / 16));
}

// Room that a warp needs to hand float32 results among its threads.
template <int M, int N>
constexpr int STAGING = M * 16 * (8 * N + 4);

template <int M, int N>
__device__ __forceinline__ void stage(float* staging, const float (&p)[M][N][4]) {
  const int lane = lane_of();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        staging[(16 * m + lane / 4 + e / 2 * 8) * (8 * N + 4) + column_of(n, e % 2)] = p[m][n][e];
  syncwarp();
}

template <int M, int N, int NV>
__device__ __forceinline__ void multiply_staged(float (&acc)[M][NV][4], const float* staging, const float* b) {
  const int lane = lane_of();
#pragma unroll 1
  for (int key = 0; key < 8 * N; key++) {
    float p[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) p[m][i] = staging[(16 * m + lane / 4 + 8 * i) * (8 * N + 4) + key];
#pragma unroll
    for (int n = 0; n < NV; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float value = b[place_of<float, 8 * NV>(key, column_of(n, e) / 4) + column_of(n, e) % 4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) acc[m][n][2 * i + e] += p[m][i] * value;
      }
  }
  syncwarp();
}

// acc += p b, where b has a row of 8 NV numbers for each column of p.
template <class T, int M, int N, int NV>
__device__ __forceinline__ void accumulate(float (&acc)[M][NV][4], const float (&p)[M][N][4], const T* b,
                                           float* staging) {
  if constexpr (IS_HALF<T>) {
#pragma unroll
    for (int step = 0; step < N / 2; step++) {
      unsigned a[M][4];
      pack_fragments<T>(a, p, step);
#pragma unroll
      for (int n = 0; n < NV; n += 2) {
        unsigned columns[4];
        load_columns<T, 8 * NV>(columns, b, step, n);
        multiply<T>(acc, a, columns, n);
      }
    }
  } else {
    stage(staging, p);
    multiply_staged<M, N, NV>(acc, staging, b);
  }
}

// Two of them with the same b.
template <class T, int M, int N, int NV>
__device__ __forceinline__ void accumulate_both(float (&acc)[M][NV][4], float (&other_acc)[M][NV][4],
                                                const float (&p)[M][N][4], const float (&other)[M][N][4], const T* b,
                                                float* staging) {
  if constexpr (IS_HALF<T>) {
#pragma unroll
    for (int step = 0; step < N / 2; step++) {
      unsigned a[M][4], other_a[M][4];
      pack_fragments<T>(a, p, step);
      pack_fragments<T>(other_a, other, step);
#pragma unroll
      for (int n = 0; n < NV; n += 2) {
        unsigned columns[4];
        load_columns<T, 8 * NV>(columns, b, step, n);
        multiply<T>(acc, a, columns, n);
        multiply<T>(other_acc, other_a, columns, n);
      }
    }
  } else {
    accumulate<T>(acc, p, b, staging);
    accumulate<T>(other_acc, other, b, staging);
  }
}

// ---- the same by wgmma, under way on return

// Results as left operands.
template <class T, int N>
struct Packed {
  unsigned r[N / 2][1][4];
};

template <class T, int N>
__device__ __forceinline__ void pack(Packed<T, N>& packed, const float (&p)[1][N][4]) {
#pragma unroll
  for (int step = 0; step < N / 2; step++) pack_fragments<T>(packed.r[step], p, step);
}

template <class T, int N, int NV>
__device__ __forceinline__ void begin_accumulate(float (&acc)[1][NV][4], const Packed<T, N>& p,
                                                 const Operand<T, 8 * NV>& b) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < N / 2; step++)
#pragma unroll
    for (int n = 0; n < NV; n += AT_ONCE<NV>)
      wgmma_columns<T, true>(tiles_of<AT_ONCE<NV>>(acc, n), p.r[step][0], b.at(16 * step, n));
  wgmma_commit();
}
