// A few queries over many keys, forward alone. Memory is what takes time, so k is read once, for all query heads that
// share it, and v only where there is weight.
//
// The keys of a head are split over programs. Each forms the scores of its keys, and keeps of every group of keys the
// largest one alone. A program per row then has a lower bound of tau from these maxima, which are a subset of the
// scores; forms again the scores of the groups that are above it, with the same bits; finds tau from those, and gathers
// the rows of v in the support. Where there are more of them than CANDIDATES, a flag says so for all heads that share
// these keys, and the other kernels of forward do them instead.
//
// The queries of all heads that share keys are rows of one product. A group is what a thread holds of a row in it, over
// the products of a slot.
#include "entries.cuh"

constexpr int SCAN_WARPS = 4;
constexpr int GROUPS = 4 * SCAN_WARPS;  // of a product
constexpr int SLOTS = 512;              // at most
constexpr int CANDIDATES = 2048;        // groups, and keys, that a row may have above the bound
constexpr int MAX_ROW_STEPS = 64;

// What ends the steps to the bound, in units of the mean u: the next one is of the order of its square.
constexpr float BOUND_TARGET = 0.1f;

// Rows that lie anywhere: row_at(i) is where row i begins, or null where zeros shall stand.
template <class T, int D, int ROWS, int THREADS, class RowAt>
__device__ __forceinline__ void gather_tile(T* tile, const T* base, int width, bool is_aligned, RowAt&& row_at) {
#pragma unroll(COPIES)
  for (int i = threadIdx.x; i < ROWS * CHUNKS<T, D>; i += THREADS) {
    const int row = i / CHUNKS<T, D>, chunk = i % CHUNKS<T, D>, column = chunk * PER_CHUNK<T>;
    T* to = tile + place_of<T, D>(row, chunk);
    const T* from = row_at(row);
    if (is_aligned) {
      const bool is_valid = from && column < width;
      cp_async_16(to, is_valid ? from + column : base, is_valid);
    } else {
#pragma unroll 1
      for (int e = 0; e < PER_CHUNK<T>; e++)
        to[e] = from && column + e < width ? from[column + e] : from_float<T>(0.0f);
    }
  }
}

// In `maxima` the largest score of each group that a row sees, NaN where one is not finite; of the keys of one split.
template <class T, int D, int M, int KEYS, int STAGES, int PROGRAMS>
__global__ void __launch_bounds__(32 * SCAN_WARPS, PROGRAMS) entmax_attn_decode_scan(const Params params) {
  constexpr int THREADS = 32 * SCAN_WARPS;
  constexpr int ROWS = 16 * M;
  constexpr int N = KEYS / (8 * SCAN_WARPS);
  constexpr int R = 2 * M;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tiles = q_tile + ROWS * D;

  let_kernel_behind_begin();
  const int i_split = blockIdx.x % params.n_splits, i_tile = blockIdx.x / params.n_splits % params.n_row_tiles;
  const int i_unit = blockIdx.x / params.n_splits / params.n_row_tiles;
  const int i_b = i_unit / params.heads_kv, i_kv = i_unit % params.heads_kv;
  const int group = params.heads_q / params.heads_kv, n_rows = group * params.seqlen_q, first_row = i_tile * ROWS;
  const Lengths lengths = lengths_of(params, i_b);
  const T* q = head_of<T>(params.q, i_b, params.stride_qb, i_kv * group, params.stride_qh);
  const HeadRows<T> k = rows_of_k<T>(params, i_b, i_kv);
  const int row_maxima = params.n_slots * GROUPS;
  float* maxima = params.maxima + (static_cast<long long>(i_unit) * n_rows + first_row) * row_maxima;
  if (i_split == 0 && i_tile == 0 && threadIdx.x == 0) params.flags[i_unit] = 0;

  const int everyone = keys_seen(0, lengths, params.is_causal);
  const int anyone = lengths.q > 0 ? keys_seen(lengths.q - 1, lengths, params.is_causal) : 0;
  const int begin = i_split * params.split, n = min(params.split, (anyone + KEYS - 1) / KEYS - begin);
  int seen[R];
  float largest[R], rest[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    seen[i] = keys_seen((first_row + i * 8 + lane_of() / 4) % params.seqlen_q, lengths, params.is_causal);
    largest[i] = -infinity();
    rest[i] = 0;
  }
  pipeline<STAGES>(
      n, ahead_of(Itself(), [&](int i, int stage) {
        if (i == 0) {
          gather_tile<T, D, ROWS, THREADS>(q_tile, q, params.head_dim, params.aligned_q, [&](int row) {
            row += first_row;
            const T* from = q + row / params.seqlen_q * params.stride_qh + row % params.seqlen_q * params.stride_qm;
            return row < n_rows ? from : nullptr;
          });
        }
        load_tile<T, D, KEYS, THREADS, false>(k_tiles + stage * KEYS * D, k, (begin + i) * KEYS, 0, lengths.k);
      }),
      [&](int i, int stage) {
        const int j = begin + i, first = j * KEYS + warp_of() * 8 * N;
        float s[M][N][4];
        clear(s);
        scores<T, D, M, N>(s, q_tile, 0, k_tiles + (stage * KEYS + warp_of() * 8 * N) * D);
        const bool is_masked = first + 8 * N > everyone;
#pragma unroll
        for (int row = 0; row < R; row++)
#pragma unroll
          for (int column = 0; column < N; column++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const float x = s[row / 2][column][row % 2 * 2 + e] * params.sign;
              if (is_masked && first + column_of(column, e) >= seen[row]) continue;
              largest[row] = fmaxf(largest[row], x);
              rest[row] += x - x;
            }
        if (j % params.slot != params.slot - 1 && i != n - 1) return;
#pragma unroll
        for (int row = 0; row < R; row++) {
          const int of_tile = row * 8 + lane_of() / 4;
          const int at = j / params.slot * GROUPS + warp_of() * 4 + lane_of() % 4;
          if (first_row + of_tile < n_rows) maxima[of_tile * row_maxima + at] = largest[row] + rest[row];
          largest[row] = -infinity();
          rest[row] = 0;
        }
      });
}

// f = sum u ** r and g = sum u ** (r - 1) of n scores, their z and tau above that of `top`. Of the scores every thread
// has a part, or, with of_warp, every lane of each warp: fours that count up to the n-th score, and -inf behind it.
// `scratch` has room for two numbers per warp.
template <int ALPHA, int WARPS, int N>
__device__ __forceinline__ float2 sums_of(const float (&s)[N], int n, float top, float c, float tau, float r,
                                          float2* scratch, bool of_warp = false) {
  const int threads = of_warp ? 32 : 32 * WARPS;
  float2 sums{0, 0};
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i / 4 * 4 * threads >= n) break;
    float p, w;
    powers<ALPHA>(u_of(s[i] - top, c, tau), r, p, w);
    sums.x += p;
    sums.y += w;
  }
  sums = float2{warp_sum(sums.x), warp_sum(sums.y)};
  if (of_warp) return sums;
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = sums;
  __syncthreads();
  sums = float2{0, 0};
  for (int i = 0; i < WARPS; i++) {
    sums.x += scratch[i].x;
    sums.y += scratch[i].y;
  }
  return sums;
}

// This thread's part of n numbers, which are whole fours; -inf where there are none.
template <int WARPS, int N>
__device__ __forceinline__ void load_part(float (&part)[N], const float* numbers, int n) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const int at = i * 32 * WARPS + 4 * static_cast<int>(threadIdx.x);
    Vec4 four{-infinity(), -infinity(), -infinity(), -infinity()};
    if (at < n) four = *reinterpret_cast<const Vec4*>(numbers + at);
    part[i] = four.x;
    part[i + 1] = four.y;
    part[i + 2] = four.z;
    part[i + 3] = four.w;
  }
}

// Place among all n of number i of this thread's part.
template <int WARPS>
__device__ __forceinline__ int place_in_part(int i) {
  return i / 4 * 4 * 32 * WARPS + 4 * static_cast<int>(threadIdx.x) + i % 4;
}

// sums += p * a chunk of a row from `column` on; nothing from `width` on, where memory is not read.
template <class T>
__device__ __forceinline__ void add_chunk(float (&sums)[PER_CHUNK<T>], float p, const T* row, int column, int width,
                                          bool is_aligned) {
  if (is_aligned) {
    const uint4 chunk = column < width ? *reinterpret_cast<const uint4*>(row + column) : uint4{0, 0, 0, 0};
    const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (IS_HALF<T>) {
        const float2 pair = unpack2<T>(words[i]);
        sums[2 * i] += p * pair.x;
        sums[2 * i + 1] += p * pair.y;
      } else {
        sums[i] += p * __uint_as_float(words[i]);
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < PER_CHUNK<T>; e++)
      if (column + e < width) sums[e] += p * to_float<T>(row[column + e]);
  }
}

// Init, refine and output of one row. KEYS and the slots are those of the scan; BATCH keys are gathered at once.
template <class T, int D, int ALPHA, int KEYS, int BATCH, int WARPS, int STAGES, int PROGRAMS>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_decode_output(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int IN_PRODUCT = KEYS / GROUPS;  // keys of a group
  constexpr int N_MAXIMA = SLOTS * GROUPS / THREADS, N_CANDIDATES = CANDIDATES / THREADS;
  static_assert(BATCH % 16 == 0 && BATCH <= 16 * WARPS && CANDIDATES % BATCH == 0 && N_MAXIMA <= 32);
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tiles = q_tile + 16 * D;
  float* formed = reinterpret_cast<float*>(k_tiles + STAGES * BATCH * D);
  float* found = formed + CANDIDATES;
  int* keys = reinterpret_cast<int*>(found + CANDIDATES);
  unsigned short* groups = reinterpret_cast<unsigned short*>(keys + CANDIDATES);
  float* scratch = reinterpret_cast<float*>(groups + CANDIDATES);
  float2* scratch2 = reinterpret_cast<float2*>(scratch);
  int* counts = reinterpret_cast<int*>(scratch);

  wait_for_kernel_before();
  let_kernel_behind_begin();
  const long long row = blockIdx.x;
  const int i_m = blockIdx.x % params.seqlen_q, i_bh = blockIdx.x / params.seqlen_q;
  const int i_b = i_bh / params.heads_q, i_h = i_bh % params.heads_q;
  const int i_kv = i_h / (params.heads_q / params.heads_kv);
  const Lengths lengths = lengths_of(params, i_b);
  const float exponent = exponent_of(params, i_h), c = exponent * params.scale, r = 1 / exponent;
  const T* q = head_of<T>(params.q, i_b, params.stride_qb, i_h, params.stride_qh) + i_m * params.stride_qm;
  const T* k = head_of<T>(params.k, i_b, params.stride_kb, i_kv, params.stride_kh);
  const T* v = head_of<T>(params.v, i_b, params.stride_vb, i_kv, params.stride_vh);
  T* out = static_cast<T*>(params.out) + row * params.head_dim_v;
  const int seen = keys_seen(i_m, lengths, params.is_causal);
  const int n_maxima = (seen + KEYS * params.slot - 1) / (KEYS * params.slot) * GROUPS;

  gather_tile<T, D, 16, THREADS>(q_tile, q, params.head_dim, params.aligned_q,
                                 [&](int i) { return i == 0 ? q : nullptr; });
  cp_async_commit();
  float maxima[N_MAXIMA];
  load_part<WARPS>(maxima, params.maxima + row * params.n_slots * GROUPS, n_maxima);
  float largest = -infinity(), rest = 0;
#pragma unroll
  for (int i = 0; i < N_MAXIMA; i++) {
    largest = fmaxf(largest, maxima[i]);
    rest = maxima[i] != maxima[i] ? 1.0f : rest;
  }
  const float top = block_max<WARPS>(largest, scratch);
  const bool is_bad = block_max<WARPS>(rest, scratch) > 0;
  if (is_bad || seen == 0) {
    const float value = is_bad ? not_a_number() : 0.0f;
    for (int d = threadIdx.x; d < params.head_dim_v; d += THREADS) out[d] = from_float<T>(value);
    if (threadIdx.x == 0) params.tau[row] = is_bad ? not_a_number() : infinity();
    cp_async_wait<0>();
    return;
  }

  // Up to the end it is that above the largest z.
  float tau = -1;
  for (int step = 0; step < MAX_ROW_STEPS; step++) {
    const float2 sums = sums_of<ALPHA, WARPS>(maxima, n_maxima, top, c, tau, r, scratch2);
    const float change = fmaxf(newton_step<ALPHA>(sums.x, sums.y, r), 0.0f);
    tau += change;
    if (!(change * sums.y > BOUND_TARGET * sums.x)) break;
  }

  auto is_above = [&](float s) { return (s - top) * c > tau; };
  auto give_up = [&]() {
    if (threadIdx.x == 0) params.flags[i_b * params.heads_kv + i_kv] = 1;
    cp_async_wait<0>();
  };
  unsigned above = 0;
#pragma unroll
  for (int i = 0; i < N_MAXIMA; i++)
    if (is_above(maxima[i])) above |= 1u << i;
  int listed = 0, place = reserve<WARPS>(popcount(above), listed, counts);
  if (listed > CANDIDATES) return give_up();
  for (; above; above &= above - 1)
    groups[place++] = static_cast<unsigned short>(place_in_part<WARPS>(highest_bit(above & -above)));
  __syncthreads();

  // By member of the listed groups.
  const int members_bits = highest_bit(params.slot * IN_PRODUCT), n_members = listed << members_bits;
  auto key_of = [&](int member) {
    const int j = groups[member >> members_bits], i = member & ((1 << members_bits) - 1);
    return (j / GROUPS * params.slot + i / IN_PRODUCT) * KEYS + j % GROUPS / 4 * (KEYS / SCAN_WARPS) +
           i % IN_PRODUCT / 2 * 8 + j % 4 * 2 + i % 2;
  };
  int count = 0;
  for (int first = 0; first < n_members; first += CANDIDATES) {
    const int n = min(n_members - first, CANDIDATES);
    pipeline<STAGES>(
        (n + BATCH - 1) / BATCH, ahead_of(Itself(), [&](int i, int stage) {
          gather_tile<T, D, BATCH, THREADS>(k_tiles + stage * BATCH * D, k, params.head_dim, params.aligned_k,
                                            [&](int i_key) {
                                              const int member = first + i * BATCH + i_key;
                                              const int key = member < n_members ? key_of(member) : seen;
                                              return key < seen ? k + key * params.stride_kn : nullptr;
                                            });
        }),
        [&](int i, int stage) {
          if (warp_of() * 16 >= BATCH) return;
          float s[1][2][4];
          clear(s);
          scores<T, D, 1, 2>(s, q_tile, 0, k_tiles + (stage * BATCH + warp_of() * 16) * D);
          if (lane_of() >= 4) return;
#pragma unroll
          for (int column = 0; column < 2; column++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              formed[i * BATCH + warp_of() * 16 + column_of(column, e)] = s[0][column][e] * params.sign;
        });
    float part[N_CANDIDATES];
    load_part<WARPS>(part, formed, n);
    above = 0;
#pragma unroll
    for (int i = 0; i < N_CANDIDATES; i++)
      if (is_above(part[i]) && key_of(first + place_in_part<WARPS>(i)) < seen) above |= 1u << i;
    place = reserve<WARPS>(popcount(above), count, counts);
    if (count > CANDIDATES) return give_up();
    for (; above; above &= above - 1) {
      const int at = place_in_part<WARPS>(highest_bit(above & -above));
      found[place] = formed[at];
      keys[place++] = key_of(first + at);
    }
    __syncthreads();
  }

  // Then without barriers.
  const bool are_few = count <= 32 * N_CANDIDATES;
  float candidates[N_CANDIDATES];
#pragma unroll
  for (int i = 0; i < N_CANDIDATES; i++) {
    const int at = are_few ? i * 32 + lane_of() : i * THREADS + static_cast<int>(threadIdx.x);
    candidates[i] = at < count ? found[at] : -infinity();
  }
  for (int step = 0; step < MAX_ROW_STEPS; step++) {
    const float2 sums = sums_of<ALPHA, WARPS>(candidates, count, top, c, tau, r, scratch2, are_few);
    const float change = newton_step<ALPHA>(sums.x, sums.y, r);
    // Below the rounding of u it is noise.
    if (!(fabsf(change) > 1.2e-7f)) break;
    tau += change;
  }

  constexpr int LANES = CHUNKS<T, D> < 32 ? CHUNKS<T, D> : 32;  // of a row of v
  constexpr int PARTS = CHUNKS<T, D> / LANES;
  float sums[PARTS][PER_CHUNK<T>] = {};
  const int column = lane_of() % LANES * PER_CHUNK<T>;
  auto add_rows = [&](bool is_aligned) {
#pragma unroll 4
    for (int i = threadIdx.x / LANES; i < count; i += THREADS / LANES) {
      float p, w;
      powers<ALPHA>(u_of(found[i] - top, c, tau), r, p, w);
      const T* from = v + keys[i] * params.stride_vn;
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        add_chunk<T>(sums[part], p, from, column + part * LANES * PER_CHUNK<T>, p > 0 ? params.head_dim_v : 0,
                     is_aligned);
    }
  };
  if (params.aligned_v) {
    add_rows(true);
  } else {
    add_rows(false);
  }
  float* shared_sums = reinterpret_cast<float*>(k_tiles) + warp_of() * D;
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int e = 0; e < PER_CHUNK<T>; e++) {
      float& sum = sums[part][e];
#pragma unroll
      for (int mask = LANES; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
      if (lane_of() < LANES) shared_sums[column + part * LANES * PER_CHUNK<T> + e] = sum;
    }
  __syncthreads();
  for (int d = threadIdx.x; d < params.head_dim_v; d += THREADS) {
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += reinterpret_cast<const float*>(k_tiles)[i * D + d];
    out[d] = from_float<T>(sum);
  }
  if (threadIdx.x == 0) params.tau[row] = tau + top * c;
}
