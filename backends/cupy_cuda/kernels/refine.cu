// Refine over the listed blocks: tau nearly at its end, and the blocks that still hold support then. Where a tile's
// entries can be listed, they give tau; where they are few in many blocks, out too, at once.
#include "entries.cuh"
#include "products.cuh"

constexpr int MAX_STEPS = 16;

// More than so many in a block cost more one by one than the block does; measured on an H200, where wgmma makes blocks
// cheaper.
template <int D, bool WGMMA>
constexpr int ENTRIES_PER_BLOCK = D > 64 ? 96 : WGMMA ? 128 : 192;

// The scores above the bound of tau that a row has met, in order of the keys. The two rows of a quad share ROOM places:
// those of its first row are filled from the first place on, those of its second row from the last place back.
template <int ROOM>
struct RowEntries {
  static constexpr int MOST = 16;   // of a column tile
  static constexpr int PAIRS = 32;  // of neighbouring keys in a block

  float* scores;          // whose lowest bit is set for the second key of a pair
  unsigned short* codes;  // which of the listed blocks, and of its pairs
  int first, low, high;   // between low and high all is free

  __device__ __forceinline__ RowEntries(float* scores, unsigned short* codes)
      : scores(scores + warp_of() * 8 * ROOM), codes(codes + warp_of() * 8 * ROOM), first(lane_of() / 4 * ROOM),
        low(first), high(first + ROOM) {}

  __device__ __forceinline__ int count(int row) const { return row == 0 ? low - first : first + ROOM - high; }
  __device__ __forceinline__ int count() const { return count(0) + count(1); }
  __device__ __forceinline__ int place(int row, int i) const { return row == 0 ? first + i : first + ROOM - 1 - i; }
  __device__ __forceinline__ float u_at(int row, int i, float c, float tau) const {
    return i < count(row) ? u_of(scores[place(row, i)], c, tau) : 0.0f;
  }

  // Then it takes no more.
  __device__ __forceinline__ bool is_full() const { return low + MOST > high; }

  __device__ __forceinline__ int block_of(int row, int i) const { return codes[place(row, i)] / PAIRS; }
  __device__ __forceinline__ int column_of(int row, int i) const {
    return codes[place(row, i)] % PAIRS * 2 + __float_as_uint(scores[place(row, i)]) % 2;
  }

  // Of a column tile, this lane's pair of it.
  __device__ __forceinline__ void add(const float (&s)[4], const float (&bound)[2], int block, int pair) {
    const bool takes = !is_full();
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const bool is_above[2] = {takes && s[2 * row] > bound[row], takes && s[2 * row + 1] > bound[row]};
      const unsigned of_quad = bits_of_quad(is_above[0]) | bits_of_quad(is_above[1]) << 4;
      int i = count(row) + popcount(of_quad & lanes_before_in_quad() * 0x11);
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (is_above[e]) {
          scores[place(row, i)] = __uint_as_float((__float_as_uint(s[2 * row + e]) & ~1u) | e);
          codes[place(row, i)] = static_cast<unsigned short>(block * PAIRS + pair);
          i++;
        }
      if (row == 0) {
        low += popcount(of_quad);
      } else {
        high -= popcount(of_quad);
      }
    }
  }
};

// Where the entries with u > 0 of a lane's rows go; n in all of the warp, that begin at `begin` among the tile's `total`.
struct EntryPlaces {
  int start[2];
  int n, begin, total;
};

// Raises tau to its end; f and g are sum p and sum w of the last step.
template <int ALPHA, int WARPS, int ROOM>
__device__ __forceinline__ EntryPlaces solve_by_entries(const RowEntries<ROOM>& entries, float (&tau)[2], float (&f)[2],
                                                        float (&g)[2], float c, float r, int* scratch) {
  const int longest = max(entries.count(0), entries.count(1));
  for (int step = 0; step < MAX_STEPS; step++) {
    float largest = 0;
    f[0] = f[1] = g[0] = g[1] = 0;
#pragma unroll 4
    for (int i = lane_of() % 4; i < longest; i += 4)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        float p, w;
        powers<ALPHA>(entries.u_at(row, i, c, tau[row]), r, p, w);
        f[row] += p;
        g[row] += w;
      }
    quad_sums(f, g);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const float change = newton_step<ALPHA>(f[row], g[row], r);
      tau[row] += change;
      largest = fmaxf(largest, change);
    }
    // Below the rounding of u it is noise.
    if (!any_sync(largest > 1e-6f)) break;
  }

  EntryPlaces places{};
#pragma unroll
  for (int row = 0; row < 2; row++) {
    int sum = 0;
    for (int i = lane_of() % 4; i < entries.count(row); i += 4) sum += entries.u_at(row, i, c, tau[row]) > 0;
    sum += shfl_xor(sum, 1);
    sum += shfl_xor(sum, 2);
    places.start[row] = places.n - sum;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      const int before = shfl(sum, max(lane_of() - step, 0));
      sum += lane_of() >= step ? before : 0;
    }
    places.start[row] += sum;
    places.n += shfl(sum, 31);
  }
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = places.n;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) {
    places.begin += i < warp_of() ? scratch[i] : 0;
    places.total += scratch[i];
  }
  return places;
}

// out of a tile, and what backward needs. `staged` has room for the entries in shared memory.
template <class T, int D, int ALPHA, int BLOCK_M, int BLOCK_N, int WARPS, int ROOM>
__device__ __forceinline__ void attend_by_entries(const Params& params, const QueryTile& tile,
                                                  const RowEntries<ROOM>& entries, const EntryPlaces& places,
                                                  const EntryList& saved, const int* list, const float (&tau)[2],
                                                  void* staged, float c, float r) {
  constexpr int ROWS = BLOCK_M / WARPS;
  constexpr int ROW_BITS = 4;
  static_assert(ROWS == 1 << ROW_BITS);
  const int first_row = warp_of() * ROWS, first_query = tile.first + first_row;

  unsigned* keys = reinterpret_cast<unsigned*>(staged) + places.begin;
  unsigned short* us =
      reinterpret_cast<unsigned short*>(reinterpret_cast<unsigned*>(staged) + saved.capacity) + places.begin;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    int to = places.start[row];
    for (int first = 0; any_sync(first < entries.count(row)); first += 4) {
      const int i = first + lane_of() % 4;
      const float u = entries.u_at(row, i, c, tau[row]);
      const unsigned of_quad = bits_of_quad(u > 0);
      if (u > 0) {
        const int at = to + popcount(of_quad & lanes_before_in_quad());
        const unsigned key = list[entries.block_of(row, i)] * BLOCK_N + entries.column_of(row, i);
        keys[at] = key << ROW_BITS | (lane_of() / 4 + 8 * row);
        us[at] = quantise(u);
      }
      to += popcount(of_quad);
    }
  }
  syncwarp();

#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int query = first_query + lane_of() / 4 + 8 * row;
    if (lane_of() % 4 == 0 && query < params.seqlen_q) params.tau[tile.row + query] = tau[row];
  }
  signed char* live = params.live + tile.index * params.n_blocks;
  if (params.entries) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int start = places.begin + places.start[row];
      if (lane_of() % 4 == 0) saved.starts()[first_row + lane_of() / 4 + 8 * row] = static_cast<unsigned short>(start);
    }
    if (threadIdx.x == 0) saved.starts()[BLOCK_M] = static_cast<unsigned short>(places.total);
    for (int i = lane_of(); i < places.n; i += 32) {
      const int key = static_cast<int>(keys[i] >> ROW_BITS);
      saved.keys()[places.begin + i] = key;
      saved.us()[places.begin + i] = us[i];
      live[key / BLOCK_N] = HAS_ENTRIES;
    }
    __syncthreads();
    if (threadIdx.x == 0) live[0] |= ENTRY_TILE;
  }
  if (threadIdx.x == 0) params.counts[tile.index] = -1;

  const T* v = head_of<T>(params.v, tile.i_b, params.stride_vb, tile.i_kv, params.stride_vh);
  // In place of the warp's own lists.
  T* weights = reinterpret_cast<T*>(entries.scores);
  clear_weights(weights);
  T* out_rows = static_cast<T*>(params.out) + (tile.row + first_query) * params.head_dim_v;
  // More channels at once would need as many registers.
#pragma unroll 1
  for (int channel = 0; channel < D; channel += 64) {
    const int width = params.head_dim_v - channel;
    RowSums<64> out = {};
#pragma unroll 1
    for (int first = 0; first < places.n; first += 32) {
      const int i = min(first + lane_of(), places.n - 1);
      float p, w;
      powers<ALPHA>(dequantise(us[i]), r, p, w);
      add_rows<T, 64>(out, weights, v + channel, params.stride_vn, width, params.aligned_v,
                      static_cast<int>(keys[i] >> ROW_BITS), static_cast<int>(keys[i] % ROWS), p, places.n - first);
    }
    store_sums<T, 64>(out_rows + channel, out, 1.0f, params.head_dim_v, width, params.seqlen_q - first_query);
  }
}

// Adds this thread's p to f and its w to g, of each row, from the scores; whether it has support among them.
template <int ALPHA, int M, int N>
__device__ __forceinline__ bool add_weights(float (&f)[2 * M], float (&g)[2 * M], const float (&s)[M][N][4],
                                            const float (&tau)[2 * M], float c, float r) {
  float all = 0;
#pragma unroll
  for (int row = 0; row < 2 * M; row++) {
    float added = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float p, w;
        powers<ALPHA>(u_of(s[row / 2][n][row % 2 * 2 + e], c, tau[row]), r, p, w);
        f[row] += p;
        added += w;
      }
    g[row] += added;
    all += added;
  }
  return all > 0;
}

// Newton steps are taken until the next one is expected to be below `target`; output.cu takes that one, in bfloat16 with
// the slope that follows from the last step here. KEYS keys are multiplied at once.
template <class T, int D, int ALPHA, bool ENTRIES, int BLOCK_M, int BLOCK_N, int KEYS, int WARPS, int STAGES,
          int PROGRAMS, bool WGMMA, bool BULK>
__global__ void __launch_bounds__(32 * WARPS, PROGRAMS) entmax_attn_fwd_refine(const __grid_constant__ Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int M = BLOCK_M / (16 * WARPS);
  constexpr int N = KEYS / 8;
  constexpr int R = 2 * M;
  constexpr int RING = STAGES * BLOCK_N * D;
  // So many blocks are taken at once, because the loops' own instructions are many.
  constexpr int GROUP = BULK && D <= 64 && STAGES % 2 == 0 ? 2 : 1;
  constexpr int SPAN = GROUP * N;
  static_assert((!WGMMA || KEYS == BLOCK_N) && (!ENTRIES || (IS_HALF<T> && M == 1)));
  extern __shared__ __align__(1024) unsigned char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  // Whether queries are in registers throughout, and leave their place to the keys: more programs share a multiprocessor
  // then.
  constexpr bool LEAVE = WGMMA || (IS_HALF<T> && D == 128);
  constexpr int BEFORE_KEYS = LEAVE ? 0 : BLOCK_M * D;
  T* k_tiles = q_tile + BEFORE_KEYS;
  float* scratch = reinterpret_cast<float*>(k_tiles + (LEAVE && RING < BLOCK_M * D ? BLOCK_M * D : RING));

  int* kept = reinterpret_cast<int*>(scratch);
  const QueryTile tile = query_tile<BLOCK_M>(params, keep_turn(tile_turn<1>(params), kept));
  if (!is_asked_for(params, tile.i_b, tile.i_kv)) return wait_for_kernel_before();
  keep_place(MaskPlace{tile.first, tile.lengths}, kept);
  // So that no register keeps it through the loops.
  auto tile_again = [&]() { return query_tile<BLOCK_M>(params, kept_turn(kept)); };
  const float c = tile.exponent * params.scale, r = 1 / tile.exponent;
  const Arrivals<BULK> arrivals(scratch);
  const int n_whole = tile.everyone / BLOCK_N;

  LeftRows<T, D, M, LEAVE || CAN_KEEP<T, D>> queries;
  auto load_queries = [&](const QueryTile& tile) {
    const HeadRows<T> q = rows_of_q<T>(params, tile.i_b, tile.i_h);
    load_tile<T, D, BLOCK_M, THREADS>(q_tile, q, tile.first, 0, params.seqlen_q);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    apply_sign<T, D, BLOCK_M, THREADS>(q_tile, params.sign);
    queries = {q_tile, warp_of() * 16 * M};
    if constexpr (LEAVE) __syncthreads();
  };
  load_queries(tile);
  wait_for_kernel_before();
  let_kernel_behind_begin();
  int* list = params.list + tile.index * params.n_blocks;
  int count = params.counts[tile.index];
  // A row whose tau is NaN has no u above 0.
  float tau[R], f[R], g[R];
  bool has_bad = false;
  auto load_tau = [&](const QueryTile& tile) {
#pragma unroll
    for (int i = 0; i < R; i++) {
      const int row = tile.first + row_of<M>(i);
      tau[i] = row < params.seqlen_q ? params.tau[tile.row + row] : infinity();
    }
  };
  load_tau(tile);
#pragma unroll
  for (int i = 0; i < R; i++) has_bad |= tau[i] != tau[i];
  has_bad = block_max<WARPS>(has_bad ? 1.0f : 0.0f, scratch) > 0;
  if (params.live)
    fill<THREADS, signed char>(params.live + tile.index * params.n_blocks, params.n_blocks, has_bad ? HAS_NAN : 0);

  const TileLoader<T, D, BLOCK_N, THREADS> keys_loader(k_tiles, rows_of_k<T>(params, tile.i_b, tile.i_kv), 0,
                                                       tile.lengths.k);
  struct Firsts {
    int keys[GROUP];
  };
  auto place = [&](int i) {
    Firsts firsts;
    const int* from = list + GROUP * i;
#pragma unroll
    for (int i_block = 0; i_block < GROUP; i_block++)
      firsts.keys[i_block] = from[min(i_block, count - 1 - GROUP * i)] * BLOCK_N;
    return firsts;
  };
  auto load = [&](const Firsts& firsts, int stage) {
    arrivals.load(stage, firsts.keys, keys_loader);
  };
  auto ahead = ahead_of<true>(arrivals, place, load);
  int whole = whole_of<BLOCK_M, BLOCK_N>(list, count, n_whole);
  auto of_block = [](float(&s)[M][SPAN][4], int i_block) -> float(&)[M][N][4] {
    return reinterpret_cast<float(&)[M][N][4]>(s[0][i_block * N]);
  };
  // Of the i-th group, from the key `first` of its blocks on. Behind the last block all is -inf.
  auto form_scores = [&](float(&s)[M][SPAN][4], int i, int stage, int first) {
    if constexpr (WGMMA) {
      begin_scores<WARPS>(s, queries, Operand<T, D>(k_tiles).from(stage * GROUP * BLOCK_N));
      ahead.ask();
      finish<0>(s);
    } else {
      queries.multiply(s, k_tiles + (stage * BLOCK_N + first) * D);
    }
#pragma unroll
    for (int i_block = 0; i_block < GROUP; i_block++) {
      const int listed = GROUP * i + i_block;
      if (listed < whole) continue;
      const MaskPlace place = kept_place(kept);
      const int first_key = listed < count ? list[listed] * BLOCK_N + first : place.lengths.k;
      mask_scores<M, N>(of_block(s, i_block), place.first, first_key, place.lengths, params.is_causal);
    }
  };
  auto groups_of = [](int n) { return (n + GROUP - 1) / GROUP; };
  auto store_results = [&](const float(&end)[R]) {
    // And its exponent instead of r.
    const QueryTile tile = tile_again();
#pragma unroll
    for (int i = 0; i < R; i++) {
      const int row = tile.first + row_of<M>(i);
      if (lane_of() % 4 != 0 || row >= params.seqlen_q) continue;
      params.tau[tile.row + row] = end[i];
      if constexpr (IS_BF16<T>) params.slopes[tile.row + row] = NextSlope::of_step<ALPHA>(f[i], g[i], 1 / tile.exponent);
    }
    if (threadIdx.x == 0) params.counts[tile.index] = has_bad ? count | BAD_TILE : count;
  };
  if constexpr (ENTRIES) {
    constexpr int ROOM = D > 64 ? 164 : 204;  // a multiple of 4, but not of 8: then quads read from different banks
    static_assert(BLOCK_N == 2 * RowEntries<ROOM>::PAIRS && ENTRY_BLOCKS * BLOCK_N / 2 <= 1 << 16);
    // Where queries and keys were.
    static_assert(::ENTRIES * 6 <= (BEFORE_KEYS + RING) * static_cast<int>(sizeof(T)));
    RowEntries<ROOM> entries(scratch + 32, reinterpret_cast<unsigned short*>(scratch + 32 + THREADS / 4 * ROOM));
    unsigned* has_many = reinterpret_cast<unsigned*>(scratch) + 16;  // for four iterations in turn
    int n_steps = params.by_entries && !has_bad ? groups_of(count) : 0;
    float bound[R];  // of the scores; a little lower, for its rounding
#pragma unroll
    for (int i = 0; i < R; i++) bound[i] = tau[i] / c * (tau[i] > 0 ? 1 - 1e-6f : 1 + 1e-6f);
    if (threadIdx.x < 4) has_many[threadIdx.x] = 0;
    __syncthreads();
    auto list_entries = [&](int i, int stage) {
#pragma unroll 1
      for (int first = 0; first < BLOCK_N; first += KEYS) {
        float s[M][SPAN][4];
        form_scores(s, i, stage, first);
#pragma unroll
        for (int column = 0; column < SPAN; column++) {
          const float(&x)[4] = s[0][column];
          if (any_sync(fmaxf(x[0], x[1]) > bound[0] || fmaxf(x[2], x[3]) > bound[1]))
            entries.add(x, bound, GROUP * i + column / N, (first + column_of(column % N, 0)) / 2);
        }
      }
      bool is_much = entries.is_full();
      // If it goes on like this, the warp's lists will be full.
      if (const int n = GROUP * (i + 1); n % 8 == 0)
        is_much |= warp_sum(static_cast<float>(entries.count())) * count > 32 * ROOM * n;
      if (is_much) atomic_or(has_many + i % 4, 1u);
      if (has_many[(i + 3) % 4]) n_steps = 0;
    };
    pipeline<STAGES / GROUP, WGMMA>(n_steps, ahead, list_entries);
    // Again, so that no register kept it.
    const QueryTile tile = tile_again();
    load_tau(tile);
    const bool has_all = has_many[0] + has_many[1] + has_many[2] + has_many[3] == 0;
    if (n_steps > 0 && has_all) {
      float end[R] = {tau[0], tau[1]};
      const EntryPlaces places =
          solve_by_entries<ALPHA, WARPS>(entries, end, f, g, c, r, reinterpret_cast<int*>(scratch));
      const EntryList saved = entry_list<BLOCK_M>(params.entries, params, tile.row, tile.first);
      // Without a backward pass too, so that out has the same bits.
      if (places.total <= min(ENTRIES_PER_BLOCK<D, WGMMA> * count, saved.capacity)) {
        attend_by_entries<T, D, ALPHA, BLOCK_M, BLOCK_N, WARPS>(params, tile, entries, places, saved, list, end,
                                                                q_tile, c, r);
        return;
      }
      unsigned char* has_support = reinterpret_cast<unsigned char*>(q_tile);
      fill<THREADS, unsigned char>(has_support, count, 0);
      __syncthreads();
#pragma unroll
      for (int row = 0; row < 2; row++)
        for (int i = lane_of() % 4; i < entries.count(row); i += 4)
          if (entries.u_at(row, i, c, end[row]) > 0) has_support[entries.block_of(row, i)] = 1;
      __syncthreads();
      count = shorten<WARPS>(list, count, reinterpret_cast<int*>(scratch), [&](int i) { return has_support[i] != 0; });
      store_results(end);
      return;
    }
    if (LEAVE && !has_all) load_queries(tile);  // again, too
  }

  const int words_per_tile = (params.n_blocks + WORD - 1) / WORD;
  unsigned* words = params.words + tile.index * words_per_tile;
  // In units of the mean u, f / g. After a step d the next is of order d ** 2 for r >= 2, and of order d ** r below.
  const float tolerance =
      exp2f(log2f(params.target) * fmaxf(0.5f, tile.exponent)) * fminf(2 * tile.exponent, 1.0f);
  float largest = 2 * tolerance;
  fill<THREADS>(words, words_per_tile, 0u);
  __syncthreads();
  Marks marks;
  auto write_word = [&](int i_word, unsigned bits) {
    if (lane_of() == 0) atomic_or(words + i_word, bits);
  };
  for (int step = 0; step < MAX_STEPS && largest > tolerance; step++) {
#pragma unroll
    for (int row = 0; row < R; row++) f[row] = g[row] = 0;
    auto take_blocks = [&](int i, int stage) {
      bool has_support[GROUP] = {};
#pragma unroll 1
      for (int first = 0; first < BLOCK_N; first += KEYS) {
        float s[M][SPAN][4];
        form_scores(s, i, stage, first);
#pragma unroll
        for (int i_block = 0; i_block < GROUP; i_block++)
          has_support[i_block] |= add_weights<ALPHA>(f, g, of_block(s, i_block), tau, c, r);
      }
      if (step > 0) return;  // the list is shortened once
#pragma unroll
      for (int i_block = 0; i_block < GROUP; i_block++)
        marks.add(GROUP * i + i_block, has_support[i_block], write_word);
    };
    pipeline<STAGES / GROUP, WGMMA>(groups_of(count), ahead, take_blocks);
    quad_sums(f, g);
    if (step == 0 && !has_bad) {
      marks.finish(groups_of(count) * GROUP, write_word);
      __syncthreads();
      count = shorten<WARPS>(list, count, reinterpret_cast<int*>(scratch), [&](int i) { return bit_of(words, i); });
      __syncthreads();
      whole = whole_of<BLOCK_M, BLOCK_N>(list, count, n_whole);
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
  store_results(tau);
}
