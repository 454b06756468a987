// Output over the listed blocks: out, and for backward which blocks are live.
#include "entries.cuh"
#include "products.cuh"

// p and w of a score of a row, which are added to its f and, where w is asked for, g.
template <int ALPHA, bool WITH_W>
__device__ __forceinline__ void weigh_one(float s, float c, float r, float tau, float& p, float& w, float& f, float& g) {
  powers<ALPHA>(u_of(s, c, tau), r, p, w);
  f += p;
  if constexpr (WITH_W) g += w;
}

// A block's sums to those of all; whether there is support in it.
__device__ __forceinline__ bool add_sums(float (&f)[2], float (&g)[2], const float (&added_f)[2],
                                         const float (&added_g)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    f[row] += added_f[row];
    g[row] += added_g[row];
  }
  return added_f[0] + added_f[1] > 0;
}

// p, in place of this thread's scores, and w of rows with these tau, which are added to f and g; whether there is support
// among them.
template <int ALPHA, bool WITH_W, int N>
__device__ __forceinline__ bool weigh(float (&p)[1][N][4], float (&w)[1][N][4], float (&f)[2], float (&g)[2],
                                      const float (&tau)[2], float c, float r) {
  float added_f[2] = {}, added_g[2] = {};
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      weigh_one<ALPHA, WITH_W>(p[0][n][e], c, r, tau[e / 2], p[0][n][e], w[0][n][e], added_f[e / 2], added_g[e / 2]);
  return add_sums(f, g, added_f, added_g);
}

// The same with p and w as left operands, 16 keys after the other so that few numbers are in registers at once.
template <class T, int ALPHA, int N>
__device__ __forceinline__ bool pack_weights(Packed<T, N>& packed_p, Packed<T, N>& packed_w,
                                             const float (&s)[1][N][4], float (&f)[2], float (&g)[2],
                                             const float (&tau)[2], float c, float r) {
  float added_f[2] = {}, added_g[2] = {};
#pragma unroll
  for (int step = 0; step < N / 2; step++) {
    float p[1][2][4], w[1][2][4];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        weigh_one<ALPHA, true>(s[0][2 * step + n][e], c, r, tau[e / 2], p[0][n][e], w[0][n][e], added_f[e / 2],
                               added_g[e / 2]);
    pack_fragments<T>(packed_p.r[step], p, 0);
    pack_fragments<T>(packed_w.r[step], w, 0);
  }
  return add_sums(f, g, added_f, added_g);
}

// Two sums and two numbers for each score are more than the registers of three programs have room for.
template <class T, int PROGRAMS, int ALPHA>
constexpr int PROGRAMS_OF = PROGRAMS > 2 && IS_HALF<T> && !IS_BF16<T> && ALPHA != ALPHA_1_5 ? 2 : PROGRAMS;

// A last Newton step is applied to the output itself: out(tau + e) = out(tau) - r e sum w v up to e ** 2. In bfloat16 out
// is divided by the sum of p instead, which leaves r e (out - out1) sum w of the error, out1 = sum w v / sum w; and the
// slope, sum w, follows from f. KEYS keys are multiplied at once; values wider than DV are taken in parts. With PRODUCERS,
// so many warps more ask for the tiles.
template <class T, int D, int DV, int ALPHA, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES, int PROGRAMS,
          bool WGMMA, bool BULK, int PRODUCERS = 0>
__global__ void __launch_bounds__(32 * (WARPS + PRODUCERS), PROGRAMS_OF<T, PROGRAMS, ALPHA>)
    entmax_attn_fwd_output(const __grid_constant__ Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = 1;
  constexpr int ROWS = 16 * WARPS;
  constexpr int N = KEYS / 8;
  constexpr int NV = DV / 8;
  constexpr int R = 2 * M;
  constexpr bool CORRECTED = !IS_BF16<T>;
  // Whether queries are a left operand in registers.
  constexpr bool KEPT = WGMMA ? !CORRECTED : CAN_KEEP<T, D>;
  // Whether a block's values are multiplied while the next block's scores are formed.
  constexpr bool OVERLAPS = WGMMA && !(CORRECTED && PROGRAMS * WARPS > 8);
  static_assert(PRODUCERS == 0 || (BULK && OVERLAPS && DV >= D && STAGES > 1 && WARPS % 4 == 0 && PRODUCERS % 4 == 0));
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tiles = q_tile + ROWS * D;
  T* v_tiles = k_tiles + STAGES * BLOCK_N * D;
  int* scratch = reinterpret_cast<int*>(v_tiles + STAGES * BLOCK_N * DV);
  float* staging = reinterpret_cast<float*>(scratch + 32) + warp_of() * STAGING<M, N>;

  constexpr int PARTS = BLOCK_M / ROWS;
  const Ring<STAGES, WARPS> ring(scratch);
  if (PRODUCERS > 0 && threadIdx.x == 0) ring.begin();
  const QueryTile tile = query_tile<BLOCK_M, PARTS>(params, keep_turn(tile_turn<PARTS>(params), scratch));
  keep_place(MaskPlace{tile.first, tile.lengths}, scratch);
  // So that no register keeps it through the loop.
  auto tile_again = [&]() { return query_tile<BLOCK_M, PARTS>(params, kept_turn(scratch)); };
  if (!is_asked_for(params, tile.i_b, tile.i_kv)) return wait_for_kernel_before();
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const HeadRows<T> q = rows_of_q<T>(params, tile.i_b, tile.i_h);
  const Arrivals<BULK> arrivals(scratch);
  const int* list = params.list + tile.index * params.n_blocks;
  keep(list);
  if constexpr (PRODUCERS > 0) {
    if (warp_of() >= WARPS) {
      give_registers_back<FEW_REGISTERS>();
      wait_for_kernel_before();
      const int counted = params.counts[tile.index];
      const HeadRows<T> k = rows_of_k<T>(params, tile.i_b, tile.i_kv), v = rows_of_v<T>(params, tile.i_b, tile.i_kv);
      if (warp_of() == WARPS && counted >= 0)
        ring.fill(counted & ~BAD_TILE, [&](int i) { return load_kept(list, i) * BLOCK_N; },
                  TileLoader<T, D, BLOCK_N, 32>(k_tiles, k, 0, tile.lengths.k),
                  TileLoader<T, DV, BLOCK_N, 32>(v_tiles, v, 0, tile.lengths.k));
      return;
    }
    take_registers<MOST_REGISTERS<WARPS, PRODUCERS, PROGRAMS>>();
  }
  auto sync = []() {
    if constexpr (PRODUCERS > 0) {
      sync_first<THREADS>();
    } else {
      __syncthreads();
    }
  };

  load_tile<T, D, ROWS, THREADS>(q_tile, q, tile.first, 0, params.seqlen_q);
  cp_async_commit();
  wait_for_kernel_before();
  const int counted = params.counts[tile.index];
  cp_async_wait<0>();
  // Its output came from entries.
  if (counted < 0) return;
  const int count = counted & ~BAD_TILE;
  const bool has_bad = counted != count;
  const int whole = whole_of<BLOCK_M, BLOCK_N>(list, count, tile.everyone / BLOCK_N);
  sync();
  apply_sign<T, D, ROWS, THREADS>(q_tile, params.sign, sync);
  const LeftRows<T, D, M, KEPT> left(q_tile, warp_of() * 16 * M);
  if constexpr (PRODUCERS > 0 && !KEPT) {
    wgmma_proxy_fence();
    sync();
  }

  // A row whose tau is NaN has no u above 0.
  float tau[R], f[R], g[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = tile.first + row_of<M>(i);
    tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
  }

  // The i-th of the listed blocks, from its key `first` on.
  auto mask = [&](float(&s)[M][N][4], int i, int first) {
    if (i < whole) return;
    const MaskPlace place = kept_place(scratch);
    mask_scores<M, N>(s, place.first, load_kept(list, i) * BLOCK_N + first, place.lengths, params.is_causal);
  };
  Marks marks;
  auto write_live = [&](int i_word, unsigned bits) {
    const int i = i_word * WORD + lane_of();
    // Each warp writes the same.
    if (params.live && i < count && (has_bad || bits >> lane_of() & 1))
      params.live[tile_again().index * params.n_blocks + load_kept(list, i)] = has_bad ? LIVE | HAS_NAN : LIVE;
  };
  for (int from = 0; from < (DV < D ? params.head_dim_v : 1); from += DV) {
    const int width = params.head_dim_v - from;
    float out[M][NV][4], wv[M][NV][4];
    clear(out);
    clear(wv);
#pragma unroll
    for (int row = 0; row < R; row++) f[row] = g[row] = 0;
    auto place = [&](int i) { return load_kept(list, i) * BLOCK_N; };
    auto load = [&](int first, int stage) {
      const QueryTile own = BULK ? tile : tile_again();
      HeadRows<T> v = rows_of_v<T>(params, own.i_b, own.i_kv);
      v.base += from;
      v.width = width;
      const HeadRows<T> k = rows_of_k<T>(params, own.i_b, own.i_kv);
      arrivals.load(stage, {first}, TileLoader<T, D, BLOCK_N, THREADS>(k_tiles, k, 0, own.lengths.k),
                    TileLoader<T, DV, BLOCK_N, THREADS>(v_tiles, v, 0, own.lengths.k));
    };
    auto ahead = ahead_of<true>(arrivals, place, load);
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
    const Operand<T, D> keys(k_tiles);
    if constexpr (WGMMA && !OVERLAPS) {
      // The registers have no room for sums that are under way beside the scores.
      auto take_block = [&](int i, int stage) {
        float s[M][N][4];
        Packed<T, N> p, w;
        ahead.ask();
        begin_scores<WARPS>(s, left, keys.from(stage * BLOCK_N));
        finish<0>(s);
        mask(s, i, 0);
        marks.add(i, pack_weights<T, ALPHA>(p, w, s, f, g, tau, c, r), write_live);
        begin_sums(p, w, stage);
        finish_sums();
      };
      pipeline<STAGES, true>(count, ahead, take_block);
    } else if constexpr (WGMMA) {
      // A block's values are multiplied after the scores of the next one have begun, the first block's by nothing before,
      // as no branch may part sums that are under way from others; without CORRECTED, while that block is weighed.
      Packed<T, N> p = {}, w = {};
      int before = 0;
      auto take_block = [&](int i, int stage) {
        float s[M][N][4];
        begin_scores<WARPS>(s, left, keys.from(stage * BLOCK_N));
        begin_sums(p, w, before);
        if constexpr (PRODUCERS == 0) ahead.ask();
        finish<(CORRECTED ? 0 : 1)>(s);
        mask(s, i, 0);
        auto finish_before = [&]() {
          finish_sums();
          if (PRODUCERS > 0 && i > 0) ring.give_back(before);
          before = stage;
        };
        if constexpr (CORRECTED) {
          finish_before();
          marks.add(i, pack_weights<T, ALPHA>(p, w, s, f, g, tau, c, r), write_live);
        } else {
          float unused[M][N][4];
          marks.add(i, weigh<ALPHA, false>(s, unused, f, g, tau, c, r), write_live);
          finish_before();
          pack(p, s);
        }
      };
      if constexpr (PRODUCERS > 0) {
        ring.use(count, take_block);
      } else {
        pipeline<STAGES, true, 1>(count, ahead, take_block);
      }
      if (count > 0) {
        begin_sums(p, w, before);
        finish_sums();
      }
    } else {
      pipeline<STAGES>(count, ahead, [&](int i, int stage) {
        bool has_support = false;
#pragma unroll 1
        for (int first = 0; first < BLOCK_N; first += KEYS) {
          float p[M][N][4], w[M][N][4];
          left.multiply(p, k_tiles + (stage * BLOCK_N + first) * D);
          mask(p, i, first);
          has_support |= weigh<ALPHA, CORRECTED>(p, w, f, g, tau, c, r);
          const T* values = v_tiles + (stage * BLOCK_N + first) * DV;
          if constexpr (CORRECTED) {
            accumulate_both<T>(out, wv, p, w, values, staging);
          } else {
            accumulate<T>(out, p, values, staging);
          }
        }
        marks.add(i, has_support, write_live);
      });
    }
    marks.finish(count, write_live);
    quad_sums(f, g);
    // The row's other threads have read tau.
    syncwarp();
    const QueryTile tile = tile_again();
#pragma unroll
    for (int row = 0; row < R; row++) {
      const int at = tile.first + row_of<M>(row);
      const float nan = nan_of(tau[row]);
      if (at >= params.seqlen_q) continue;
      const float slope = CORRECTED ? g[row] : params.slopes[tile.row + at].at(f[row]);
      const float change = newton_step<ALPHA>(f[row], slope, r);
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
