// Entries: the pairs of a query and a key with u > 0, one by one, of tiles that have too few for whole blocks.
//
// An entry tile has no out1. Its list lies there instead: `starts` of the rows, keys by row, ascending in each, and u.
// Backward sorts it by blocks of keys into `transposed`, laid out alike: `offsets` of the blocks, p and ds packed as two
// T, and codes row * BLOCK_N + key, both counted from the tile's or the block's first.
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

// ---- over the lanes of a warp

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}

// Of this lane's number and those of all lanes before it.
__device__ __forceinline__ int warp_prefix(int value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = shfl(value, lane_of() - step);
    if (lane_of() >= step) value += before;
  }
  return value;
}

// Where a lane stands among neighbours with the same number, and whether it is the last of them.
struct Run {
  int rank;
  bool is_last;
};

__device__ __forceinline__ Run run_of(int number) {
  const int before = shfl(number, lane_of() - 1), next = shfl(number, lane_of() + 1);
  const unsigned begins = ballot(lane_of() == 0 || before != number);
  return Run{lane_of() - highest_bit(begins & ((2u << lane_of()) - 1)), lane_of() == 31 || next != number};
}
