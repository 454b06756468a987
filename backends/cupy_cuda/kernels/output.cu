// Output over the listed blocks: out, and for backward which blocks are live.
#include "entries.cuh"
#include "products.cuh"

// p, in place of this thread's scores, and w of rows with these tau, which are added to f and g; whether there is support
// among them.
template <int ALPHA, int N>
__device__ __forceinline__ bool weigh(float (&p)[1][N][4], float (&w)[1][N][4], float (&f)[2], float (&g)[2],
                                      const float (&tau)[2], float c, float r) {
  float added[2] = {};
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      powers<ALPHA>(u_of(p[0][n][e], c, tau[e / 2]), r, p[0][n][e], w[0][n][e]);
      f[e / 2] += p[0][n][e];
      added[e / 2] += w[0][n][e];
    }
  g[0] += added[0];
  g[1] += added[1];
  return added[0] > 0 || added[1] > 0;
}

// The same with p and w as left operands, 16 keys after the other so that few numbers are in registers at once.
template <class T, int ALPHA, int N>
__device__ __forceinline__ bool pack_weights(Packed<T, N>& packed_p, Packed<T, N>& packed_w,
                                             const float (&s)[1][N][4], float (&f)[2], float (&g)[2],
                                             const float (&tau)[2], float c, float r) {
  float added[2] = {};
#pragma unroll
  for (int step = 0; step < N / 2; step++) {
    float p[1][2][4], w[1][2][4];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        powers<ALPHA>(u_of(s[0][2 * step + n][e], c, tau[e / 2]), r, p[0][n][e], w[0][n][e]);
        f[e / 2] += p[0][n][e];
        added[e / 2] += w[0][n][e];
      }
    pack_fragments<T>(packed_p.r[step], p, 0);
    pack_fragments<T>(packed_w.r[step], w, 0);
  }
  g[0] += added[0];
  g[1] += added[1];
  return added[0] > 0 || added[1] > 0;
}

// A last Newton step is applied to the output itself: out(tau + e) = out(tau) - r e sum w v up to e ** 2. In bfloat16 out
// is divided by the sum of p instead, which leaves r e (out - out1) sum w of the error, out1 = sum w v / sum w. KEYS keys
// are multiplied at once; values wider than DV are taken in parts.
template <class T, int D, int DV, int ALPHA, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES, int PROGRAMS,
          bool WGMMA>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_fwd_output(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = 1;
  constexpr int ROWS = 16 * WARPS;
  constexpr int N = KEYS / 8;
  constexpr int NV = DV / 8;
  constexpr int R = 2 * M;
  constexpr bool CORRECTED = !IS_BF16<T>;
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tiles = q_tile + ROWS * D;
  T* v_tiles = k_tiles + STAGES * BLOCK_N * D;
  float* scratch = reinterpret_cast<float*>(v_tiles + STAGES * BLOCK_N * DV);
  float* staging = scratch + 32 + warp_of() * STAGING<M, N>;

  const QueryTile tile = query_tile<BLOCK_M, BLOCK_M / ROWS>(params);
  if (!is_asked_for(params, tile.i_b, tile.i_kv)) return;
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const T* q = head_of<T>(params.q, tile.i_b, params.stride_qb, tile.i_h, params.stride_qh);
  const T* k = head_of<T>(params.k, tile.i_b, params.stride_kb, tile.i_kv, params.stride_kh);
  const T* v = head_of<T>(params.v, tile.i_b, params.stride_vb, tile.i_kv, params.stride_vh);
  const int* list = params.list + tile.index * params.n_blocks;
  const int count = params.counts[tile.index];
  // Its output came from entries.
  if (count < 0) return;
  const int n_whole = tile.everyone / BLOCK_N;

  load_tile<T, D, ROWS, THREADS>(q_tile, q, tile.first, 0, params.seqlen_q, params.stride_qm, params.head_dim,
                                 params.aligned_q);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  apply_sign<T, D, ROWS, THREADS>(q_tile, params.sign);

  // A row whose tau is NaN has no u above 0.
  float tau[R], f[R], g[R];
  bool has_bad = false;
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
    has_bad |= tau[i] != tau[i];
  }
  has_bad = block_max<WARPS>(has_bad ? 1.0f : 0.0f, scratch) > 0;

  const TileLoader<T, D, BLOCK_N, THREADS, !CORRECTED> keys_loader(k_tiles, k, 0, tile.lengths.k, params.stride_kn,
                                                                   params.head_dim, params.aligned_k);
  auto mask = [&](float(&s)[M][N][4], int j, int first) {
    if (j >= n_whole) mask_scores<M, N>(s, tile.first, j * BLOCK_N + first, tile.lengths, params.is_causal);
  };
  auto mark_live = [&](int j, bool has_support) {
    if (any_sync(has_support || has_bad) && params.live && lane_of() == 0)
      params.live[tile.index * params.n_blocks + j] = LIVE;
  };
  for (int from = 0; from < (DV < D ? params.head_dim_v : 1); from += DV) {
    const int width = params.head_dim_v - from;
    float out[M][NV][4], wv[M][NV][4];
    clear(out);
    clear(wv);
#pragma unroll
    for (int row = 0; row < R; row++) f[row] = g[row] = 0;
    const TileLoader<T, DV, BLOCK_N, THREADS, !CORRECTED> values_loader(v_tiles, v + from, 0, tile.lengths.k,
                                                                        params.stride_vn, width, params.aligned_v);
    auto load = [&](int i, int stage) {
      const int first = list[i] * BLOCK_N;
      keys_loader.load(stage, first);
      values_loader.load(stage, first);
    };
    // out += p v, and wv += w v where it is needed.
    auto begin_sums = [&](const Packed<T, N>& p, const Packed<T, N>& w, int stage) {
      const Operand<T, DV> values = Operand<T, DV>(v_tiles).from(stage * BLOCK_N);
      begin_accumulate(out, p, values);
      if constexpr (CORRECTED) begin_accumulate(wv, w, values);
    };
    auto finish_sums = [&]() {
      finish<0>(out);
      if constexpr (CORRECTED) finish<0>(wv);
    };
    const Operand<T, D> queries = Operand<T, D>(q_tile).from(warpgroup_row<WARPS>()), keys(k_tiles);
    Ahead ahead;
    if constexpr (WGMMA && CORRECTED && PROGRAMS * WARPS > 8) {
      // The registers have no room for sums that are under way beside the scores.
      auto take_block = [&](int i, int stage) {
        float s[M][N][4];
        Packed<T, N> p, w;
        ahead.ask(load);
        begin_scores(s, queries, keys.from(stage * BLOCK_N));
        finish<0>(s);
        mask(s, list[i], 0);
        mark_live(list[i], pack_weights<T, ALPHA>(p, w, s, f, g, tau, c, r));
        begin_sums(p, w, stage);
        finish_sums();
      };
      pipeline<STAGES, true>(count, load, take_block, &ahead);
    } else if constexpr (WGMMA) {
      // A block's values are multiplied after the scores of the next one have begun, the first block's by nothing before,
      // as no branch may part sums that are under way from others; without CORRECTED, while that block is weighed.
      Packed<T, N> p = {}, w = {};
      int before = 0;
      auto take_block = [&](int i, int stage) {
        float s[M][N][4];
        begin_scores(s, queries, keys.from(stage * BLOCK_N));
        begin_sums(p, w, before);
        ahead.ask(load);
        finish<(CORRECTED ? 0 : 1)>(s);
        before = stage;
        mask(s, list[i], 0);
        if constexpr (CORRECTED) {
          finish_sums();
          mark_live(list[i], pack_weights<T, ALPHA>(p, w, s, f, g, tau, c, r));
        } else {
          float unused[M][N][4];
          mark_live(list[i], weigh<ALPHA>(s, unused, f, g, tau, c, r));
          finish_sums();
          pack(p, s);
        }
      };
      pipeline<STAGES, true, 1>(count, load, take_block, &ahead);
      if (count > 0) {
        begin_sums(p, w, before);
        finish_sums();
      }
    } else {
      pipeline<STAGES>(count, load, [&](int i, int stage) {
        const int j = list[i];
        bool has_support = false;
#pragma unroll 1
        for (int first = 0; first < BLOCK_N; first += KEYS) {
          float p[M][N][4], w[M][N][4];
          clear(p);
          scores<T, D, M, N>(p, q_tile, warp_of() * 16 * M, k_tiles + (stage * BLOCK_N + first) * D);
          mask(p, j, first);
          has_support |= weigh<ALPHA>(p, w, f, g, tau, c, r);
          const T* values = v_tiles + (stage * BLOCK_N + first) * DV;
          if constexpr (CORRECTED) {
            accumulate_both<T>(out, wv, p, w, values, staging);
          } else {
            accumulate<T>(out, p, values, staging);
          }
        }
        mark_live(j, has_support);
      });
    }
    quad_sums(f, g);
#pragma unroll
    for (int row = 0; row < R; row++) {
      const int at = tile.first + row_of<M>(row);
      const float nan = nan_of(tau[row]);
      const float change = newton_step<ALPHA>(f[row], g[row], r);
      if (at >= params.seqlen_q) continue;
      if (from == 0 && lane_of() % 4 == 0) params.tau[tile.row + at] = tau[row] + change;
      T* to = static_cast<T*>(params.out) + (tile.row + at) * params.head_dim_v + from;
      const float norm = f[row] > 0 ? f[row] : 1.0f;
#pragma unroll
      for (int n = 0; n < NV; n++) {
        const float* sums = out[row / 2][n] + row % 2 * 2;
        const float* slopes = wv[row / 2][n] + row % 2 * 2;
        float values[2];
#pragma unroll
        for (int e = 0; e < 2; e++) values[e] = CORRECTED ? sums[e] - r * change * slopes[e] : sums[e] / norm;
        store_pair(to, column_of(n, 0), width, values[0] + nan, values[1] + nan);
      }
    }
  }
}
