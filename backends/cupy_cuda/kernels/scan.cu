// Scan and init: all scores once, a lower bound of tau for each row, and the list of blocks above it.
#include "products.cuh"

// 0 if the numbers of a chunk are finite, else NaN.
template <class T>
__device__ __forceinline__ float rest_of(uint4 chunk) {
  const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  float rest = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (IS_HALF<T>) {
      const float2 pair = unpack2<T>(words[i]);
      rest += (pair.x - pair.x) + (pair.y - pair.y);
    } else {
      rest += __uint_as_float(words[i]) - __uint_as_float(words[i]);
    }
  }
  return rest;
}

constexpr int CHECK_THREADS = 128;

// The first key that is not finite in each chunk of KEYS_PER_CHECK keys, or seqlen_k. Eight threads take a row; a
// program every n_checks-th chunk of a head.
template <class T>
__global__ void __launch_bounds__(CHECK_THREADS, 8) entmax_attn_check_keys(const Params params) {
  constexpr int STEP = CHECK_THREADS / 8, ROWS = KEYS_PER_CHECK / STEP;
  extern __shared__ __align__(128) unsigned char smem[];
  wait_for_kernel_before();
  let_kernel_behind_begin();
  const int i_bh = blockIdx.x / params.n_checks, i_b = i_bh / params.heads_kv;
  if (!is_asked_for(params, i_b, i_bh % params.heads_kv)) return;
  const int len_k = lengths_of(params, i_b).k;
  const T* base = head_of<T>(params.k, i_b, params.stride_kb, i_bh % params.heads_kv, params.stride_kh);
  for (int i_chunk = blockIdx.x % params.n_checks; i_chunk < params.n_chunks; i_chunk += params.n_checks) {
    const int first_row = i_chunk * KEYS_PER_CHECK + static_cast<int>(threadIdx.x) / 8;
    unsigned bad = 0;  // a bit for each of this thread's rows
    for (int column = threadIdx.x % 8 * PER_CHUNK<T>; column < params.head_dim; column += 8 * PER_CHUNK<T>) {
      const T* from = base + first_row * params.stride_kn + column;
      if (params.aligned_k) {
        uint4 chunks[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          chunks[i] = first_row + i * STEP < len_k ? *reinterpret_cast<const uint4*>(from + i * STEP * params.stride_kn)
                                                   : uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          if (rest_of<T>(chunks[i]) != 0) bad |= 1u << i;
      } else {
#pragma unroll 1
        for (int i = 0; first_row + i * STEP < len_k && i < ROWS; i++)
#pragma unroll 1
          for (int e = 0; e < PER_CHUNK<T> && column + e < params.head_dim; e++) {
            const float x = to_float<T>(from[i * STEP * params.stride_kn + e]);
            if (x - x != 0) bad |= 1u << i;
          }
      }
    }
    // Rows are few enough for a float to count them from the chunk's start.
    float first = KEYS_PER_CHECK;
    for (int i = ROWS - 1; i >= 0; i--)
      if (bad >> i & 1) first = static_cast<float>(threadIdx.x / 8 + i * STEP);
    first = -block_max<CHECK_THREADS / 32>(-first, reinterpret_cast<float*>(smem));
    if (threadIdx.x == 0) {
      params.first_bad[static_cast<long long>(i_bh) * params.n_chunks + i_chunk] =
          first < KEYS_PER_CHECK ? i_chunk * KEYS_PER_CHECK + static_cast<int>(first) : params.seqlen_k;
    }
  }
}

// Of the tile's head: the first key that is not finite, or seqlen_k.
__device__ __forceinline__ int first_bad_key(const Params& params, const QueryTile& tile) {
  const int* of_chunks =
      params.first_bad + static_cast<long long>(tile.i_b * params.heads_kv + tile.i_kv) * params.n_chunks;
  int first = params.seqlen_k;
  for (int i = lane_of(); i < params.n_chunks; i += 32) first = min(first, of_chunks[i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) first = min(first, shfl_xor(first, mask));
  return first;
}

// How many maxima of groups of keys a thread keeps for each of its rows, and after how many keys the bound is raised.
constexpr int KEPT = 4;
constexpr int BOUND_EVERY = 1024;

// The larger one. Numbers that are not negative have the order of their bits, and of integers the compiler takes the
// larger of three at once; of two negative numbers it may be the smaller one then.
template <bool POSITIVE>
__device__ __forceinline__ float larger(float x, float y) {
  if constexpr (POSITIVE) return __int_as_float(max(__float_as_int(x), __float_as_int(y)));
  return fmaxf(x, y);
}

// The largest scores of each row in each of BLOCKS blocks.
template <bool POSITIVE, int BLOCKS, int M, int N>
__device__ __forceinline__ void maxima(float (&largest)[BLOCKS][2 * M], const float (&s)[M][N][4]) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int row = 0; row < 2 * M; row++) {
      float& maximum = largest[block][row];
      maximum = -infinity();
#pragma unroll
      for (int n = 0; n < N / BLOCKS; n++) {
        const float* pair = s[row / 2][block * (N / BLOCKS) + n] + row % 2 * 2;
        maximum = larger<POSITIVE>(larger<POSITIVE>(maximum, pair[0]), pair[1]);
      }
    }
}

// One Newton step towards tau of the kept maxima, a subset of the scores: a lower bound of tau.
template <int ALPHA>
__device__ __forceinline__ float raise_by_maxima(float tau, const float (&kept)[KEPT], float c, float r) {
  float f = 0, g = 0;
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    float p, w;
    powers<ALPHA>(u_of(kept[i], c, tau), r, p, w);
    f += p;
    g += w;
  }
  return tau + fmaxf(newton_step<ALPHA>(quad_sum(f), quad_sum(g), r), 0.0f);
}

// tau of the histogram of a row's kept maxima on [max z - 1, max z], which count at the lower edges of their bins: a
// lower bound of tau. `bins` are the row's own.
template <int ALPHA>
__device__ __forceinline__ float bound_by_histogram(int* bins, const float (&kept)[KEPT], float c, float r) {
  const float low = quad_max(kept[0]) * c - 1;
#pragma unroll
  for (int i = 0; i < BINS / 4; i++) bins[lane_of() % 4 * (BINS / 4) + i] = 0;
  syncwarp();
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const float at = kept[i] * c - low;
    if (at >= 0) atomic_add(bins + min(static_cast<int>(at * BINS), BINS - 1), 1);
  }
  syncwarp();
  float shift = 0;
  for (int step = 0; step < INIT_STEPS + 2; step++) {
    float f = 0, g = 0;
#pragma unroll
    for (int i = 0; i < BINS / 4; i++) {
      const int bin = lane_of() % 4 * (BINS / 4) + i;
      float p, w;
      powers<ALPHA>(u_of(static_cast<float>(bin), 1.0f / BINS, shift), r, p, w);
      f += bins[bin] * p;
      g += bins[bin] * w;
    }
    shift += fmaxf(newton_step<ALPHA>(quad_sum(f), quad_sum(g), r), 0.0f);
  }
  return low + shift;
}

// Of each row the KEPT largest maxima of each of four interleaved sets of keys stay in registers. tau of that subset of
// the scores, raised on the way, is the bound that later blocks must pass.
template <class T, int D, int ALPHA, bool HISTOGRAM, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES,
          int PROGRAMS, bool WGMMA, bool BULK>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_fwd_scan(const __grid_constant__ Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = BLOCK_M / (16 * WARPS);
  constexpr int R = 2 * M;
  constexpr bool IN_REGISTERS = IS_HALF<T> && D <= 128 && D * KEYS <= 8192;
  constexpr int BLOCKS = KEYS / BLOCK_N;
  // Without wgmma, one half of the keys after the other: that leaves registers for more programs.
  constexpr int PARTS = !WGMMA && IS_HALF<T> && BLOCKS == 1 ? 2 : 1;
  constexpr int PART = KEYS / PARTS;
  constexpr int N = PART / 8;
  constexpr int RING = STAGES * KEYS * D;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  // Queries that went to registers leave their place to the keys.
  T* k_tiles = IN_REGISTERS ? q_tile : q_tile + BLOCK_M * D;
  float* scratch = reinterpret_cast<float*>(k_tiles + (IN_REGISTERS && RING < BLOCK_M * D ? BLOCK_M * D : RING));

  let_kernel_behind_begin();
  const QueryTile tile = query_tile<BLOCK_M>(params);
  if (!is_asked_for(params, tile.i_b, tile.i_kv)) return wait_for_kernel_before();
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const HeadRows<T> q = rows_of_q<T>(params, tile.i_b, tile.i_h), k = rows_of_k<T>(params, tile.i_b, tile.i_kv);
  const Arrivals<BULK> arrivals(scratch);
  const long long words_per_tile = (params.n_blocks + WORD - 1) / WORD;
  unsigned* words = params.words + tile.index * words_per_tile;
  int* list = params.list + tile.index * params.n_blocks;

  load_tile<T, D, BLOCK_M, THREADS>(q_tile, q, tile.first, 0, params.seqlen_q);
  cp_async_commit();
  fill<THREADS>(words, static_cast<int>(words_per_tile), 0u);
  cp_async_wait<0>();
  __syncthreads();
  apply_sign<T, D, BLOCK_M, THREADS>(q_tile, params.sign);

  float tau[R], kept[R][KEPT];
  unsigned bad = 0;  // a bit for each of this thread's rows, at first of those with a bad query
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = row_of<M>(i);
    const int seen = keys_seen(tile.first + row, tile.lengths, params.is_causal);
    float rest = 0;
    for (int n = 0; n < D / 8; n++)
      for (int e = 0; e < 2; e++) {
        const float x = to_float<T>(element<T, D>(q_tile, row, column_of(n, e)));
        rest += x - x;
      }
    rest = quad_sum(rest);
    if (seen > 0 && rest != 0) bad |= 1u << i;
    // Rows without keys take no part: nothing is above +inf.
    tau[i] = seen > 0 ? -infinity() : infinity();
#pragma unroll
    for (int j = 0; j < KEPT; j++) kept[i][j] = -infinity();
  }
  const LeftRows<T, D, M, IN_REGISTERS> queries(q_tile, warp_of() * 16 * M);
  if constexpr (IN_REGISTERS) __syncthreads();

  // Steps of KEYS keys. Those that hold the diagonal, or the end of the keys, first: where attention is local, they give
  // the bound.
  const int n_whole = tile.everyone / KEYS;
  const int n_seen = (tile.anyone + KEYS - 1) / KEYS;
  const int n_masked = n_seen - n_whole;
  const int nearest = params.is_causal ? n_whole - 1 : min(tile.first / KEYS, n_whole - 1);
  auto step_of = [&](int i) {
    if (i < n_masked) return n_whole + i;
    const int step = nearest - (i - n_masked);
    return step < 0 ? step + n_whole : step;
  };
  float largest[BLOCKS][R];
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int row = 0; row < R; row++) largest[block][row] = -infinity();
  bool is_positive = false;  // the bound of each row of the warp: scores below 0 do not count then
  // Of a step's scores from its key `first` on.
  auto take_maxima = [&](float(&largest)[BLOCKS][R], float(&s)[M][N][4], int i, int first) {
    if (i < n_masked) mask_scores<M, N>(s, tile.first, step_of(i) * KEYS + first, tile.lengths, params.is_causal);
    if (is_positive) {
      maxima<true>(largest, s);
    } else {
      maxima<false>(largest, s);
    }
  };
  bool has_news = false;  // for the bound
  auto use_maxima = [&](int i) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      bool is_above = false;
#pragma unroll
      for (int row = 0; row < R; row++) is_above |= largest[block][row] * c > tau[row];
      // What lies below the bound has no part in it.
      if (any_sync(is_above)) {
        const int j = step_of(i) * BLOCKS + block;
        if (lane_of() == 0) atomic_or(words + j / WORD, 1u << (j % WORD));
        has_news = true;
#pragma unroll
        for (int row = 0; row < R; row++)
#pragma unroll
          for (int place = 0; place < KEPT; place++) {
            const float smaller = fminf(kept[row][place], largest[block][row]);
            kept[row][place] = fmaxf(kept[row][place], largest[block][row]);
            largest[block][row] = smaller;
          }
      }
    }
    if (has_news && (i % (BOUND_EVERY / KEYS) == 0 || i < n_masked)) {
      has_news = false;
      bool has_negative = false;
#pragma unroll
      for (int row = 0; row < R; row++) {
        tau[row] = fmaxf(tau[row], quad_max(kept[row][0]) * c - 1);
        tau[row] = raise_by_maxima<ALPHA>(tau[row], kept[row], c, r);
        has_negative |= tau[row] < 0;
      }
      is_positive = !any_sync(has_negative);
    }
  };
  const TileLoader<T, D, KEYS, THREADS> keys_loader(k_tiles, k, 0, tile.lengths.k);
  auto place = [&](int i) { return step_of(i) * KEYS; };
  auto load = [&](int first, int stage) { arrivals.load(stage, {first}, keys_loader); };
  auto ahead = ahead_of(arrivals, place, load);
  auto take_keys = [&](int i, int stage) {
    if constexpr (WGMMA) {
      float s[M][N][4];
      const Operand<T, D> keys = Operand<T, D>(k_tiles).from(stage * KEYS);
      begin_scores<WARPS>(s, queries, keys);
      // The product goes on meanwhile.
      ahead.ask();
      use_maxima(i - 1);
      finish<0>(s);
      take_maxima(largest, s, i, 0);
    } else {
      float of_parts[PARTS][BLOCKS][R];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        float s[M][N][4];
        queries.multiply(s, k_tiles + (stage * KEYS + part * PART) * D);
        take_maxima(of_parts[part], s, i, part * PART);
      }
#pragma unroll
      for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int row = 0; row < R; row++)
          largest[block][row] = fmaxf(of_parts[0][block][row], of_parts[PARTS - 1][block][row]);
      use_maxima(i);
    }
  };
  pipeline<STAGES, WGMMA>(n_seen, ahead, take_keys);
  if constexpr (WGMMA) use_maxima(n_seen - 1);

  // All keys were read meanwhile.
  wait_for_kernel_before();
  const int first_bad = first_bad_key(params, tile);
  int* bins = reinterpret_cast<int*>(smem);
  // Where a tile sees no key, no loop has come between this and the reads of the queries.
  if constexpr (HISTOGRAM) __syncthreads();
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = row_of<M>(i);
    const int seen = keys_seen(tile.first + row, tile.lengths, params.is_causal);
    if (seen > first_bad) bad |= 1u << i;
    if constexpr (HISTOGRAM) {
      tau[i] = bound_by_histogram<ALPHA>(bins + row * BINS, kept[i], c, r);
    } else {
      tau[i] = fmaxf(tau[i], quad_max(kept[i][0]) * c - 1);
      for (int step = 0; step < INIT_STEPS; step++) tau[i] = raise_by_maxima<ALPHA>(tau[i], kept[i], c, r);
    }
    if (seen == 0) tau[i] = infinity();
    if (bad >> i & 1) tau[i] = not_a_number();
    if (lane_of() % 4 == 0 && tile.first + row < params.seqlen_q) params.tau[tile.row + tile.first + row] = tau[i];
  }
  const bool has_bad = block_max<WARPS>(bad != 0 ? 1.0f : 0.0f, scratch) > 0;
  const int n_listed = (tile.anyone + BLOCK_N - 1) / BLOCK_N;
  int count = 0;
  for (int first = 0; first < n_listed; first += THREADS) {
    const int j = first + static_cast<int>(threadIdx.x);
    const bool is_listed = j < n_listed && (has_bad || bit_of(words, j));
    const int at = compact<WARPS>(is_listed, count, reinterpret_cast<int*>(scratch));
    if (is_listed) list[at] = j;
  }
  if (threadIdx.x == 0) params.counts[tile.index] = count;
}
