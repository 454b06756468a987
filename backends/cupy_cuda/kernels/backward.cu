// dq and dkv over the blocks that hold support, and the support itself.
#include "entries.cuh"
#include "products.cuh"

// delta = sum w dp / sum w per row, dq, and with DALPHA the gradient of alpha per row, whose sums need more registers.
//
// In general the sums take a pass of their own over the blocks. With ONE_PASS, for alpha up to 1.5, dp is taken less
// dout . out: delta is that and rest = sum w dp / sum w, and dq = sum w dp k - rest sum w k. Triton's kernel has the proof
// that rounding w dp and w costs no more than rounding ds.
template <class T, int D, int ALPHA, bool DALPHA, bool ONE_PASS, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS,
          int STAGES, int PROGRAMS, bool WGMMA, bool BULK>
__global__ void __launch_bounds__(32 * WARPS, WGMMA && DALPHA ? 1 : PROGRAMS)
    entmax_attn_bwd_dq(const __grid_constant__ Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = 1;
  constexpr int ROWS = 16 * WARPS;
  constexpr int N = KEYS / 8;
  constexpr int ND = D / 8;
  constexpr int R = 2 * M;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* dout_tile = q_tile + ROWS * D;
  T* k_tiles = dout_tile + ROWS * D;
  T* v_tiles = k_tiles + STAGES * BLOCK_N * D;
  int* scratch = reinterpret_cast<int*>(v_tiles + STAGES * BLOCK_N * D);
  int* list = scratch + 32;
  float* staging = reinterpret_cast<float*>(list + LIST_ENTRIES) + warp_of() * STAGING<M, N>;

  constexpr int PARTS = BLOCK_M / ROWS;
  let_kernel_behind_begin();
  const QueryTile tile = query_tile<BLOCK_M, PARTS>(params, keep_turn(tile_turn<PARTS>(params), scratch));
  keep_place(MaskPlace{tile.first, tile.lengths}, scratch);
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const Arrivals<BULK> arrivals(scratch);
  const signed char* live = params.live + tile.index * params.n_blocks;
  if (live[0] & ENTRY_TILE) return;
  const Rows rows = rows_that_see(tile.lengths, params.is_causal);
  const int n_whole = tile.everyone / BLOCK_N;

  load_tile<T, D, ROWS, THREADS>(q_tile, rows_of_q<T>(params, tile.i_b, tile.i_h), tile.first, rows.low, rows.high);
  load_tile<T, D, ROWS, THREADS>(dout_tile, rows_of_dout<T>(params, tile.i_b, tile.i_h), tile.first, rows.low,
                                 rows.high);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  apply_sign<T, D, ROWS, THREADS>(q_tile, params.sign);

  // With ONE_PASS, delta is dout . out until the end.
  float tau[R], delta[R], w_sum[R] = {}, w_dp[R] = {};
  AlphaSums sums[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
    delta[i] = 0;
    if (ONE_PASS && row >= rows.low && row < rows.high) {
      const T* out = static_cast<const T*>(params.out) + (tile.row + row) * params.head_dim_v;
      for (int n = 0; 8 * n < params.head_dim_v; n++)
        for (int e = 0; e < 2; e++) {
          const int column = column_of(n, e);
          if (column < params.head_dim_v)
            delta[i] += to_float<T>(element<T, D>(dout_tile, row - tile.first, column)) * to_float<T>(out[column]);
        }
    }
    delta[i] = quad_sum(delta[i]);
  }

  int whole = 0;  // of the listed blocks
  // u from the scores of KEYS keys of the i-th of them, in their place.
  auto shift = [&](float(&s)[M][N][4], int i, int first) {
    if (i >= whole) {
      const MaskPlace place = kept_place(scratch);
      mask_scores<M, N>(s, place.first, list[i] * BLOCK_N + first, place.lengths, params.is_causal);
    }
    for_numbers<M, N>([&](int row, int m, int n, int e) { s[m][n][e] = u_of(s[m][n][e], c, tau[row]); });
  };
  // What a pass of its own is for.
  auto sum = [&](const float(&dps)[M][N][4], const float(&s)[M][N][4]) {
    for_numbers<M, N>([&](int row, int m, int n, int e) {
      const float dp = dps[m][n][e], u = s[m][n][e];
      float p, w;
      powers<ALPHA>(u, r, p, w);
      w_sum[row] += w;
      w_dp[row] += w * dp;
      if constexpr (DALPHA) {
        if (u > 0) sums[row].add_u(u, p, dp);
      }
    });
  };
  // w from u, in its place.
  auto weigh = [&](float(&s)[M][N][4]) {
    for_numbers<M, N>([&](int row, int m, int n, int e) {
      float& w = s[m][n][e];
      float p;
      powers<ALPHA>(w, r, p, w);
      if constexpr (ONE_PASS) w_sum[row] += w;
    });
  };
  // ds from dp, in its place, with ONE_PASS up to the rest.
  auto differentiate = [&](float(&ds)[M][N][4], const float(&w)[M][N][4]) {
    for_numbers<M, N>([&](int row, int m, int n, int e) {
      ds[m][n][e] = w[m][n][e] * (ds[m][n][e] - delta[row]);
      if constexpr (ONE_PASS) w_dp[row] += ds[m][n][e];
    });
  };
  float dq[M][ND][4], wk[M][ND][4];
  clear(dq);
  clear(wk);
  using Loader = TileLoader<T, D, BLOCK_N, THREADS>;
  const Loader keys_loader(k_tiles, rows_of_k<T>(params, tile.i_b, tile.i_kv), 0, tile.lengths.k);
  const Loader values_loader(v_tiles, rows_of_v<T>(params, tile.i_b, tile.i_kv), 0, tile.lengths.k);
  auto place = [&](int i) { return list[i] * BLOCK_N; };
  auto load = [&](int first, int stage) { arrivals.load(stage, {first}, keys_loader, values_loader); };
  auto ahead = ahead_of(arrivals, place, load);
  constexpr bool KEPT = CAN_KEEP<T, D> && !WGMMA && KEYS <= 16 && STAGES > 1;
  const LeftRows<T, D, M, KEPT> left_q(q_tile, warp_of() * 16 * M), left_dout(dout_tile, warp_of() * 16 * M);
#pragma unroll
  for (int pass = ONE_PASS ? 1 : 0; pass < 2; pass++) {
    auto take_block = [&](int i, int stage) {
#pragma unroll 1
      for (int first = 0; first < BLOCK_N; first += KEYS) {
        const int row = stage * BLOCK_N + first;
        float s[M][N][4], ds[M][N][4];
        if constexpr (WGMMA) {
          const Operand<T, D> keys = Operand<T, D>(k_tiles).from(row);
          Packed<T, N> packed, packed_w;
          begin_scores<WARPS>(s, left_q, keys);
          begin_scores<WARPS>(ds, left_dout, Operand<T, D>(v_tiles).from(row));
          ahead.ask();
          finish<1>(s);
          shift(s, i, first);
          if constexpr (ONE_PASS) {
            weigh(s);
            pack(packed_w, s);
            begin_accumulate(wk, packed_w, keys);
          }
          finish<(ONE_PASS ? 1 : 0)>(ds);
          if (pass == 0) {
            sum(ds, s);
            continue;
          }
          if constexpr (!ONE_PASS) weigh(s);
          differentiate(ds, s);
          pack(packed, ds);
          begin_accumulate(dq, packed, keys);
          finish<0>(dq);
          if constexpr (ONE_PASS) finish<0>(wk);
        } else {
          const T* keys = k_tiles + row * D;
          left_q.multiply(s, keys);
          left_dout.multiply(ds, v_tiles + row * D);
          shift(s, i, first);
          if (pass == 0) {
            sum(ds, s);
            continue;
          }
          weigh(s);
          differentiate(ds, s);
          if constexpr (ONE_PASS) {
            accumulate_both<T>(dq, wk, ds, s, keys, staging);
          } else {
            accumulate<T>(dq, ds, keys, staging);
          }
        }
      }
    };
    for_listed<WARPS>(
        (tile.anyone + BLOCK_N - 1) / BLOCK_N, list, scratch, [&](int j) { return (live[j] & LIVE) != 0; },
        [&](int count) {
          whole = whole_of<BLOCK_M, BLOCK_N>(list, count, n_whole);
          pipeline<STAGES, WGMMA>(count, ahead, take_block);
        });
    if (!ONE_PASS && pass == 1) break;
    quad_sums(w_sum, w_dp);
#pragma unroll
    for (int i = 0; i < R; i++) {
      w_sum[i] = w_sum[i] > 0 ? w_sum[i] : 1.0f;
      const float rest = w_dp[i] / w_sum[i];
      delta[i] += rest;
      if constexpr (DALPHA) {
        const int row = tile.first + row_of<M>(i);
        const float gradient = sums[i].gradient(tile.exponent, w_sum[i], quad_sum);
        if (lane_of() % 4 == 0 && row < params.seqlen_q) params.dalpha[tile.row + row] = gradient + nan_of(tau[i]);
      }
      if constexpr (ONE_PASS) {
#pragma unroll
        for (int n = 0; n < ND; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) dq[i / 2][n][i % 2 * 2 + e] -= rest * wk[i / 2][n][i % 2 * 2 + e];
      }
    }
  }

  const QueryTile end = query_tile<BLOCK_M, PARTS>(params, kept_turn(scratch));
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = end.first + row_of<M>(i);
    const float nan = nan_of(tau[i]);
    // NaN would reach all keys of a block; dkv finds those that a row without a tau sees.
    if (lane_of() % 4 == 0 && row < params.seqlen_q) params.delta[end.row + row] = tau[i] != tau[i] ? 0.0f : delta[i];
    if (row >= params.seqlen_q) continue;
    T* to = static_cast<T*>(params.dq) + (end.row + row) * params.head_dim;
    const float factor = params.scale * params.sign;
#pragma unroll
    for (int n = 0; n < ND; n++) {
      const float* sums = dq[i / 2][n] + i % 2 * 2;
      store_pair(to, column_of(n, 0), params.head_dim, sums[0] * factor + nan, sums[1] * factor + nan);
    }
  }
}

template <class T, int BLOCK_N, int M, int N>
__device__ __forceinline__ void store_keys(void* to, const float (&values)[M][N][4], float factor, int width,
                                           const Params& params, Turn turn) {
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int key = turn.i * BLOCK_N + row_of<M>(i);
    if (key >= params.seqlen_k) continue;
    const long long row = static_cast<long long>(turn.i_bh) * params.seqlen_k + key;
    T* start = static_cast<T*>(to) + row * width;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float* sums = values[i / 2][n] + i % 2 * 2;
      store_pair(start, column_of(n, 0), width, sums[0] * factor, sums[1] * factor);
    }
  }
}

// NaN for the first keys of the block.
template <int M, int N>
__device__ __forceinline__ void lose_keys(float (&values)[M][N][4], int lost) {
  for_numbers<M, N>([&](int row, int m, int n, int e) {
    if (row_of<M>(row) < lost) values[m][n][e] = not_a_number();
  });
}

// Where `scratch` has for dkv what stays there as the turn does.
constexpr int KEPT_LOST = 26;

// What any tile of the group's heads has for the block: LIVE, HAS_ENTRIES, HAS_NAN. `scratch` has room for a number per
// warp.
template <int WARPS>
__device__ __forceinline__ int live_bits(const Params& params, const KeyBlock& block, int* scratch) {
  const long long first_head = static_cast<long long>(block.i_b) * params.heads_q + block.i_kv * block.group;
  const signed char* live = params.live + first_head * params.n_tiles * params.n_blocks + block.j;
  int bits = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < block.group * params.n_tiles; i += 32 * WARPS)
    bits |= live[static_cast<long long>(i) * params.n_blocks];
  bits = static_cast<int>(warp_or(bits));
  if (lane_of() == 0) scratch[warp_of()] = bits & (LIVE | HAS_ENTRIES | HAS_NAN);
  __syncthreads();
  bits = 0;
  for (int i = 0; i < WARPS; i++) bits |= scratch[i];
  return bits;
}

// How many keys of the block, the first ones, a row without a tau sees, of all heads of the group.
template <int BLOCK_M, int BLOCK_N, int WARPS>
__device__ __forceinline__ int lost_keys(const Params& params, const KeyBlock& block, int* scratch) {
  int lost = 0;
  for (int i_g = 0; i_g < block.group; i_g++) {
    const long long head = static_cast<long long>(block.i_b) * params.heads_q + block.i_kv * block.group + i_g;
    for (int i_m = 0; i_m < params.n_tiles; i_m++) {
      if (!(params.live[(head * params.n_tiles + i_m) * params.n_blocks + block.j] & HAS_NAN)) continue;
      const int end = min((i_m + 1) * BLOCK_M, params.seqlen_q);
      for (int row = i_m * BLOCK_M + static_cast<int>(threadIdx.x); row < end; row += 32 * WARPS) {
        const float tau = params.tau[head * params.seqlen_q + row];
        if (tau != tau) lost = max(lost, keys_seen(row, block.lengths, params.is_causal) - block.j * BLOCK_N);
      }
    }
  }
  return static_cast<int>(block_max<WARPS>(static_cast<float>(min(lost, BLOCK_N)), reinterpret_cast<float*>(scratch)));
}

// dk, dv or both, over the tiles of all heads of the group for which the block is live: no atomics, so that the bits are
// the same each time. Keys are rows here, COLUMNS queries columns.
template <bool DK, bool DV, class T, int D, int ALPHA, int BLOCK_M, int BLOCK_N, int COLUMNS, int WARPS, int STAGES,
          bool WGMMA, bool BULK>
__device__ __forceinline__ void dkv_pass(const Params& params, const KeyBlock& block, unsigned char* smem,
                                         int* scratch) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = BLOCK_N / (16 * WARPS);
  constexpr int N = COLUMNS / 8;
  constexpr int ND = D / 8;
  constexpr int PARTS = BLOCK_M / COLUMNS;
  constexpr int PART = COLUMNS * D;
  static_assert(COLUMNS <= THREADS);
  T* k_tile = reinterpret_cast<T*>(smem);
  T* v_tile = k_tile + BLOCK_N * D;
  T* q_parts = v_tile + BLOCK_N * D;
  T* dout_parts = q_parts + STAGES * PART;
  int* list = scratch + 32;
  float* taus = reinterpret_cast<float*>(list + LIST_ENTRIES);
  float* deltas = taus + STAGES * COLUMNS;
  float* staging = deltas + STAGES * COLUMNS + warp_of() * STAGING<M, N>;

  const Arrivals<BULK> arrivals(scratch);
  constexpr bool KEPT = CAN_KEEP<T, D> && !WGMMA && COLUMNS <= 16 && HAS_MORE_ROOM;
  const LeftRows<T, D, M, KEPT> keys(k_tile, warp_of() * 16 * M), values(v_tile, warp_of() * 16 * M);
  float dk[DK ? M : 1][DK ? ND : 1][4], dv[DV ? M : 1][DV ? ND : 1][4];
  clear(dk);
  clear(dv);
  for (int i_g = 0; i_g < block.group; i_g++) {
    const int i_h = block.i_kv * block.group + i_g;
    const int head = block.i_b * params.heads_q + i_h;  // among all
    const float exponent = exponent_of(params, i_h);
    const float c = exponent * params.scale, r = 1 / exponent;
    auto first_of = [&](int i) { return list[i / PARTS] * BLOCK_M + i % PARTS * COLUMNS; };
    int masked = 0;  // so many parts, the first ones, do not see the whole block
    // u from the scores, in their place.
    auto shift = [&](float(&p)[M][N][4], int i, int stage) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float tau = taus[stage * COLUMNS + column_of(n, e)];
#pragma unroll
          for (int row = 0; row < 2 * M; row++) {
            float& u = p[row / 2][n][row % 2 * 2 + e];
            u = u_of(u, c, tau);
          }
        }
      if (i < masked) {
        const int first = first_of(i);
        const MaskPlace place = kept_place(scratch);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int seen = keys_seen(first + column_of(n, e), place.lengths, params.is_causal) - place.first;
#pragma unroll
            for (int row = 0; row < 2 * M; row++)
              if (row_of<M>(row) >= seen) p[row / 2][n][row % 2 * 2 + e] = 0;
          }
      }
    };
    // p from u in its place, and w.
    auto weigh = [&](float(&p)[M][N][4], float(&w)[M][N][4]) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float u = p[m][n][e];
            powers<ALPHA>(u, r, p[m][n][e], w[m][n][e]);
          }
    };
    // ds from dp, in its place.
    auto differentiate = [&](float(&ds)[M][N][4], const float(&w)[M][N][4], int stage) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float delta = deltas[stage * COLUMNS + column_of(n, e)];
#pragma unroll
          for (int row = 0; row < 2 * M; row++) {
            float& dp = ds[row / 2][n][row % 2 * 2 + e];
            dp = w[row / 2][n][row % 2 * 2 + e] * (dp - delta);
          }
        }
    };
    auto load = [&](int first, int stage) {
      using Loader = TileLoader<T, D, COLUMNS, THREADS>;
      using Numbers = NumberLoader<COLUMNS>;
      // Anew, where sums need the registers that would keep it.
      const KeyBlock own = BULK || D <= 64 || (!WGMMA && D <= 128) ? block : key_block(params, kept_turn(scratch));
      const Rows rows = rows_that_see(own.lengths, params.is_causal);
      const long long start = static_cast<long long>(head) * params.seqlen_q;
      const int i_h = own.i_kv * own.group + i_g;
      arrivals.load(stage, {first}, Loader(q_parts, rows_of_q<T>(params, own.i_b, i_h), rows.low, rows.high),
                    Loader(dout_parts, rows_of_dout<T>(params, own.i_b, i_h), rows.low, rows.high),
                    Numbers(taus, params.tau, start, rows.low, rows.high),
                    Numbers(deltas, params.delta, start, rows.low, rows.high));
    };
    auto ahead = ahead_of(arrivals, first_of, load);
    // Where three programs share a multiprocessor, no product is under way beside p and w: they need its registers.
    constexpr bool LATE = D <= 64;
    auto take_part = [&](int i, int stage) {
      float p[M][N][4], w[M][N][4], ds[M][N][4];
      if constexpr (WGMMA) {
        const Operand<T, D> q_part = Operand<T, D>(q_parts).from(stage * COLUMNS);
        const Operand<T, D> dout_part = Operand<T, D>(dout_parts).from(stage * COLUMNS);
        Packed<T, N> packed_p, packed_ds;
        begin_scores<WARPS>(p, keys, q_part);
        ahead.ask();
        if constexpr (!LATE) begin_scores<WARPS>(ds, values, dout_part);
        finish<(LATE ? 0 : 1)>(p);
        shift(p, i, stage);
        weigh(p, w);
        pack(packed_p, p);
        if constexpr (LATE) begin_scores<WARPS>(ds, values, dout_part);
        begin_accumulate(dv, packed_p, dout_part);
        finish<1>(ds);
        differentiate(ds, w, stage);
        // The engine will write where tau and delta were.
        if constexpr (BULK) wgmma_proxy_fence();
        pack(packed_ds, ds);
        begin_accumulate(dk, packed_ds, q_part);
        finish<0>(dv);
        finish<0>(dk);
      } else {
        const T* q_part = q_parts + stage * PART;
        const T* dout_part = dout_parts + stage * PART;
        keys.multiply(p, q_part);
        if constexpr (DK) values.multiply(ds, dout_part);
        shift(p, i, stage);
        weigh(p, w);
        if constexpr (DK) differentiate(ds, w, stage);
        if constexpr (DV) accumulate<T>(dv, p, dout_part, staging);
        if constexpr (DK) accumulate<T>(dk, ds, q_part, staging);
      }
    };
    for_listed<WARPS>(
        params.n_tiles, list, scratch,
        [&](int i_m) {
          const long long tile = static_cast<long long>(head) * params.n_tiles + i_m;
          return (params.live[tile * params.n_blocks + block.j] & LIVE) != 0;
        },
        [&](int count) {
          const int n = count * PARTS;
          masked = 0;
          const MaskPlace place = kept_place(scratch);
          while (masked < n && keys_seen(first_of(masked), place.lengths, params.is_causal) < place.first + BLOCK_N)
            masked++;
          // Only delta is of the kernel before.
          wait_for_kernel_before();
          let_kernel_behind_begin();
          pipeline<STAGES, WGMMA>(n, ahead, take_part);
        });
  }
  if (const int lost = scratch[KEPT_LOST]; lost > 0) {
    lose_keys(dk, lost);
    lose_keys(dv, lost);
  }
  const Turn turn = kept_turn(scratch);
  if constexpr (DK) store_keys<T, BLOCK_N>(params.dk, dk, params.scale * params.sign, params.head_dim, params, turn);
  if constexpr (DV) store_keys<T, BLOCK_N>(params.dv, dv, 1.0f, params.head_dim_v, params, turn);
}

// dk and dv of one block of keys.
template <class T, int D, int ALPHA, int BLOCK_M, int BLOCK_N, int COLUMNS, int WARPS, int STAGES, int PROGRAMS,
          bool WGMMA, bool BULK>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_bwd_dkv(const __grid_constant__ Params params) {
  constexpr int THREADS = 32 * WARPS;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* k_tile = reinterpret_cast<T*>(smem);
  T* v_tile = k_tile + BLOCK_N * D;
  int* scratch = reinterpret_cast<int*>(v_tile + BLOCK_N * D + 2 * STAGES * COLUMNS * D);

  const KeyBlock block = key_block(params, scratch);
  keep_place(MaskPlace{block.j * BLOCK_N, block.lengths}, scratch);
  load_tile<T, D, BLOCK_N, THREADS>(k_tile, rows_of_k<T>(params, block.i_b, block.i_kv), block.j * BLOCK_N, 0,
                                    block.lengths.k);
  load_tile<T, D, BLOCK_N, THREADS>(v_tile, rows_of_v<T>(params, block.i_b, block.i_kv), block.j * BLOCK_N, 0,
                                    block.lengths.k);
  cp_async_commit();
  const int bits = live_bits<WARPS>(params, block, scratch);
  cp_async_wait<0>();
  if (bits == HAS_ENTRIES) return wait_for_kernel_before();  // entmax_attn_bwd_dkv_entries does all
  // Rows without a tau take all that they see with them.
  const int lost = bits & HAS_NAN ? lost_keys<BLOCK_M, BLOCK_N, WARPS>(params, block, scratch) : 0;
  if (threadIdx.x == 0) scratch[KEPT_LOST] = lost;
  __syncthreads();
  apply_sign<T, D, BLOCK_N, THREADS>(k_tile, params.sign);
  if constexpr (D <= 128) {
    dkv_pass<true, true, T, D, ALPHA, BLOCK_M, BLOCK_N, COLUMNS, WARPS, STAGES, WGMMA, BULK>(
        params, block, smem, scratch);
  } else {
    // Both sums together would not fit into the registers.
    dkv_pass<false, true, T, D, ALPHA, BLOCK_M, BLOCK_N, COLUMNS, WARPS, STAGES, WGMMA, BULK>(
        params, block, smem, scratch);
    dkv_pass<true, false, T, D, ALPHA, BLOCK_M, BLOCK_N, COLUMNS, WARPS, STAGES, WGMMA, BULK>(
        params, block, smem, scratch);
  }
}

// How many keys of each row have u > 0, and which (map_m, map_n) blocks hold one.
template <class T, int D, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES, int PROGRAMS>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_support(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = 1;
  constexpr int ROWS = 16 * WARPS;
  constexpr int N = KEYS / 8;
  constexpr int R = 2 * M;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tiles = q_tile + ROWS * D;
  int* scratch = reinterpret_cast<int*>(k_tiles + STAGES * BLOCK_N * D);
  int* list = scratch + 32;

  const QueryTile tile = query_tile<BLOCK_M, BLOCK_M / ROWS>(params);
  const float c = tile.exponent * params.scale;
  const HeadRows<T> k = rows_of_k<T>(params, tile.i_b, tile.i_kv);
  const signed char* live = params.live + tile.index * params.n_blocks;
  signed char* map = params.block_map +
                     static_cast<long long>(tile.i_b * params.heads_q + tile.i_h) * params.map_rows *
                         params.map_columns;

  load_tile<T, D, ROWS, THREADS>(q_tile, rows_of_q<T>(params, tile.i_b, tile.i_h), tile.first, 0, params.seqlen_q);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  apply_sign<T, D, ROWS, THREADS>(q_tile, params.sign);
  float tau[R];
  int size[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
    size[i] = 0;
  }
  for_listed<WARPS>(
      (tile.anyone + BLOCK_N - 1) / BLOCK_N, list, scratch,
      [&](int j) { return (live[j] & (LIVE | HAS_ENTRIES)) != 0; },
      [&](int count) {
        auto place = [&](int i) { return list[i] * BLOCK_N; };
        auto load = [&](int first, int stage) {
          load_tile<T, D, BLOCK_N, THREADS>(k_tiles + stage * BLOCK_N * D, k, first, 0, tile.lengths.k);
        };
        pipeline<STAGES>(
            count, ahead_of(place, load), [&](int i, int stage) {
#pragma unroll 1
              for (int first = 0; first < BLOCK_N; first += KEYS) {
                const int first_key = list[i] * BLOCK_N + first;
                float s[M][N][4];
                clear(s);
                scores<T, D, M, N>(s, q_tile, warp_of() * 16 * M, k_tiles + (stage * BLOCK_N + first) * D);
                mask_scores<M, N>(s, tile.first, first_key, tile.lengths, params.is_causal);
#pragma unroll
                for (int row = 0; row < R; row++)
#pragma unroll
                  for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                      if (!(s[row / 2][n][row % 2 * 2 + e] * c - tau[row] > 0)) continue;
                      size[row]++;
                      const long long map_row = (tile.first + row_of<M>(row)) / params.map_m;
                      map[map_row * params.map_columns + (first_key + column_of(n, e)) / params.map_n] = 1;
                    }
              }
            });
      });
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    size[i] += shfl_xor(size[i], 1);
    size[i] += shfl_xor(size[i], 2);
    if (lane_of() % 4 == 0 && row < params.seqlen_q) params.sizes[tile.row + row] = size[i];
  }
}
