// Refine over the listed blocks: tau nearly at its end, and the blocks that still hold support then. Where support is
// few entries in many blocks, the entries are listed instead of the blocks, and give tau and out at once.
#include "entries.cuh"
#include "products.cuh"

constexpr int MAX_STEPS = 16;

// The entries above the bound of tau that a warp has room for, on the 16 rows of the tile that are its own.
constexpr int WARP_ENTRIES = 1024;
// More than so many in a block cost more one by one than the block does.
constexpr int ENTRIES_PER_BLOCK = 96;
// What a warp may have more than that, for the blocks that it begins with.
constexpr int SPARE_ENTRIES = 128;

struct alignas(8) Entry {
  static constexpr int KEY_BITS = 28;
  float score;
  unsigned row_and_key;

  __device__ __forceinline__ int row() const { return static_cast<int>(row_and_key >> KEY_BITS); }
  __device__ __forceinline__ int key() const { return static_cast<int>(row_and_key & ((1u << KEY_BITS) - 1)); }
};

// Exclusive, over each half of a warp.
__device__ __forceinline__ int sum_of_lanes_before(int value) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
    const int before = shfl(sum, max(lane_of() - step, 0));
    sum += lane_of() % 16 >= step ? before : 0;
  }
  return sum - value;
}

// Puts the places of a warp's entries in order of their rows, otherwise as they are: of row `lane % 16`, first and last.
struct RowRange {
  int first, last;
};

__device__ __forceinline__ RowRange order_by_row(unsigned short* order, const Entry* entries, int n) {
  constexpr int ROW_BITS = 4;
  unsigned votes[ROW_BITS], valid = 0;
  int row = 0;
  auto vote = [&](int first) {
    const int i = first + lane_of();
    row = i < n ? entries[i].row() : 0;
    valid = ballot(i < n);
#pragma unroll
    for (int bit = 0; bit < ROW_BITS; bit++) votes[bit] = ballot(row >> bit & 1);
  };
  auto lanes_with = [&](int row) {
    unsigned lanes = valid;
#pragma unroll
    for (int bit = 0; bit < ROW_BITS; bit++) lanes &= row >> bit & 1 ? votes[bit] : ~votes[bit];
    return lanes;
  };
  int size = 0;
  for (int first = 0; first < n; first += 32) {
    vote(first);
    size += popcount(lanes_with(lane_of() % 16));
  }
  RowRange range;
  range.first = range.last = sum_of_lanes_before(size);
  for (int first = 0; first < n; first += 32) {
    vote(first);
    const int at = shfl(range.last, row) + popcount(lanes_with(row) & lanes_before());
    if (first + lane_of() < n) order[at] = static_cast<unsigned short>(first + lane_of());
    range.last += popcount(lanes_with(lane_of() % 16));
  }
  syncwarp();
  return range;
}

// sums += weight * row, of the rows that the lanes' keys name and their weights: groups of LANES lanes take a row each.
template <class T, int LANES>
__device__ __forceinline__ void add_rows(float (&sums)[8], const T* base, long long stride, int width, bool is_aligned,
                                         int key, float weight, int n) {
  const int group = lane_of() / LANES * LANES, channel = lane_of() % LANES * 8;
  // Rolled, because more loads under way would need as many registers.
#pragma unroll 1
  for (int from = 0; from < LANES; from += 8) {
    Channels<8> rows[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const T* row = base + shfl(key, group + from + i) * stride;
      rows[i] = group + from + i < n ? load_channels<T, 8>(row, channel, width, is_aligned) : Channels<8>{};
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float factor = shfl(weight, group + from + i);
      float x[8];
      unpack_channels<T>(x, rows[i]);
#pragma unroll
      for (int e = 0; e < 8; e++) sums[e] += factor * x[e];
    }
  }
}

// The sums of all groups, times factor.
template <class T, int LANES>
__device__ __forceinline__ void store_row(T* row, float (&sums)[8], float factor, int width) {
  int column = lane_of() % LANES * 8 + lane_of() / 16 * 4;
  fold<4>(sums, 16);
  if constexpr (LANES == 8) {
    fold<2>(sums, 8);
    column += lane_of() / 8 % 2 * 2;
  }
#pragma unroll
  for (int i = 0; i < LANES / 4; i += 2) store_pair(row, column + i, width, sums[i] * factor, sums[i + 1] * factor);
}

// tau and out of a tile from the n entries that this warp has of its rows; false, and nothing has changed, if there is
// no room to leave them for backward.
template <class T, int D, int ALPHA, int BLOCK_M, int BLOCK_N, int WARPS>
__device__ __forceinline__ bool attend_by_entries(const Params& params, const QueryTile& tile, const Entry* entries,
                                                  unsigned short* order, int n, float* scratch) {
  constexpr int ROWS = BLOCK_M / WARPS;
  static_assert(ROWS == 16);
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const int first_row = warp_of() * ROWS;
  const RowRange range = order_by_row(order, entries, n);

  // Two lanes to a row.
  const int row = tile.first + first_row + lane_of() / 2;
  const RowRange own{shfl(range.first, lane_of() / 2), shfl(range.last, lane_of() / 2)};
  float tau = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
  for (int step = 0; step < MAX_STEPS; step++) {
    float f = 0, g = 0;
    for (int i = own.first + lane_of() % 2; i < own.last; i += 2) {
      float p, w;
      powers<ALPHA>(fmaxf(entries[order[i]].score * c - tau, 0.0f), r, p, w);
      f += p;
      g += w;
    }
    f += shfl_xor(f, 1);
    g += shfl_xor(g, 1);
    const float change = newton_step<ALPHA>(f, g, r);
    tau += change;
    // Below the rounding of u it is noise.
    if (!any_sync(change > 1e-6f)) break;
  }
  int size = 0;
  for (int i = own.first + lane_of() % 2; i < own.last; i += 2) size += entries[order[i]].score * c - tau > 0;
  size += shfl_xor(size, 1);
  size = shfl(size, lane_of() % 16 * 2);  // of row lane % 16, as range
  int* totals = reinterpret_cast<int*>(scratch);
  const int before = sum_of_lanes_before(size);
  int start = before, total = 0;
  __syncthreads();
  if (lane_of() == ROWS - 1) totals[warp_of()] = before + size;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) {
    start += i < warp_of() ? totals[i] : 0;
    total += totals[i];
  }
  const bool is_saved = params.out1 != nullptr;
  const EntryList saved = entry_list<BLOCK_M>(params.out1, params, tile.row, tile.first);
  // Without a backward pass too, so that out has the same bits.
  if (total > saved.capacity) return false;
  signed char* live = params.live + tile.index * params.n_blocks;
  if (is_saved) {
    if (lane_of() < ROWS) saved.starts()[first_row + lane_of()] = static_cast<unsigned short>(start);
    if (threadIdx.x == 0) saved.starts()[BLOCK_M] = static_cast<unsigned short>(total);
  }
  if (lane_of() % 2 == 0 && row < params.seqlen_q) params.tau[tile.row + row] = tau;

  const T* v = head_of<T>(params.v, tile.i_b, params.stride_vb, tile.i_kv, params.stride_vh);
#pragma unroll 1
  for (int i_row = 0; i_row < ROWS && tile.first + first_row + i_row < params.seqlen_q; i_row++) {
    const int first = shfl(range.first, i_row), last = shfl(range.last, i_row);
    const float row_tau = shfl(tau, 2 * i_row);
    int to = shfl(start, i_row);
    float out[8] = {};
#pragma unroll 1
    for (int at = first; at < last; at += 32) {
      const bool is_entry = at + lane_of() < last;
      const Entry entry = entries[order[is_entry ? at + lane_of() : first]];
      const float u = is_entry ? fmaxf(entry.score * c - row_tau, 0.0f) : 0.0f;
      float p, w;
      powers<ALPHA>(u, r, p, w);
      const unsigned support = ballot(u > 0);
      if (is_saved && u > 0) {
        const int place = to + popcount(support & lanes_before());
        saved.keys()[place] = entry.key();
        saved.us()[place] = quantise(u);
        live[entry.key() / BLOCK_N] = HAS_ENTRIES;
      }
      to += popcount(support);
      add_rows<T, D / 8>(out, v, params.stride_vn, params.head_dim_v, params.aligned_v, entry.key(), p, last - at);
    }
    T* out_row = static_cast<T*>(params.out) + (tile.row + tile.first + first_row + i_row) * params.head_dim_v;
    store_row<T, D / 8>(out_row, out, 1.0f, params.head_dim_v);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (is_saved) live[0] |= ENTRY_TILE;
    params.counts[tile.index] = -1;
  }
  return true;
}

// Adds this thread's p to f and its w to g, of each row, from the scores; whether it has support among them.
template <int ALPHA, int M, int N>
__device__ __forceinline__ bool add_weights(float (&f)[2 * M], float (&g)[2 * M], const float (&s)[M][N][4],
                                               const float (&tau)[2 * M], float c, float r) {
  bool has_support = false;
#pragma unroll
  for (int row = 0; row < 2 * M; row++) {
    float added = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float p, w;
        powers<ALPHA>(fmaxf(s[row / 2][n][row % 2 * 2 + e] * c - tau[row], 0.0f), r, p, w);
        f[row] += p;
        added += w;
      }
    g[row] += added;
    has_support |= added > 0;
  }
  return has_support;
}

// Newton steps are taken until the next one is expected to be below `target`; output.cu takes that one. KEYS keys are
// multiplied at once.
template <class T, int D, int ALPHA, bool ENTRIES, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES,
          int PROGRAMS, bool WGMMA>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_fwd_refine(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = BLOCK_M / (16 * WARPS);
  constexpr int N = KEYS / 8;
  constexpr int R = 2 * M;
  constexpr int RING = STAGES * BLOCK_N * D;
  static_assert((!WGMMA || KEYS == BLOCK_N) && (!ENTRIES || (WGMMA && M == 1)));
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  // Queries that went to registers leave their place to the keys.
  T* k_tiles = WGMMA ? q_tile : q_tile + BLOCK_M * D;
  float* scratch = reinterpret_cast<float*>(k_tiles + (WGMMA && RING < BLOCK_M * D ? BLOCK_M * D : RING));

  const QueryTile tile = query_tile<BLOCK_M>(params);
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const T* q = head_of<T>(params.q, tile.i_b, params.stride_qb, tile.i_h, params.stride_qh);
  const T* k = head_of<T>(params.k, tile.i_b, params.stride_kb, tile.i_kv, params.stride_kh);
  const int words_per_tile = (params.n_blocks + WORD - 1) / WORD;
  unsigned* words = params.words + tile.index * words_per_tile;
  int* list = params.list + tile.index * params.n_blocks;
  int count = params.counts[tile.index];
  const int n_whole = tile.everyone / BLOCK_N;

  load_tile<T, D, BLOCK_M, THREADS>(q_tile, q, tile.first, 0, params.seqlen_q, params.stride_qm, params.head_dim,
                                    params.aligned_q);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  apply_sign<T, D, BLOCK_M, THREADS>(q_tile, params.sign);

  if (params.live) fill<THREADS, signed char>(params.live + tile.index * params.n_blocks, params.n_blocks, 0);

  // A row whose tau is NaN has no u above 0: fmaxf takes the other number.
  float tau[R], f[R], g[R];
  bool has_bad = false;
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
    has_bad |= tau[i] != tau[i];
  }
  Fragments<T, D, M> fragments;
  if constexpr (WGMMA) load_fragments<T, D, M>(fragments, q_tile, warp_of() * 16 * M);
  has_bad = block_max<WARPS>(has_bad ? 1.0f : 0.0f, scratch) > 0;

  auto load_keys = [&](int i, int stage) {
    load_tile<T, D, BLOCK_N, THREADS>(k_tiles + stage * BLOCK_N * D, k, list[i] * BLOCK_N, 0, tile.lengths.k,
                                      params.stride_kn, params.head_dim, params.aligned_k);
  };
  auto mask = [&](float(&s)[M][N][4], int j, int first) {
    if (j >= n_whole) mask_scores<M, N>(s, tile.first, j * BLOCK_N + first, tile.lengths, params.is_causal);
  };
  if constexpr (ENTRIES) {
    Entry* entries = reinterpret_cast<Entry*>(scratch + 32) + warp_of() * WARP_ENTRIES;
    unsigned* has_many = reinterpret_cast<unsigned*>(scratch) + 16;  // for four iterations in turn
    int n = 0, n_steps = params.by_entries && !has_bad ? count : 0;
    if (threadIdx.x < 4) has_many[threadIdx.x] = 0;
    __syncthreads();
    pipeline<STAGES, true>(n_steps, load_keys, [&](int i, int stage) {
      float s[M][N][4];
      begin_scores<T, D, N>(s, fragments, k_tiles + stage * BLOCK_N * D);
      finish<0>(s);
      mask(s, list[i], 0);
      const unsigned first_key = list[i] * BLOCK_N | static_cast<unsigned>(lane_of() / 4) << Entry::KEY_BITS;
#pragma unroll
      for (int column = 0; column < N; column++) {
        float u[4];
#pragma unroll
        for (int e = 0; e < 4; e++) u[e] = s[0][column][e] * c - tau[e / 2];
        if (!any_sync(fmaxf(fmaxf(u[0], u[1]), fmaxf(u[2], u[3])) > 0)) continue;
#pragma unroll
        for (int row = 0; row < R; row++) {
          // In order of the keys.
          const unsigned first = ballot(u[2 * row] > 0), second = ballot(u[2 * row + 1] > 0);
          int at = n + popcount(first & lanes_before()) + popcount(second & lanes_before());
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if (!(u[2 * row + e] > 0) || at >= WARP_ENTRIES) continue;
            const unsigned row_and_key = first_key + (column_of(column, e) | row * 8u << Entry::KEY_BITS);
            entries[at++] = Entry{s[0][column][2 * row + e], row_and_key};
          }
          n += popcount(first) + popcount(second);
        }
      }
      if (n > min(WARP_ENTRIES, SPARE_ENTRIES + ENTRIES_PER_BLOCK * 2 / WARPS * (i + 1)) && lane_of() == 0)
        atomic_or(has_many + i % 4, 1u);
      if (has_many[(i + 3) % 4]) n_steps = 0;
    });
    const bool has_room = block_max<WARPS>(static_cast<float>(n), scratch) <= WARP_ENTRIES;
    const float n_all = block_sum<WARPS>(lane_of() == 0 ? static_cast<float>(n) : 0.0f, scratch);
    if (n_steps > 0 && has_room && n_all <= static_cast<float>(ENTRIES_PER_BLOCK) * count) {
      unsigned short* order = reinterpret_cast<unsigned short*>(smem) + warp_of() * WARP_ENTRIES;
      if (attend_by_entries<T, D, ALPHA, BLOCK_M, BLOCK_N, WARPS>(params, tile, entries, order, n, scratch)) return;
    }
  }

  // In units of the mean u, f / g. After a step d the next is of order d ** 2 for r >= 2, and of order d ** r below.
  const float tolerance =
      exp2f(log2f(params.target) * fmaxf(0.5f, tile.exponent)) * fminf(2 * tile.exponent, 1.0f);
  float largest = 2 * tolerance;
  for (int step = 0; step < MAX_STEPS && largest > tolerance; step++) {
#pragma unroll
    for (int row = 0; row < R; row++) f[row] = g[row] = 0;
    fill<THREADS>(words, words_per_tile, 0u);
    __syncthreads();
    pipeline<STAGES, WGMMA>(count, load_keys, [&](int i, int stage) {
      bool has_support = false;
#pragma unroll 1
      for (int first = 0; first < BLOCK_N; first += KEYS) {
        float s[M][N][4];
        const T* keys = k_tiles + (stage * BLOCK_N + first) * D;
        if constexpr (WGMMA) {
          begin_scores<T, D, N>(s, fragments, keys);
          finish<0>(s);
        } else {
          clear(s);
          scores<T, D, M, N>(s, q_tile, warp_of() * 16 * M, keys);
        }
        mask(s, list[i], first);
        has_support |= add_weights<ALPHA>(f, g, s, tau, c, r);
      }
      mark(words, i, has_support);
    });
    quad_sums(f, g);
    if (step == 0 && !has_bad) {
      int n_kept = 0;
      for (int first = 0; first < count; first += THREADS) {
        const int i = first + static_cast<int>(threadIdx.x);
        const bool is_kept = i < count && bit_of(words, i);
        const int j = i < count ? list[i] : 0;
        const int at = compact<WARPS>(is_kept, n_kept, reinterpret_cast<int*>(scratch));
        if (is_kept) list[at] = j;
      }
      count = n_kept;
      __syncthreads();
    }
    float relative = 0;
#pragma unroll
    for (int row = 0; row < R; row++) {
      const float change = newton_step<ALPHA>(f[row], g[row], r);
      tau[row] += change;
      relative = fmaxf(relative, f[row] > 0 ? change * g[row] / f[row] : 0.0f);
    }
    largest = block_max<WARPS>(relative, scratch);
  }
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    if (lane_of() % 4 == 0 && row < params.seqlen_q) params.tau[tile.row + row] = tau[i];
  }
  if (threadIdx.x == 0) params.counts[tile.index] = count;
}
