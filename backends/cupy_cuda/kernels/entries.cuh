// Entries: the pairs of a query and a key with u > 0, one by one, of tiles that have too few for whole blocks.
//
// An entry tile has no out1. Its list lies there instead: `starts` of the rows, keys by row, ascending in each, and u.
// Backward sorts it by blocks of keys into `transposed`, laid out alike: `offsets` of the blocks, p and ds as two T, and
// codes row * BLOCK_N + key, counted from the tile's first row and the block's first key.
#pragma once

#include "common.cuh"

constexpr int ENTRIES = 6144;       // of a tile, at most
constexpr int ENTRY_BLOCKS = 2048;  // of keys, at most, where tiles may be entry tiles

// Bits of `live`: the block holds support, in an ordinary tile or in an entry tile; the tile, by its first block, is an
// entry tile.
constexpr int LIVE = 1;
constexpr int HAS_ENTRIES = 2;
constexpr int ENTRY_TILE = 4;

// A tile's part of out1, or of a tensor like it.
struct EntryList {
  unsigned short* header;
  unsigned* words;
  unsigned short* shorts;
  int capacity;

  __device__ __forceinline__ unsigned short* starts() const { return header; }
  __device__ __forceinline__ int* keys() const { return reinterpret_cast<int*>(words); }
  __device__ __forceinline__ unsigned short* us() const { return shorts; }

  __device__ __forceinline__ unsigned short* offsets() const { return header; }
  __device__ __forceinline__ unsigned* pairs() const { return words; }
  __device__ __forceinline__ unsigned short* codes() const { return shorts; }
};

// Of the tile of queries from `first` on, in the head whose first query is `row` among all.
template <int BLOCK_M>
__device__ __forceinline__ EntryList entry_list(float* tensor, const Params& params, long long row, int first) {
  constexpr int STARTS = BLOCK_M / 2 + 1;
  const int room = min(BLOCK_M, params.seqlen_q - first) * params.head_dim_v;
  const int header = max(STARTS, (params.n_blocks + 2) / 2);
  unsigned* base = reinterpret_cast<unsigned*>(tensor + (row + first) * params.head_dim_v);
  EntryList entries;
  entries.header = reinterpret_cast<unsigned short*>(base);
  entries.words = base + header;
  entries.capacity = max(min(ENTRIES, 2 * (room - header) / 3), 0);
  entries.shorts = reinterpret_cast<unsigned short*>(entries.words + entries.capacity);
  return entries;
}

// u as fixed point; what is above 0 stays so.
__device__ __forceinline__ unsigned short quantise(float u) {
  return static_cast<unsigned short>(min(max(static_cast<int>(u * 65535 + 0.5f), 1), 65535));
}

__device__ __forceinline__ float dequantise(unsigned short u) { return u * (1.0f / 65535); }

// ---- rows of half precision, by the lanes of a group

// N channels as they lie in memory.
template <int N>
struct alignas(2 * N) Channels {
  unsigned words[N / 2];
};

// Zeros from `width` on, where memory is not read. `row` may be any address, if not is_aligned.
template <class T, int N>
__device__ __forceinline__ Channels<N> load_channels(const T* row, int channel, int width, bool is_aligned) {
  Channels<N> channels{};
  if (is_aligned) {
    if (channel < width) channels = *reinterpret_cast<const Channels<N>*>(row + channel);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (channel + i < width) channels.words[i / 2] |= static_cast<unsigned>(row[channel + i].bits) << i % 2 * 16;
  }
  return channels;
}

template <class T, int N>
__device__ __forceinline__ void unpack_channels(float (&x)[N], const Channels<N>& channels) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const float2 pair = unpack2<T>(channels.words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Eight channels of a row; D / 8 lanes hold it.
template <class T>
__device__ __forceinline__ void load8(float (&x)[8], const T* row, int channel, int width, bool is_aligned) {
  unpack_channels<T>(x, load_channels<T, 8>(row, channel, width, is_aligned));
}

// Of the first n of these rows, all under way at once; zeros of the others.
template <class T, int N, int ROWS>
__device__ __forceinline__ void load_rows(Channels<N> (&channels)[ROWS], const T* base, long long stride,
                                          const int (&rows)[ROWS], int n, int channel, int width, bool is_aligned) {
#pragma unroll
  for (int i = 0; i < ROWS; i++) channels[i] = Channels<N>{};
  if (is_aligned) {
    if (channel >= width) n = 0;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      if (i < n) channels[i] = *reinterpret_cast<const Channels<N>*>(base + rows[i] * stride + channel);
  } else {
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      if (i < n) channels[i] = load_channels<T, N>(base + rows[i] * stride, channel, width, false);
  }
}

// Eight of the rows that the keys of a group's lanes name, from its lane `from` on; n keys of the warp count.
template <class T, int LANES>
__device__ __forceinline__ void load_rows_of_keys(Channels<8> (&channels)[8], const T* base, long long stride, int key,
                                                  int from, int n, int width, bool is_aligned) {
  const int first = lane_of() / LANES * LANES + from;
  int rows[8];
#pragma unroll
  for (int i = 0; i < 8; i++) rows[i] = shfl(key, first + i);
  load_rows<T, 8, 8>(channels, base, stride, rows, n - first, lane_of() % LANES * 8, width, is_aligned);
}

// ---- over the lanes of a warp

// Adds up the 2 N numbers of lanes that are `mask` apart; each keeps N, those behind where its own bit is set.
template <int N>
__device__ __forceinline__ void fold(float* x, int mask) {
  const bool is_second = (lane_of() & mask) != 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float first = x[i], second = x[i + N];
    x[i] = (is_second ? second : first) + shfl_xor(is_second ? first : second, mask);
  }
}

// Where this thread's n go after `count` others and those of the threads before; otherwise as `compact`.
template <int WARPS>
__device__ __forceinline__ int reserve(int n, int& count, int* scratch) {
  int place = n;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = shfl(place, lane_of() - step);
    if (lane_of() >= step) place += before;
  }
  __syncthreads();
  if (lane_of() == 31) scratch[warp_of()] = place;
  __syncthreads();
  place += count - n;
  for (int i = 0; i < WARPS; i++) {
    place += i < warp_of() ? scratch[i] : 0;
    count += scratch[i];
  }
  return place;
}

// Where a lane stands among neighbours with the same number, and whether it is the last of them.
struct Run {
  int rank;
  bool is_last;
};

__device__ __forceinline__ Run run_of(int number) {
  const int before = shfl(number, lane_of() - 1), next = shfl(number, lane_of() + 1);
  const unsigned begins = ballot(lane_of() == 0 || before != number);
  return Run{lane_of() - highest_bit(begins & (lanes_before() * 2 + 1)), lane_of() == 31 || next != number};
}

// ---- blocks of keys

// One block of keys of one head of keys.
struct KeyBlock {
  int i_b, i_kv, j;
  int group;
  Lengths lengths;
};

__device__ __forceinline__ KeyBlock key_block(const Params& params) {
  KeyBlock block;
  const int i_bh = blockIdx.x / params.n_blocks;
  block.j = blockIdx.x % params.n_blocks;
  block.i_b = i_bh / params.heads_kv;
  block.i_kv = i_bh % params.heads_kv;
  block.group = params.heads_q / params.heads_kv;
  block.lengths = lengths_of(params, block.i_b);
  return block;
}

// LIVE and HAS_ENTRIES, if any tile of the group's heads has them for the block. `scratch` has room for a number per
// warp.
template <int WARPS>
__device__ __forceinline__ int live_bits(const Params& params, const KeyBlock& block, int* scratch) {
  const long long first_head = static_cast<long long>(block.i_b) * params.heads_q + block.i_kv * block.group;
  const signed char* live = params.live + first_head * params.n_tiles * params.n_blocks + block.j;
  int bits = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < block.group * params.n_tiles; i += 32 * WARPS)
    bits |= live[static_cast<long long>(i) * params.n_blocks];
  const bool is_live = any_sync((bits & LIVE) != 0), has_entries = any_sync((bits & HAS_ENTRIES) != 0);
  if (lane_of() == 0) scratch[warp_of()] = (is_live ? LIVE : 0) | (has_entries ? HAS_ENTRIES : 0);
  __syncthreads();
  bits = 0;
  for (int i = 0; i < WARPS; i++) bits |= scratch[i];
  return bits;
}
