// What the kernels share: their arguments, alpha's powers, masks, tiles in shared memory, lists and reductions.
//
// Notation of adasplash2/contract.py: z = c * s with s = q . k and c = (alpha - 1) * |scale| (the sign of the scale
// goes into q, or into k), u = max(z - tau, 0), p = u ** r, w = u ** (r - 1), r = 1 / (alpha - 1).
//
// A tile is BLOCK_M queries of one head, a block BLOCK_N keys. `live` has a byte for each tile and block: what support
// it holds (entries.cuh). Rows that see no key have tau = +inf; rows with a query that is not finite, or that see a key
// that is not, have tau = NaN.
#pragma once

#include "ptx.cuh"

constexpr int ALPHA_ANY = 0;
constexpr int ALPHA_1_5 = 1;
constexpr int ALPHA_2 = 2;

constexpr float LARGE = 3e38f;
constexpr float SMALL = 1e-30f;
constexpr float SMALLEST = 1.2e-38f;  // whose logarithm is taken, and whose reciprocal is finite
constexpr float LN_2 = 0.69314718f;

constexpr int KEYS_PER_CHECK = 128;
constexpr int WORD = 32;
constexpr int BINS = 16;
constexpr int INIT_STEPS = 4;

// Added to `counts` by refine where a row of the tile has no tau.
constexpr int BAD_TILE = 1 << 30;

struct NextSlope;

// As backend.py lays it out: maps first, then eight bytes, then four. Strides are in elements.
struct Params {
  TensorMap map_of_q, map_of_k, map_of_v, map_of_o;
  const void* q;
  const void* k;
  const void* v;
  const void* dout;
  void* out;
  unsigned* entries;
  float* tau;
  float* delta;
  void* dq;
  void* dk;
  void* dv;
  float* dalpha;
  unsigned* transposed;
  signed char* live;
  unsigned* words;
  int* list;
  int* counts;
  int* first_bad;
  const float* alpha_heads;
  const long long* seqlens_q;
  const long long* seqlens_k;
  int* sizes;
  signed char* block_map;
  int* flags;
  float* maxima;
  NextSlope* slopes;
  long long stride_qb, stride_qh, stride_qm;
  long long stride_kb, stride_kh, stride_kn;
  long long stride_vb, stride_vh, stride_vn;
  long long stride_ob, stride_oh, stride_om;
  float alpha_minus_1;
  float scale;  // its magnitude, 1 for 0
  float target;
  int sign;  // of the scale
  int is_causal;
  int heads_q, heads_kv;
  int seqlen_q, seqlen_k;
  int head_dim, head_dim_v;
  int n_tiles, n_blocks, n_chunks, n_checks;
  int aligned_q, aligned_k, aligned_v, aligned_o;  // rows start at, and consist of, whole 16 bytes
  int map_m, map_n, map_rows, map_columns;
  int by_entries;  // whether tiles may be entry tiles
  int n_row_tiles, n_splits, n_slots, split, slot;  // decode.cu
  int heads_apart_q, heads_apart_k, heads_apart_v, heads_apart_o;  // two sequences, in a map
};

struct alignas(16) Vec4 {
  float x, y, z, w;
};

// ---- alpha

// Of a score; 0 if it or tau is NaN. A bound of tau from below, too, leaves it at most 1, and a product that is clamped to
// [0, 1] costs nothing more, a maximum an instruction at half rate.
__device__ __forceinline__ float u_of(float s, float c, float tau) { return saturated(s, c, -tau); }

// What a row with this tau adds to its results: NaN where it has none, else 0.
__device__ __forceinline__ float nan_of(float tau) { return tau != tau ? not_a_number() : 0.0f; }

template <int ALPHA>
__device__ __forceinline__ void powers(float u, float r, float& p, float& w) {
  if constexpr (ALPHA == ALPHA_1_5) {
    w = u;
    p = u * u;
  } else if constexpr (ALPHA == ALPHA_2) {
    w = saturated(u, LARGE, 0.0f);
    p = u;
  } else {
    // At u = 0 the logarithm is -inf, and w is 0, as long as it is multiplied by more than 0, which alpha = 2 needs.
    w = exp2_approx(fmaxf(r - 1, SMALL) * log2_approx(u));
    p = w * u;
  }
}

// The step on the norm of u from f = sum u ** r and g = sum u ** (r - 1): from below it does not pass tau.
template <int ALPHA>
__device__ __forceinline__ float newton_step(float f, float g, float r) {
  float power;
  if constexpr (ALPHA == ALPHA_1_5) {
    power = sqrtf(f);
  } else if constexpr (ALPHA == ALPHA_2) {
    power = f > 0 ? 1.0f : 0.0f;
  } else {
    power = f > 0 ? exp2f((1 - 1 / r) * log2f(f)) : 0.0f;
  }
  return g > 0 ? (f - power) / g : 0.0f;
}

// Of the step from f and g what the slope after it, g then, needs besides f. f falls by r times the step, times the mean of
// the slopes before and after: so the latter is (a - b f) g. Where it falls by less than two thousandths, its rounding would
// show; and g, which falls no faster, is as good.
struct NextSlope {
  float g, a, b;

  template <int ALPHA>
  static __device__ __forceinline__ NextSlope of_step(float f, float g, float r) {
    const float fall = r * newton_step<ALPHA>(f, g, r) * g;
    return fall > 2e-3f * f ? NextSlope{g, 2 * f / fall - 1, 2 / fall} : NextSlope{g, 1, 0};
  }

  __device__ __forceinline__ float at(float f) const { return g * fminf(fmaxf(a - b * f, 0.5f), 1.0f); }
};

// phi(y) = exp(y) - 1 - y, by its series where the difference cancels.
__device__ __forceinline__ float surprise(float y) {
  const float series =
      1 / 2.0f + y * (1 / 6.0f + y * (1 / 24.0f + y * (1 / 120.0f + y * (1 / 720.0f + y * (1 / 5040.0f)))));
  return y < 0.25f ? y * y * series : exp2_approx(y * (1 / LN_2)) - 1 - y;
}

// What the keys of a row add up to for the gradient of its alpha. The sum of p, which is 1 but for rounding, is in b: then
// what rounding does to all of a row alike takes nothing from 0 where the keys are equal.
struct AlphaSums {
  float phi = 0, b = 0, b_dp = 0, a_dp = 0;

  // A key with u > 0.
  __device__ __forceinline__ void add_u(float u, float p, float dp) {
    add(fmaxf(-LN_2 * log2_approx(fmaxf(u, SMALLEST)), 0.0f), p, dp);
  }

  // y = -log u.
  __device__ __forceinline__ void add(float y, float p, float dp) {
    const float a = p * surprise(y), of_key = p * (1 + y);
    phi += a;
    b += of_key;
    b_dp += of_key * dp;
    a_dp += a * dp;
  }

  // Each by `sum` over the threads that share the row; w_sum is that of w, or 1. It may be so small that a product with it
  // is 0.
  template <class Sum>
  __device__ __forceinline__ float gradient(float exponent, float w_sum, Sum&& sum) const {
    return (sum(phi) * sum(b_dp) - sum(b) * sum(a_dp)) / w_sum / (exponent * exponent);
  }
};

__device__ __forceinline__ float exponent_of(const Params& params, int i_h) {
  return params.alpha_heads ? params.alpha_heads[i_h] - 1 : params.alpha_minus_1;
}

// Whether the kernels of forward have to do with the heads that share these keys: decode.cu leaves flags behind.
__device__ __forceinline__ bool is_asked_for(const Params& params, int i_b, int i_kv) {
  return !params.flags || params.flags[i_b * params.heads_kv + i_kv] != 0;
}

// At the end of each program of a kernel that does not wait for the one before otherwise: it ends after that all the same,
// as its last program, which begins when no other needs its place, does.
__device__ __forceinline__ void end_behind_kernel_before() {
  if (blockIdx.x == gridDim.x - 1) wait_for_kernel_before();
}

// ---- what is seen

struct Lengths {
  int q, k;
};

// Whatever the tensors hold, inside the memory.
__device__ __forceinline__ Lengths lengths_of(const Params& params, int i_b) {
  Lengths lengths{params.seqlen_q, params.seqlen_k};
  if (params.seqlens_q) lengths.q = static_cast<int>(min(max(params.seqlens_q[i_b], 0LL), (long long)lengths.q));
  if (params.seqlens_k) lengths.k = static_cast<int>(min(max(params.seqlens_k[i_b], 0LL), (long long)lengths.k));
  return lengths;
}

// How many keys, from the first one, a query sees.
__device__ __forceinline__ int keys_seen(int row, Lengths lengths, bool is_causal) {
  if (row >= lengths.q) return 0;
  return is_causal ? min(max(row + 1 + lengths.k - lengths.q, 0), lengths.k) : lengths.k;
}

// Rows whose queries count: those that see no key, and the padding, may hold anything.
struct Rows {
  int low, high;
};

__device__ __forceinline__ Rows rows_that_see(Lengths lengths, bool is_causal) {
  return Rows{is_causal ? max(lengths.q - lengths.k, 0) : 0, lengths.q};
}

// One tile of queries of one head, and the keys that it sees.
struct QueryTile {
  int i_b, i_h, i_kv;  // i_kv among the key heads of the batch entry
  int i_m, first;
  long long index;  // of the tile among all
  long long row;    // of the head's first query among all
  Lengths lengths;
  int everyone, anyone;  // keys that each valid query sees, and that any does
  float exponent;
};

// Numbers of k that programs which run at the same time may read, and as many of v, so that they stay in the L2 cache.
constexpr long long READ_TOGETHER = 1 << 23;

// A head, and which of its n tiles or blocks.
struct Turn {
  int i_bh, i;
};

// Of a program among all. The first ones of several heads come first, then the second ones: where these are the longest,
// those that begin last, when others are through, are short.
__device__ __forceinline__ Turn turn_of(const Params& params, int program, int n_programs, int n) {
  const long long of_head = max(static_cast<long long>(params.seqlen_k) * params.head_dim, 1LL);
  const int heads = n_programs / n;
  const int most = min(max(static_cast<int>(READ_TOGETHER / of_head), 1), heads);
  const int first = program / (most * n) * most, rest = program - first * n, together = min(most, heads - first);
  return Turn{first + rest % together, rest / together};
}

__device__ __forceinline__ Turn kept_turn(const int* scratch) { return Turn{scratch[30], scratch[31]}; }

// What the threads of a program know of its turn comes from the last numbers of `scratch`, and there it stays: registers
// that would keep it to the end are needed by sums.
__device__ __forceinline__ Turn keep_turn(Turn turn, int* scratch) {
  if (threadIdx.x == 0) {
    scratch[30] = turn.i_bh;
    scratch[31] = turn.i;
  }
  __syncthreads();
  return kept_turn(scratch);
}

// With PARTS, so many programs share a tile: the rows are those of a part.
template <int BLOCK_M, int PARTS = 1>
__device__ __forceinline__ QueryTile query_tile(const Params& params, Turn turn) {
  constexpr int ROWS = BLOCK_M / PARTS;
  QueryTile tile;
  const int i_bh = turn.i_bh;
  // The longest first, where the mask is causal.
  tile.i_m = params.n_tiles - 1 - turn.i;
  tile.first = tile.i_m * BLOCK_M + static_cast<int>(blockIdx.x % PARTS) * ROWS;
  tile.i_b = i_bh / params.heads_q;
  tile.i_h = i_bh % params.heads_q;
  tile.i_kv = tile.i_h / (params.heads_q / params.heads_kv);
  tile.index = static_cast<long long>(i_bh) * params.n_tiles + tile.i_m;
  tile.row = static_cast<long long>(i_bh) * params.seqlen_q;
  tile.lengths = lengths_of(params, tile.i_b);
  const int last = min(tile.first + ROWS, tile.lengths.q) - 1;
  tile.everyone = tile.first < tile.lengths.q ? keys_seen(tile.first, tile.lengths, params.is_causal) : 0;
  tile.anyone = tile.first < tile.lengths.q ? keys_seen(last, tile.lengths, params.is_causal) : 0;
  tile.exponent = exponent_of(params, tile.i_h);
  return tile;
}

template <int PARTS>
__device__ __forceinline__ Turn tile_turn(const Params& params) {
  return turn_of(params, blockIdx.x / PARTS, gridDim.x / PARTS, params.n_tiles);
}

template <int BLOCK_M, int PARTS = 1>
__device__ __forceinline__ QueryTile query_tile(const Params& params) {
  return query_tile<BLOCK_M, PARTS>(params, tile_turn<PARTS>(params));
}

// What a mask needs to know: the first query of the tile, or key of the block, and the lengths.
struct MaskPlace {
  int first;
  Lengths lengths;
};

__device__ __forceinline__ MaskPlace kept_place(const int* scratch) {
  return MaskPlace{scratch[27], Lengths{scratch[28], scratch[29]}};
}

// It stays in `scratch` as the turn does; seen by all after a barrier.
__device__ __forceinline__ void keep_place(MaskPlace place, int* scratch) {
  if (threadIdx.x != 0) return;
  scratch[27] = place.first;
  scratch[28] = place.lengths.q;
  scratch[29] = place.lengths.k;
}

template <class T>
__device__ __forceinline__ const T* head_of(const void* base, long long i_b, long long stride_b, long long i_h,
                                            long long stride_h) {
  return static_cast<const T*>(base) + i_b * stride_b + i_h * stride_h;
}

// The rows of one head, and where a map has them.
template <class T>
struct HeadRows {
  const T* base;
  long long stride;
  int width;
  bool is_aligned;
  const TensorMap* map;
  int i_head;
};

template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_q(const Params& params, int i_b, int i_h) {
  return {head_of<T>(params.q, i_b, params.stride_qb, i_h, params.stride_qh),
          params.stride_qm,
          params.head_dim,
          params.aligned_q != 0,
          &params.map_of_q,
          i_b * params.heads_apart_q + i_h};
}

template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_k(const Params& params, int i_b, int i_kv) {
  return {head_of<T>(params.k, i_b, params.stride_kb, i_kv, params.stride_kh),
          params.stride_kn,
          params.head_dim,
          params.aligned_k != 0,
          &params.map_of_k,
          i_b * params.heads_apart_k + i_kv};
}

template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_v(const Params& params, int i_b, int i_kv) {
  return {head_of<T>(params.v, i_b, params.stride_vb, i_kv, params.stride_vh),
          params.stride_vn,
          params.head_dim_v,
          params.aligned_v != 0,
          &params.map_of_v,
          i_b * params.heads_apart_v + i_kv};
}

template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_dout(const Params& params, int i_b, int i_h) {
  return {head_of<T>(params.dout, i_b, params.stride_ob, i_h, params.stride_oh),
          params.stride_om,
          params.head_dim_v,
          params.aligned_o != 0,
          &params.map_of_o,
          i_b * params.heads_apart_o + i_h};
}

// ---- tiles in shared memory: rows of D numbers in chunks of 16 bytes, each eight chunks permuted by the row, so that
// the same chunk of eight rows lies in different banks. Of rows of 256 bytes the two halves of eight rows lie apart, as
// wgmma reads them; tiles start at multiples of 1024 bytes for it.

template <class T>
constexpr int PER_CHUNK = 16 / static_cast<int>(sizeof(T));

template <class T, int D>
constexpr int CHUNKS = D / PER_CHUNK<T>;

template <class T, int D, int ROWS>
constexpr int TILE_BYTES = D * ROWS * static_cast<int>(sizeof(T));

template <class T, int D>
__device__ __forceinline__ int place_of(int row, int chunk) {
  const int permuted = (chunk ^ row) & 7;
  if constexpr (CHUNKS<T, D> <= 16)
    return ((row & ~7) * CHUNKS<T, D> + (chunk & ~7) * 8 + (row & 7) * 8 + permuted) * PER_CHUNK<T>;
  return (row * CHUNKS<T, D> + (chunk & ~7) + permuted) * PER_CHUNK<T>;
}

template <class T, int D>
__device__ __forceinline__ T& element(T* tile, int row, int column) {
  return tile[place_of<T, D>(row, column / PER_CHUNK<T>) + column % PER_CHUNK<T>];
}

// How many copies are asked for together, as one that is not asynchronous holds four registers until it is done; and so the
// heads up to which rows of half precision stay in registers (products.cuh).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int COPIES = 2;
constexpr int KEPT_HEAD = 64;
#else
constexpr int COPIES = 8;
constexpr int KEPT_HEAD = 128;
#endif

// Whether the compiler finds registers for two such operands, as dkv has them, and for other ways to load a tile.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool HAS_MORE_ROOM = false;
#else
constexpr bool HAS_MORE_ROOM = true;
#endif

// Whether a kernel has few registers for addresses: float32's dkv, but at 256 channels on sm_90, whose compiler finds more.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <class T, int D>
constexpr bool HAS_FEW = sizeof(T) == 4 && D <= 128;
#else
template <class T, int D>
constexpr bool HAS_FEW = sizeof(T) == 4;
#endif

// Rows from `first` on, zero outside low <= row < high and past the head's width. Other memory is not read. FAST: in fewer
// instructions where the rows lie whole inside the memory, for which some kernels have no registers. The stride of rows that
// are aligned is below 2 ** 31 (backend.py).
template <class T, int D, int ROWS, int THREADS, bool FAST = HAS_MORE_ROOM && sizeof(T) == 2 && D <= 128>
__device__ __forceinline__ void load_tile(T* tile, const HeadRows<T>& rows, int first, int low, int high) {
  static_assert(THREADS % CHUNKS<T, D> == 0 || CHUNKS<T, D> % THREADS == 0);
  constexpr int STEP = THREADS > CHUNKS<T, D> ? THREADS / CHUNKS<T, D> : 1;
  // One address a thread; what is added to it is the same for all threads.
  auto place = [](int row, int i, int chunk) {
    return STEP % 8 == 0 ? place_of<T, D>(row, chunk) + i * D : place_of<T, D>(row + i, chunk);
  };
  const int row = static_cast<int>(threadIdx.x) / CHUNKS<T, D>;
  auto load = [&](int chunk) {
    const int column = chunk * PER_CHUNK<T>;
    const T* from = rows.base + first * rows.stride + (row * rows.stride + column);
    auto is_valid = [&](int i) { return row + first >= low - i && row + first < high - i && column < rows.width; };
    const bool is_whole = rows.is_aligned && rows.width >= D && first >= low && first <= high - ROWS;
    if (FAST && STEP % 8 == 0 && ROWS % STEP == 0 && is_whole) {
      // Each address is made of the one before: copies that are asked for one right behind the other hold up the products.
#pragma unroll(COPIES)
      for (int i = 0; i < ROWS; i += STEP) {
        if (i > 0) from = bytes_behind(from, static_cast<unsigned>(rows.stride), STEP * sizeof(T));
        cp_async_16(tile + place(row, i, chunk), from, true);
      }
    } else if (rows.is_aligned) {
#pragma unroll(ROWS / STEP > 8 || HAS_FEW<T, D> ? 2 : COPIES)
      for (int i = 0; i < ROWS; i += STEP) {
        if (ROWS % STEP != 0 && i + row >= ROWS) break;
        cp_async_16(tile + place(row, i, chunk), is_valid(i) ? from + i * rows.stride : rows.base, is_valid(i));
      }
    } else {
      // Rolled, because many loads under way would need as many registers.
#pragma unroll 1
      for (int i = 0; i < ROWS; i += STEP) {
        if (ROWS % STEP != 0 && i + row >= ROWS) break;
        T* to = tile + place(row, i, chunk);
#pragma unroll
        for (int e = 0; e < PER_CHUNK<T>; e++)
          to[e] = is_valid(i) && column + e < rows.width ? from[i * rows.stride + e] : from_float<T>(0.0f);
      }
    }
  };
  if constexpr (THREADS >= CHUNKS<T, D>) {
    load(static_cast<int>(threadIdx.x) % CHUNKS<T, D>);
  } else {
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x); chunk < CHUNKS<T, D>; chunk += THREADS) load(chunk);
  }
}

// Rows that a box of a map has (backend.py).
constexpr int BOX_ROWS = 64;

// Tiles of a head's rows from low to high; what else a tile has is 0.
template <class T, int D, int ROWS, int THREADS>
class TileLoader {
  T* tiles;
  HeadRows<T> rows;
  int low, high;

 public:
  static constexpr int BYTES = TILE_BYTES<T, D, ROWS>;

  __device__ __forceinline__ TileLoader(T* tiles, const HeadRows<T>& rows, int low, int high)
      : tiles(tiles), rows(rows), low(low), high(high) {}

  __device__ __forceinline__ bool is_whole(int first) const { return first >= low && first <= high - ROWS; }

  // By the threads.
  __device__ __forceinline__ void load(int i_tile, int first) const {
    load_tile<T, D, ROWS, THREADS>(tiles + i_tile * ROWS * D, rows, first, low, high);
  }

  // The same, of rows that a map has, in few instructions.
  __device__ __forceinline__ void load_part(int i_tile, int first) const {
    T* tile = tiles + i_tile * ROWS * D;
    const int thread = static_cast<int>(threadIdx.x) % THREADS, chunk = thread % CHUNKS<T, D>;
#pragma unroll 1
    for (int row = thread / CHUNKS<T, D>; row < ROWS; row += THREADS / CHUNKS<T, D>) {
      const bool is_valid = first + row >= low && first + row < high;
      const T* from = rows.base + (is_valid ? (first + row) * rows.stride + chunk * PER_CHUNK<T> : 0);
      cp_async_16(tile + place_of<T, D>(row, chunk), from, is_valid);
    }
  }

  // By the bulk copy engine, where the tile is whole.
  __device__ __forceinline__ void copy(int i_tile, int first, unsigned long long* arrival) const {
#pragma unroll
    for (int row = 0; row < ROWS; row += BOX_ROWS)
      bulk_copy_rows(tiles + (i_tile * ROWS + row) * D, *rows.map, (first + row) / 8, rows.i_head, arrival);
  }
};

// The same of a number for each row, the head's first one being number `start` of all.
template <int ROWS>
class NumberLoader {
  float* to;
  const float* from;
  long long start;
  int low, high;

 public:
  static constexpr int BYTES = ROWS * static_cast<int>(sizeof(float));

  __device__ __forceinline__ NumberLoader(float* to, const float* from, long long start, int low, int high)
      : to(to), from(from), start(start), low(low), high(high) {}

  __device__ __forceinline__ bool is_whole(int first) const { return first >= low && first <= high - ROWS; }

  __device__ __forceinline__ void load(int i_tile, int first) const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= ROWS) return;
    const bool is_valid = first + row >= low && first + row < high;
    cp_async_4(to + i_tile * ROWS + row, from + (is_valid ? start + first + row : 0), is_valid);
  }

  __device__ __forceinline__ void load_part(int i_tile, int first) const { load(i_tile, first); }

  __device__ __forceinline__ void copy(int i_tile, int first, unsigned long long* arrival) const {
    bulk_copy(to + i_tile * ROWS, from + (start + first), BYTES, arrival);
  }
};

// Asks the bulk copy engine for what a stage needs of each loader: GROUP tiles, which begin at `firsts`; `asks` is true for
// one of the loaders' threads. What is not whole they copy themselves.
template <int GROUP, class... Loaders>
__device__ __forceinline__ void ask_for(unsigned long long* arrival, int stage, const int (&firsts)[GROUP], bool asks,
                                        const Loaders&... loaders) {
  bool are_whole = true;
#pragma unroll
  for (int i = 0; i < GROUP; i++) are_whole &= (loaders.is_whole(firsts[i]) && ...);
  if (are_whole) {
    if (asks) {
      mbarrier_arrive(arrival, GROUP * (Loaders::BYTES + ...));
#pragma unroll
      for (int i = 0; i < GROUP; i++) (loaders.copy(GROUP * stage + i, firsts[i], arrival), ...);
    }
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; i++) (loaders.load_part(GROUP * stage + i, firsts[i]), ...);
    cp_async_commit();
    cp_async_wait<0>();
    wgmma_proxy_fence();
    // What other warps have copied is seen behind a barrier.
    syncwarp();
    if (asks) mbarrier_arrive(arrival, 0);
  }
}

// Mbarriers of a pipeline's stages, which tell when the bulk copy engine has brought what was asked for; with BULK false
// there are none, and threads copy.
template <bool BULK>
class Arrivals {
  unsigned long long* of_stages;

 public:
  static constexpr bool ARE_USED = BULK;

  // In numbers 8 to 15 of `scratch`, which nothing else has.
  __device__ __forceinline__ explicit Arrivals(void* scratch)
      : of_stages(static_cast<unsigned long long*>(scratch) + 8 / 2) {}

  __device__ __forceinline__ unsigned long long* of(int stage) const { return of_stages + stage; }

  // From here on the engine may write where threads have read and written.
  template <int STAGES>
  __device__ __forceinline__ void begin() const {
    static_assert(STAGES <= 4);
    if constexpr (BULK) {
      wgmma_proxy_fence();
      __syncthreads();
      if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) mbarrier_init(of(stage), 1);
        wgmma_proxy_fence();
      }
    }
  }

  // After a barrier.
  template <int STAGES>
  __device__ __forceinline__ void end() const {
    if constexpr (BULK) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) mbarrier_invalidate(of(stage));
      }
    }
  }

  // By all threads.
  template <int GROUP, class... Loaders>
  __device__ __forceinline__ void load(int stage, const int (&firsts)[GROUP], const Loaders&... loaders) const {
    if constexpr (BULK) {
      ask_for(of(stage), stage, firsts, threadIdx.x == 0, loaders...);
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; i++) (loaders.load(GROUP * stage + i, firsts[i]), ...);
    }
  }
};

// The tile times the sign of the scale; `sync` is a barrier of the threads that do it.
template <class T, int D, int ROWS, int THREADS, class Sync>
__device__ __forceinline__ void apply_sign(T* tile, int sign, Sync&& sync) {
  if (sign == 1) return;
  for (int i = threadIdx.x; i < ROWS * D; i += THREADS) tile[i] = from_float<T>(to_float<T>(tile[i]) * sign);
  sync();
}

template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void apply_sign(T* tile, int sign) {
  apply_sign<T, D, ROWS, THREADS>(tile, sign, []() { __syncthreads(); });
}

// ---- threads of a row: a quad holds columns 8 i + 2 l and 8 i + 2 l + 1 of rows lane / 4 and lane / 4 + 8

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_of()) - 1; }

// A bit for each lane of this one's quad.
__device__ __forceinline__ unsigned bits_of_quad(bool predicate) { return ballot(predicate) >> lane_of() / 4 * 4 & 15; }

__device__ __forceinline__ unsigned lanes_before_in_quad() { return (1u << lane_of() % 4) - 1; }

__device__ __forceinline__ float quad_sum(float value) {
  value += shfl_xor(value, 1);
  return value + shfl_xor(value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, shfl_xor(value, 1));
  return fmaxf(value, shfl_xor(value, 2));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

__device__ __forceinline__ unsigned warp_or(unsigned bits) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) bits |= shfl_xor(bits, mask);
  return bits;
}

// Of each row.
template <int R>
__device__ __forceinline__ void quad_sums(float (&f)[R], float (&g)[R]) {
#pragma unroll
  for (int row = 0; row < R; row++) {
    f[row] = quad_sum(f[row]);
    g[row] = quad_sum(g[row]);
  }
}

// Row of a tile that part i (of 2 * M_TILES) of this thread's numbers belongs to.
template <int M_TILES>
__device__ __forceinline__ int row_of(int i) {
  return (warp_of() * M_TILES + i / 2) * 16 + i % 2 * 8 + lane_of() / 4;
}

// Column of element e of this thread in column tile n.
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + lane_of() % 4 * 2 + e; }

// Two neighbours of a row of `width` numbers, from an even column on; rows lie one behind the other, so that those of an
// even width start at a whole pair.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int width, float first, float second) {
  if (column >= width) return;
  if constexpr (sizeof(T) == 2) {
    if (width % 2 == 0) {
      *reinterpret_cast<unsigned*>(row + column) = pack2<T>(first, second);
      return;
    }
  }
  row[column] = from_float<T>(first);
  if (column + 1 < width) row[column + 1] = from_float<T>(second);
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&values)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) values[m][n][e] = 0;
}

// take(row, m, n, e) for each of this thread's numbers [m][n][e], one of its 2 M rows after the other.
template <int M, int N, class Take>
__device__ __forceinline__ void for_numbers(Take&& take) {
#pragma unroll
  for (int row = 0; row < 2 * M; row++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) take(row, row / 2, n, row % 2 * 2 + e);
}

// -inf where a query does not see a key; rows are queries from first_row on, columns keys.
template <int M, int N>
__device__ __forceinline__ void mask_scores(float (&s)[M][N][4], int first_row, int first_key, Lengths lengths,
                                            bool is_causal) {
#pragma unroll
  for (int i = 0; i < 2 * M; i++) {
    const int seen = keys_seen(first_row + row_of<M>(i), lengths, is_causal) - first_key;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (column_of(n, e) >= seen) s[i / 2][n][i % 2 * 2 + e] = -infinity();
  }
}

// Of all threads; `scratch` has room for a number per warp.
template <int WARPS>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shfl_xor(value, mask));
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < WARPS; i++) value = fmaxf(value, scratch[i]);
  return value;
}

template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < WARPS; i++) value += scratch[i];
  return value;
}

// ---- lists

// Where this thread's entry goes if it is kept, after `count` others; count grows by all that are kept. The caller's
// reads before are over, and its writes before are seen, when this returns.
template <int WARPS>
__device__ __forceinline__ int compact(bool is_kept, int& count, int* scratch) {
  const unsigned kept = ballot(is_kept);
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = popcount(kept);
  __syncthreads();
  int place = count + popcount(kept & lanes_before());
  for (int i = 0; i < WARPS; i++) {
    place += i < warp_of() ? scratch[i] : 0;
    count += scratch[i];
  }
  return place;
}

// The list without the entries i that are not kept; how many are.
template <int WARPS, class IsKept>
__device__ __forceinline__ int shorten(int* list, int count, int* scratch, IsKept&& is_kept) {
  int n_kept = 0;
  for (int first = 0; first < count; first += 32 * WARPS) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int entry = i < count ? list[i] : 0;
    const bool keeps = i < count && is_kept(i);
    const int at = compact<WARPS>(keeps, n_kept, scratch);
    if (keeps) list[at] = entry;
  }
  return n_kept;
}

// How many of the first listed blocks lie whole below n_whole: all but the last ones, as the list is in order, and of the
// blocks that a tile of BLOCK_M queries sees not whole there are but few.
template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ int whole_of(const int* list, int count, int n_whole) {
  int whole = count;
#pragma unroll
  for (int i = 1; i <= BLOCK_M / BLOCK_N + 1; i++) whole -= i <= count && list[count - i] >= n_whole;
  return whole;
}

__device__ __forceinline__ bool bit_of(const unsigned* words, int i) { return words[i / WORD] >> (i % WORD) & 1; }

// A bit for each of a list's blocks: whether a thread of the warp asks for it.
class Marks {
  unsigned bits = 0;

  template <class Write>
  __device__ __forceinline__ void write_word(int i_word, Write&& write) {
    write(i_word, warp_or(bits));
    bits = 0;
  }

 public:
  // Of block i, one after the other; write(i_word, bits) takes what is full.
  template <class Write>
  __device__ __forceinline__ void add(int i, bool is_set, Write&& write) {
    bits >>= 1;
    if (is_set) bits |= 1u << (WORD - 1);
    if ((i + 1) % WORD == 0) write_word(i / WORD, write);
  }

  // After `count` blocks.
  template <class Write>
  __device__ __forceinline__ void finish(int count, Write&& write) {
    if (count % WORD == 0) return;
    bits >>= WORD - count % WORD;
    write_word(count / WORD, write);
  }
};

template <int THREADS, class V>
__device__ __forceinline__ void fill(V* values, int n, V value) {
  for (int i = threadIdx.x; i < n; i += THREADS) values[i] = value;
}

// The entries below n that are listed, in order, as many at a time as there is room for: process(count) takes them from
// `list`, in shared memory, and returns with all threads having left it.
constexpr int LIST_ENTRIES = 1024;

template <int WARPS, class IsListed, class Process>
__device__ __forceinline__ void for_listed(int n, int* list, int* scratch, IsListed&& is_listed, Process&& process) {
  for (int first = 0; first < n;) {
    int count = 0;
    for (; first < n && count <= LIST_ENTRIES - 32 * WARPS; first += 32 * WARPS) {
      const int entry = first + static_cast<int>(threadIdx.x);
      const bool is_kept = entry < n && is_listed(entry);
      const int at = compact<WARPS>(is_kept, count, scratch);
      if (is_kept) list[at] = entry;
    }
    __syncthreads();
    process(count);
  }
}

// ---- the loop over blocks

// load(first, stage), for a later compute, of what place(i) says: its instructions are for the time in which the first
// products of this one are under way. EARLY: place(i) is asked a compute before, as it waits for global memory.
template <bool EARLY, bool BULK, class Place, class Load>
class Ahead {
  const Place& place;
  const Load& load;
  decltype(place(0)) first{};

 public:
  const Arrivals<BULK> arrivals;
  int i = 0, n = 0, stage = 0;  // which is due, of how many, and where it goes

  __device__ __forceinline__ Ahead(const Arrivals<BULK>& arrivals, const Place& place, const Load& load)
      : place(place), load(load), arrivals(arrivals) {}

  // Of the first n, more than 0.
  __device__ __forceinline__ void find() {
    if constexpr (EARLY) first = place(min(i, n - 1));
  }

  __device__ __forceinline__ void ask() {
    if (i < n) load(EARLY ? first : place(i), stage);
    if constexpr (!BULK) cp_async_commit();
    i++;
    find();
  }
};

template <bool EARLY = false, bool BULK, class Place, class Load>
__device__ __forceinline__ Ahead<EARLY, BULK, Place, Load> ahead_of(const Arrivals<BULK>& arrivals, const Place& place,
                                                                    const Load& load) {
  return Ahead<EARLY, BULK, Place, Load>(arrivals, place, load);
}

template <class Place, class Load>
__device__ __forceinline__ Ahead<false, false, Place, Load> ahead_of(const Place& place, const Load& load) {
  return ahead_of(Arrivals<false>(nullptr), place, load);
}

struct Itself {
  __device__ __forceinline__ int operator()(int i) const { return i; }
};

// One turn of a loop after the other: its stage, and the parity of the stage's phase.
template <int STAGES>
struct Round {
  int i = 0, stage = 0, parity = 0;

  __device__ __forceinline__ void go_on() {
    i++;
    if (stage == STAGES - 1) parity ^= 1;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
};

// ahead asks for what compute(i, stage) needs; as many loads are under way ahead of each compute as there are other
// stages, but for LAG: so many computes later a stage may still be read. A compute may lower n, the same for all threads.
// On return no load is under way and all threads have left the buffers. With WGMMA, products by wgmma see what was loaded;
// a compute finishes its own, and asks `ahead` for the load that is due.
template <int STAGES, bool WGMMA = false, int LAG = 0, class Loads, class Compute>
__device__ __forceinline__ void pipeline(const int& n, Loads&& ahead, Compute&& compute) {
  constexpr bool BULK = decltype(ahead.arrivals)::ARE_USED;
  constexpr int AHEAD = STAGES - 1 - LAG;
  static_assert(AHEAD > 0 || STAGES == 1);
  static_assert(!BULK || (WGMMA && STAGES > 1));
  if (n <= 0) return;
  const int all = n;
  ahead.arrivals.template begin<STAGES>();
  ahead.i = 0;
  ahead.n = n;
  ahead.find();
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    ahead.stage = i;
    ahead.ask();
  }
  Round<STAGES> at;
#pragma unroll 1
  while (at.i < n) {
    if constexpr (STAGES == 1) {
      __syncthreads();
      ahead.ask();
    }
    if constexpr (!BULK) {
      cp_async_wait<STAGES == 1 ? 0 : AHEAD - 1>();
      if constexpr (WGMMA) wgmma_proxy_fence();
    }
    __syncthreads();
    if constexpr (BULK) mbarrier_wait(ahead.arrivals.of(at.stage), at.parity);
    if constexpr (STAGES > 1) {
      ahead.n = n;
      ahead.i = at.i + AHEAD;
      ahead.stage = at.stage <= LAG ? at.stage + AHEAD : at.stage - LAG - 1;
      if constexpr (!WGMMA) ahead.ask();
    }
    compute(at.i, at.stage);
    at.go_on();
  }
  if constexpr (BULK) {
    for (const int asked = min(at.i + AHEAD, all); at.i < asked; at.go_on())
      mbarrier_wait(ahead.arrivals.of(at.stage), at.parity);
  } else {
    cp_async_wait<0>();
  }
  __syncthreads();
  ahead.arrivals.template end<STAGES>();
}

// ---- the same with warps of their own for the loads

// Registers that a thread of these keeps, and what is left for each thread of the WARPS others: all are launched with the
// same number, a multiple of eight.
constexpr int FEW_REGISTERS = 24;

template <int WARPS, int PRODUCERS, int PROGRAMS>
constexpr int LAUNCHED_REGISTERS = 65536 / (32 * (WARPS + PRODUCERS) * PROGRAMS) / 8 * 8;

template <int WARPS, int PRODUCERS, int PROGRAMS>
constexpr int MOST_REGISTERS =
    (LAUNCHED_REGISTERS<WARPS, PRODUCERS, PROGRAMS> * (WARPS + PRODUCERS) - FEW_REGISTERS * PRODUCERS) / WARPS / 8 * 8;

// STAGES that one warp fills by the bulk copy engine, and WARPS others use, each warpgroup at its own pace: two mbarriers
// for each stage, of which one tells that it is full and the other one that it is free, take the place of barriers.
template <int STAGES, int WARPS>
class Ring {
  unsigned long long *full, *free;

 public:
  // In numbers 8 to 23 of `scratch`, which nothing else has.
  __device__ __forceinline__ explicit Ring(void* scratch)
      : full(Arrivals<true>(scratch).of(0)), free(full + 4) {
    static_assert(STAGES <= 4);
  }

  // By one thread; seen by all after a barrier.
  __device__ __forceinline__ void begin() const {
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(free + stage, WARPS);
    }
    wgmma_proxy_fence();
  }

  // By the warp that asks for n loads, one tile of each loader, which has the warp's threads alone.
  template <class Place, class... Loaders>
  __device__ __forceinline__ void fill(int n, const Place& place, const Loaders&... loaders) const {
    int next = n > 0 ? place(0) : 0;
#pragma unroll 1
    for (Round<STAGES> at; at.i < n; at.go_on()) {
      const int first = next;
      next = place(min(at.i + 1, n - 1));
      // A lane that is late would take the phase after the one it waits for for another.
      syncwarp();
      mbarrier_wait(free + at.stage, at.parity ^ 1);
      ask_for(full + at.stage, at.stage, {first}, lane_of() == 0, loaders...);
    }
  }

  // By the others: compute(i, stage), which gives its stage back, or that of the compute before.
  template <class Compute>
  __device__ __forceinline__ void use(int n, Compute&& compute) const {
#pragma unroll 1
    for (Round<STAGES> at; at.i < n; at.go_on()) {
      mbarrier_wait(full + at.stage, at.parity);
      compute(at.i, at.stage);
    }
  }

  // The warp no longer reads it.
  __device__ __forceinline__ void give_back(int stage) const {
    syncwarp();
    if (lane_of() == 0) mbarrier_arrive(free + stage);
  }
};
