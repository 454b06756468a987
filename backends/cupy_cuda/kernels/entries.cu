// dq of entry tiles, which leaves the entries in the order in which dk and dv take them, and these.
#include "entries.cuh"

// A warp takes the entries of its 16 rows, 32 at a time.
template <class T, int D, int ALPHA, bool DALPHA, int BLOCK_M, int BLOCK_N, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) entmax_attn_bwd_dq_entries(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int ROWS = BLOCK_M / WARPS;
  static_assert(ROWS == 16);
  extern __shared__ __align__(128) unsigned char smem[];
  int* scratch = reinterpret_cast<int*>(smem);
  unsigned* pairs = reinterpret_cast<unsigned*>(scratch + 32);  // dp before
  unsigned* sorted_pairs = pairs + ENTRIES;
  unsigned short* sorted_codes = reinterpret_cast<unsigned short*>(sorted_pairs + ENTRIES);

  // It does not wait for dq, which has other tiles.
  let_kernel_behind_begin();
  const QueryTile tile = query_tile<BLOCK_M>(params);
  if (!(params.live[tile.index * params.n_blocks] & ENTRY_TILE)) return end_behind_kernel_before();
  const float r = 1 / tile.exponent;
  const T* k = head_of<T>(params.k, tile.i_b, params.stride_kb, tile.i_kv, params.stride_kh);
  const T* v = head_of<T>(params.v, tile.i_b, params.stride_vb, tile.i_kv, params.stride_vh);
  const T* dout = head_of<T>(params.dout, tile.i_b, params.stride_ob, tile.i_h, params.stride_oh);
  const EntryList entries = entry_list<BLOCK_M>(params.entries, params, tile.row, tile.first);
  const EntryList sorted = entry_list<BLOCK_M>(params.transposed, params, tile.row, tile.first);

  const int lane = lane_of();
  const int first_row = warp_of() * ROWS, first_query = tile.first + first_row;
  const int start = entries.starts()[first_row + min(lane, ROWS)];
  // How many entries of the warp lie in each block, then where they go.
  unsigned short* places = sorted_codes + ENTRIES + warp_of() * params.n_blocks;
  T* weights = reinterpret_cast<T*>(sorted_codes + ENTRIES + WARPS * ENTRY_BLOCKS) + warp_of() * WEIGHTS;
  for (int j = lane; j < params.n_blocks; j += 32) places[j] = 0;
  clear_weights(weights);
  {
    RowChunks<D> rows;
    load_row_chunks<T, D>(rows, dout, params.stride_om, first_query, params.seqlen_q, params.head_dim_v,
                          params.aligned_o);
    for_entries<ROWS>(entries, start, [&](int at, int key, int row, int n) {
      const float dp = multiply_rows<T, D>(rows, v, params.stride_vn, params.head_dim_v, params.aligned_v, key, row, n);
      if (lane < n) pairs[at] = __float_as_uint(dp);
    });
  }
  syncwarp();
  // Two lanes to a row.
  float w_sum = 0, w_dp = 0;
  AlphaSums alpha_sums;
  const int row_end = shfl(start, lane / 2 + 1);
#pragma unroll 4
  for (int at = shfl(start, lane / 2) + lane % 2; at < row_end; at += 2) {
    const float u = dequantise(entries.us()[at]), dp = __uint_as_float(pairs[at]);
    float p, w;
    powers<ALPHA>(u, r, p, w);
    w_sum += w;
    w_dp += w * dp;
    if constexpr (DALPHA) alpha_sums.add_u(u, p, dp);
  }
  auto row_sum = [](float x) { return x + shfl_xor(x, 1); };
  w_sum = row_sum(w_sum);
  w_sum = w_sum > 0 ? w_sum : 1.0f;
  const float delta = row_sum(w_dp) / w_sum;
  if constexpr (DALPHA) {
    const float gradient = alpha_sums.gradient(tile.exponent, w_sum, row_sum);
    if (lane % 2 == 0 && first_query + lane / 2 < params.seqlen_q)
      params.dalpha[tile.row + first_query + lane / 2] = gradient;
  }
  syncwarp();

  // p and ds; and how many entries lie in each block.
  for_entries<ROWS>(entries, start, [&](int at, int key, int row, int n) {
    const float row_delta = shfl(delta, 2 * row);
    const int block = lane < n ? key / BLOCK_N : -1;
    const Rank rank = rank_of(block);
    if (lane < n) {
      float p, w;
      powers<ALPHA>(dequantise(entries.us()[at]), r, p, w);
      pairs[at] = pack2<T>(p, w * (__uint_as_float(pairs[at]) - row_delta));
      if (rank.is_last) places[block] += rank.rank + 1;
    }
    syncwarp();
  });
  T* dq_rows = static_cast<T*>(params.dq) + (tile.row + first_query) * params.head_dim;
  // More channels at once would need as many registers.
#pragma unroll 1
  for (int channel = 0; channel < D; channel += 64) {
    const int width = params.head_dim - channel;
    RowSums<64> dq = {};
    for_entries<ROWS>(entries, start, [&](int at, int key, int row, int n) {
      const float ds = lane < n ? unpack2<T>(pairs[at]).y : 0.0f;
      add_rows<T, 64>(dq, weights, k + channel, params.stride_kn, width, params.aligned_k, key, row, ds, n);
    });
    store_sums<T, 64>(dq_rows + channel, dq, params.scale * params.sign, params.head_dim, width,
                      params.seqlen_q - first_query);
  }

  __syncthreads();
  int count = 0;
  for (int first = 0; first < params.n_blocks; first += THREADS) {
    const int j = first + static_cast<int>(threadIdx.x);
    unsigned short* of_warps = sorted_codes + ENTRIES + j;
    int n = 0;
    for (int i = 0; i < WARPS && j < params.n_blocks; i++) n += of_warps[i * params.n_blocks];
    int at = reserve<WARPS>(n, count, scratch);
    if (j >= params.n_blocks) continue;
    sorted.offsets()[j] = static_cast<unsigned short>(at);
    for (int i = 0; i < WARPS; i++) {
      unsigned short& place = of_warps[i * params.n_blocks];
      n = place;
      place = static_cast<unsigned short>(at);
      at += n;
    }
  }
  if (threadIdx.x == 0) sorted.offsets()[params.n_blocks] = static_cast<unsigned short>(count);
  __syncthreads();

  for_entries<ROWS>(entries, start, [&](int at, int key, int row, int n) {
    const int block = lane < n ? key / BLOCK_N : -1;
    const Rank rank = rank_of(block);
    const int place = lane < n ? places[block] + rank.rank : 0;
    syncwarp();
    if (lane < n) {
      if (rank.is_last) places[block] = static_cast<unsigned short>(place + 1);
      sorted_pairs[place] = pairs[at];
      sorted_codes[place] = static_cast<unsigned short>((first_row + row) * BLOCK_N + key % BLOCK_N);
    }
    syncwarp();
  });
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += THREADS) {
    sorted.pairs()[i] = sorted_pairs[i];
    sorted.codes()[i] = sorted_codes[i];
  }
  end_behind_kernel_before();
}

// An entry of the block: its query in the head and its key in the block as one number, and p and ds.
struct alignas(8) Taken {
  int code;
  unsigned pair;
};

constexpr int TAKEN = 1024;  // at once

// On a multiprocessor, which waits for memory most of the time, up to 64 channels: as many as no register is spilled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int DKV_PROGRAMS = 4;
#else
constexpr int DKV_PROGRAMS = 5;
#endif

// What entry tiles add to dk, or every other program to dv, of one block of keys; where other tiles are live too, to the
// results of dkv. A warp has 16 keys, and takes their entries in the order of the tiles.
template <class T, int D, int BLOCK_M, int BLOCK_N, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, D > 64 ? 3 : DKV_PROGRAMS) entmax_attn_bwd_dkv_entries(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int KEYS = BLOCK_N / WARPS;
  static_assert(KEYS == 16);
  extern __shared__ __align__(128) unsigned char smem[];
  int* scratch = reinterpret_cast<int*>(smem);
  Taken* taken = reinterpret_cast<Taken*>(scratch + 32);
  int* places = reinterpret_cast<int*>(taken + TAKEN);
  int* offsets = places + THREADS;
  unsigned short* own = reinterpret_cast<unsigned short*>(offsets + THREADS) + warp_of() * TAKEN;
  T* weights = reinterpret_cast<T*>(offsets + THREADS) + WARPS * TAKEN + warp_of() * WEIGHTS;

  const KeyBlock block = key_block<2>(params, scratch);
  const bool is_dv = blockIdx.x % 2;

  int bits = 0;  // of `live`, of the tiles that this thread looks at
  bool has_entries = false;
  RowSums<D> sums = {};
#pragma unroll 1
  for (int i_g = 0; i_g < block.group; i_g++) {
    // From `scratch`, as a register more would be spilled.
    const long long head = static_cast<long long>(kept_turn(scratch).i_bh) * block.group + i_g;
    const int i_h = static_cast<int>(head - static_cast<long long>(block.i_b) * params.heads_q);
    const T* rows = is_dv ? head_of<T>(params.dout, block.i_b, params.stride_ob, i_h, params.stride_oh)
                          : head_of<T>(params.q, block.i_b, params.stride_qb, i_h, params.stride_qh);
    const long long stride = is_dv ? params.stride_om : params.stride_qm;
    const int width = is_dv ? params.head_dim_v : params.head_dim;
    const bool is_aligned = is_dv ? params.aligned_o : params.aligned_q;
    auto entries_of = [&](int i_m) {
      return entry_list<BLOCK_M>(params.transposed, params, head * params.seqlen_q, i_m * BLOCK_M);
    };
#pragma unroll 1
    for (int first_tile = 0; first_tile < params.n_tiles; first_tile += THREADS) {
      const int i_m = first_tile + static_cast<int>(threadIdx.x);
      const int of_tile =
          i_m < params.n_tiles ? params.live[(head * params.n_tiles + i_m) * params.n_blocks + block.j] : 0;
      bits |= of_tile;
      if (!__syncthreads_or(of_tile & HAS_ENTRIES)) continue;
      if (!has_entries) clear_weights(weights);
      has_entries = true;
      int begin = 0, end = 0, n_entries = 0;
      if (of_tile & HAS_ENTRIES) {
        const unsigned short* of_blocks = entries_of(i_m).offsets();
        begin = of_blocks[block.j];
        end = of_blocks[block.j + 1];
      }
      const int place = reserve<WARPS>(end - begin, n_entries, scratch);
      places[threadIdx.x] = place;
      offsets[threadIdx.x] = begin - place;
#pragma unroll 1
      for (int first = 0; first < n_entries; first += TAKEN) {
        const int size = min(TAKEN, n_entries - first);
        __syncthreads();
        for (int i = threadIdx.x; i < size; i += THREADS) {
          int i_tile = 0;  // the last one that begins before the entry
#pragma unroll
          for (int step = THREADS / 2; step > 0; step /= 2)
            if (places[i_tile + step] <= first + i) i_tile += step;
          const EntryList entries = entries_of(first_tile + i_tile);
          const int at = offsets[i_tile] + first + i;
          taken[i] = Taken{(first_tile + i_tile) * BLOCK_M * BLOCK_N + entries.codes()[at], entries.pairs()[at]};
        }
        __syncthreads();
        int n_own = 0;
        for (int i = lane_of(); i - lane_of() < size; i += 32) {
          const bool is_own = i < size && taken[i].code % BLOCK_N / KEYS == warp_of();
          const unsigned lanes = ballot(is_own);
          if (is_own) own[n_own + popcount(lanes & lanes_before())] = static_cast<unsigned short>(i);
          n_own += popcount(lanes);
        }
        syncwarp();
#pragma unroll 1
        for (int at = 0; at < n_own; at += 32) {
          const Taken entry = taken[own[min(at + lane_of(), n_own - 1)]];
          const float2 p_and_ds = unpack2<T>(entry.pair);
          add_rows<T, D>(sums, weights, rows, stride, width, is_aligned, entry.code / BLOCK_N, entry.code % KEYS,
                         is_dv ? p_and_ds.x : p_and_ds.y, n_own - at);
        }
      }
    }
  }

  if (!has_entries) return end_behind_kernel_before();
  const bool is_live = __syncthreads_or(bits & LIVE);
  const Turn turn = kept_turn(scratch);
  const int first_key = turn.i * BLOCK_N + warp_of() * KEYS, width = is_dv ? params.head_dim_v : params.head_dim;
  const long long first_row = static_cast<long long>(turn.i_bh) * params.seqlen_k;
  wait_for_kernel_before();
  store_sums<T, D>(static_cast<T*>(is_dv ? params.dv : params.dk) + (first_row + first_key) * width, sums,
                   is_dv ? 1.0f : params.scale * params.sign, width, width, params.seqlen_k - first_key, is_live);
}
