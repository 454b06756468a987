// dq of entry tiles, and their entries in the order in which dkv takes them.
#include "entries.cuh"

// A warp takes its rows one by one, 32 entries of a row at a time, of which each lane has one. The rows of v and k that
// these name are read by groups of D / 8 lanes, eight of them at a time.
template <class T, int D, int ALPHA, bool DALPHA, int BLOCK_M, int BLOCK_N, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) entmax_attn_bwd_dq_entries(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int ROWS = BLOCK_M / WARPS;
  constexpr int LANES = D / 8;
  static_assert(ROWS < 32 && LANES % 8 == 0 && LANES < 32);
  extern __shared__ __align__(128) unsigned char smem[];
  int* scratch = reinterpret_cast<int*>(smem);
  unsigned* pairs = reinterpret_cast<unsigned*>(scratch + 32);  // dp before
  unsigned* sorted_pairs = pairs + ENTRIES;
  unsigned short* sorted_codes = reinterpret_cast<unsigned short*>(sorted_pairs + ENTRIES);

  const QueryTile tile = query_tile<BLOCK_M>(params);
  if (!(params.live[tile.index * params.n_blocks] & ENTRY_TILE)) return;
  const float r = 1 / tile.exponent;
  const T* k = head_of<T>(params.k, tile.i_b, params.stride_kb, tile.i_kv, params.stride_kh);
  const T* v = head_of<T>(params.v, tile.i_b, params.stride_vb, tile.i_kv, params.stride_vh);
  const T* dout = head_of<T>(params.dout, tile.i_b, params.stride_ob, tile.i_h, params.stride_oh);
  const EntryList entries = entry_list<BLOCK_M>(params.out1, params, tile.row, tile.first);
  const EntryList sorted = entry_list<BLOCK_M>(params.transposed, params, tile.row, tile.first);

  const int lane = lane_of(), channel = lane % LANES * 8;
  const int first_row = warp_of() * ROWS;
  const int start = lane <= ROWS ? entries.starts()[first_row + lane] : 0;
  // How many entries of the warp lie in each block, then where they go.
  unsigned short* places = sorted_codes + ENTRIES + warp_of() * params.n_blocks;
  for (int j = lane; j < params.n_blocks; j += 32) places[j] = 0;
  syncwarp();

  // Entries from `at` on, one a lane, as far as `end`.
  struct Entry {
    int key;
    float u, p, w;
  };
  auto load_entry = [&](int at, int end) {
    Entry entry{0, 0, 0, 0};
    if (at + lane < end) {
      entry.key = entries.keys()[at + lane];
      entry.u = dequantise(entries.us()[at + lane]);
      powers<ALPHA>(entry.u, r, entry.p, entry.w);
    }
    return entry;
  };

#pragma unroll 1
  for (int i = 0; i < ROWS && tile.first + first_row + i < params.seqlen_q; i++) {
    const long long row = tile.first + first_row + i;
    const int first = shfl(start, i), last = shfl(start, i + 1);
    float dout_row[8];
    load8<T>(dout_row, dout + row * params.stride_om, channel, params.head_dim_v, params.aligned_o);
    float w_sum = 0, w_dp = 0;
#pragma unroll 1
    for (int at = first; at < last; at += 32) {
      const Entry entry = load_entry(at, last);
      float dp = 0;
#pragma unroll
      for (int from = 0; from < LANES; from += 8) {
        Channels<8> rows[8];
        load_rows_of_keys<T, LANES>(rows, v, params.stride_vn, entry.key, from, last - at, params.head_dim_v,
                                    params.aligned_v);
        float sums[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
          float value[8];
          unpack_channels<T>(value, rows[e]);
          sums[e] = 0;
#pragma unroll
          for (int c = 0; c < 8; c++) sums[e] += dout_row[c] * value[c];
        }
        fold<4>(sums, 4);
        fold<2>(sums, 2);
        fold<1>(sums, 1);
        for (int mask = 8; mask < LANES; mask *= 2) sums[0] += shfl_xor(sums[0], mask);
        if (lane % LANES / 8 * 8 == from) dp = sums[0];
      }
      if (at + lane < last) {
        w_sum += entry.w;
        w_dp += entry.w * dp;
        pairs[at + lane] = __float_as_uint(dp);
      }
    }
    w_sum = warp_sum(w_sum);
    const float delta = warp_sum(w_dp) / (w_sum > 0 ? w_sum : 1.0f);

    float dq[8] = {};
    AlphaSums alpha_sums;
#pragma unroll 1
    for (int at = first; at < last; at += 32) {
      const Entry entry = load_entry(at, last);
      const bool is_entry = at + lane < last;
      const int block = is_entry ? entry.key / BLOCK_N : -1;
      const Run run = run_of(block);
      if (is_entry && run.is_last) places[block] += run.rank + 1;
      syncwarp();
      float ds = 0;
      if (is_entry) {
        const float dp = __uint_as_float(pairs[at + lane]);
        if constexpr (DALPHA) alpha_sums.add(entry.u, entry.p, entry.w, dp);
        ds = entry.w * (dp - delta);
        pairs[at + lane] = pack2<T>(entry.p, ds);
      }
#pragma unroll
      for (int from = 0; from < LANES; from += 8) {
        Channels<8> rows[8];
        load_rows_of_keys<T, LANES>(rows, k, params.stride_kn, entry.key, from, last - at, params.head_dim,
                                    params.aligned_k);
#pragma unroll
        for (int e = 0; e < 8; e++) {
          const float weight = shfl(ds, lane / LANES * LANES + from + e);
          float key[8];
          unpack_channels<T>(key, rows[e]);
#pragma unroll
          for (int c = 0; c < 8; c++) dq[c] += weight * key[c];
        }
      }
    }
    int column = channel;
    fold<4>(dq, 16);
    column += lane / 16 * 4;
    if constexpr (LANES == 8) {
      fold<2>(dq, 8);
      column += lane / 8 % 2 * 2;
    }
    const float factor = params.scale * params.sign;
    T* to = static_cast<T*>(params.dq) + (tile.row + row) * params.head_dim;
#pragma unroll
    for (int c = 0; c < LANES / 4; c += 2)
      store_pair(to, column + c, params.head_dim, dq[c] * factor, dq[c + 1] * factor);
    if constexpr (DALPHA) {
      const float gradient = alpha_sums.gradient(tile.exponent, warp_sum);
      if (lane == 0) params.dalpha[tile.row + row] = gradient;
    }
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

#pragma unroll 1
  for (int i = 0; i < ROWS; i++) {
    const int first = shfl(start, i), last = shfl(start, i + 1);
#pragma unroll 1
    for (int at = first; at < last; at += 32) {
      const bool is_entry = at + lane < last;
      const int key = is_entry ? entries.keys()[at + lane] : 0;
      const int block = is_entry ? key / BLOCK_N : -1;
      const Run run = run_of(block);
      const int place = is_entry ? places[block] + run.rank : 0;
      syncwarp();
      if (is_entry) {
        if (run.is_last) places[block] = static_cast<unsigned short>(place + 1);
        sorted_pairs[place] = pairs[at + lane];
        sorted_codes[place] = static_cast<unsigned short>((first_row + i) * BLOCK_N + key % BLOCK_N);
      }
      syncwarp();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += THREADS) {
    sorted.pairs()[i] = sorted_pairs[i];
    sorted.codes()[i] = sorted_codes[i];
  }
}

// An entry of the block: its query in the head and its key in the block as one number, and p and ds.
struct alignas(8) Taken {
  int code;
  unsigned pair;
};

constexpr int TAKEN = 512;  // at once

template <int N>
struct alignas(4 * N) Sums {
  float x[N];
};

// What entry tiles add to dk and dv of one block of keys; where other tiles are live too, to the results of dkv. A warp
// takes the entries of its own keys one by one, in the order of the tiles, to sums in shared memory; the rows of some
// entries are under way at a time.
template <class T, int D, int BLOCK_M, int BLOCK_N, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, D > 64 ? 2 : 3) entmax_attn_bwd_dkv_entries(const Params params) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int KEYS = BLOCK_N / WARPS;
  constexpr int N = D / 32;  // channels of a lane
  constexpr int AT_ONCE = 8;
  extern __shared__ __align__(128) unsigned char smem[];
  int* scratch = reinterpret_cast<int*>(smem);
  // Of this lane's channels of its warp's keys.
  Sums<N>* dk_sums = reinterpret_cast<Sums<N>*>(scratch + 32) + threadIdx.x;
  Sums<N>* dv_sums = dk_sums + KEYS * THREADS;
  Taken* taken = reinterpret_cast<Taken*>(scratch + 32 + 2 * BLOCK_N * D);
  int* places = reinterpret_cast<int*>(taken + TAKEN);
  int* offsets = places + THREADS;
  unsigned short* own = reinterpret_cast<unsigned short*>(offsets + THREADS) + warp_of() * TAKEN;

  const KeyBlock block = key_block(params);
  const int bits = live_bits<WARPS>(params, block, scratch);
  if (!(bits & HAS_ENTRIES)) return;
  for (int i = 0; i < KEYS; i++) dk_sums[i * THREADS] = dv_sums[i * THREADS] = Sums<N>{};

  const int channel = lane_of() * N;
#pragma unroll 1
  for (int i_g = 0; i_g < block.group; i_g++) {
    const int i_h = block.i_kv * block.group + i_g;
    const long long head = static_cast<long long>(block.i_b) * params.heads_q + i_h;
    const T* q = head_of<T>(params.q, block.i_b, params.stride_qb, i_h, params.stride_qh);
    const T* dout = head_of<T>(params.dout, block.i_b, params.stride_ob, i_h, params.stride_oh);
    auto entries_of = [&](int i_m) {
      return entry_list<BLOCK_M>(params.transposed, params, head * params.seqlen_q, i_m * BLOCK_M);
    };
#pragma unroll 1
    for (int first_tile = 0; first_tile < params.n_tiles; first_tile += THREADS) {
      const int i_m = first_tile + static_cast<int>(threadIdx.x);
      int begin = 0, end = 0, n_entries = 0;
      if (i_m < params.n_tiles &&
          params.live[(head * params.n_tiles + i_m) * params.n_blocks + block.j] & HAS_ENTRIES) {
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
        for (int at = 0; at < n_own; at += AT_ONCE) {
          Taken entry[AT_ONCE];
          int rows[AT_ONCE];
          Channels<N> q_row[AT_ONCE], dout_row[AT_ONCE];
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
            entry[i] = taken[own[min(at + i, n_own - 1)]];
            rows[i] = entry[i].code / BLOCK_N;
          }
          load_rows(q_row, q, params.stride_qm, rows, n_own - at, channel, params.head_dim, params.aligned_q);
          load_rows(dout_row, dout, params.stride_om, rows, n_own - at, channel, params.head_dim_v, params.aligned_o);
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
            if (at + i >= n_own) continue;
            const float2 p_and_ds = unpack2<T>(entry[i].pair);
            float q_x[N], dout_x[N];
            unpack_channels<T>(q_x, q_row[i]);
            unpack_channels<T>(dout_x, dout_row[i]);
            const int key = entry[i].code % KEYS * THREADS;
            Sums<N> dk = dk_sums[key], dv = dv_sums[key];
#pragma unroll
            for (int c = 0; c < N; c++) {
              dk.x[c] += p_and_ds.y * q_x[c];
              dv.x[c] += p_and_ds.x * dout_x[c];
            }
            dk_sums[key] = dk;
            dv_sums[key] = dv;
          }
        }
      }
    }
  }

  auto store = [&](void* to, const Sums<N>* sums, float factor, int width) {
#pragma unroll 1
    for (int i = 0; i < KEYS; i++) {
      const int key = block.j * BLOCK_N + warp_of() * KEYS + i;
      if (key >= params.seqlen_k) return;
      const long long i_bh = static_cast<long long>(block.i_b) * params.heads_kv + block.i_kv;
      T* row = static_cast<T*>(to) + (i_bh * params.seqlen_k + key) * width;
      float x[N] = {};
      if (bits & LIVE) unpack_channels<T>(x, load_channels<T, N>(row, channel, width, width % N == 0));
#pragma unroll
      for (int c = 0; c < N; c++) x[c] += factor * sums[i * THREADS].x[c];
#pragma unroll
      for (int c = 0; c < N; c += 2) store_pair(row, channel + c, width, x[c], x[c + 1]);
    }
  };
  store(params.dk, dk_sums, params.scale * params.sign, params.head_dim);
  store(params.dv, dv_sums, 1.0f, params.head_dim_v);
}
