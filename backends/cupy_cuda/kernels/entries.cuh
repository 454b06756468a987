// Entries: the pairs of a query and a key with u > 0, one by one, of tiles that have too few for whole blocks.
//
// The list of an entry tile lies in `entries`: `starts` of the rows, keys by row, ascending in each, and u. Backward sorts
// it by blocks of keys into `transposed`, laid out alike: `offsets` of the blocks, p and ds as two T, and codes
// row * BLOCK_N + key, counted from the tile's first row and the block's first key.
#pragma once

#include "products.cuh"

constexpr int ENTRY_ROOM = 64;      // words of four bytes that a row has, at most
constexpr int ENTRIES = 5440;       // of a tile, at most
constexpr int ENTRY_BLOCKS = 2048;  // of keys, at most, where tiles may be entry tiles

// Bits of `live`: the block holds support, in an ordinary tile or in an entry tile; the tile, by its first block, is an
// entry tile; a row of the tile has no tau.
constexpr int LIVE = 1;
constexpr int HAS_ENTRIES = 2;
constexpr int ENTRY_TILE = 4;
constexpr int HAS_NAN = 8;

// A tile's part of a tensor.
struct EntryList {
  unsigned short* header;
  unsigned* words;
  unsigned short* shorts;
  int capacity;  // of words; below 0 where there is no room for the header

  __device__ __forceinline__ unsigned short* starts() const { return header; }
  __device__ __forceinline__ int* keys() const { return reinterpret_cast<int*>(words); }
  __device__ __forceinline__ unsigned short* us() const { return shorts; }

  __device__ __forceinline__ unsigned short* offsets() const { return header; }
  __device__ __forceinline__ unsigned* pairs() const { return words; }
  __device__ __forceinline__ unsigned short* codes() const { return shorts; }
};

// Of the tile of queries from `first` on, in the head whose first query is `row` among all.
template <int BLOCK_M>
__device__ __forceinline__ EntryList entry_list(unsigned* tensor, const Params& params, long long row, int first) {
  constexpr int STARTS = BLOCK_M / 2 + 1;
  static_assert(3 * ENTRIES <= 2 * BLOCK_M * ENTRY_ROOM);
  const int row_room = min(params.head_dim_v, ENTRY_ROOM);
  const int room = min(BLOCK_M, params.seqlen_q - first) * row_room;
  const int header = max(STARTS, (params.n_blocks + 2) / 2);
  unsigned* base = tensor + (row + first) * row_room;
  EntryList entries;
  entries.header = reinterpret_cast<unsigned short*>(base);
  entries.words = base + header;
  entries.capacity = room < header ? -1 : min(ENTRIES, 2 * (room - header) / 3);
  entries.shorts = reinterpret_cast<unsigned short*>(entries.words + entries.capacity);
  return entries;
}

// The root of u as fixed point, so that small ones keep their bits; what is above 0 stays so.
__device__ __forceinline__ unsigned short quantise(float u) {
  return static_cast<unsigned short>(min(max(static_cast<int>(u * rsqrtf(u) * 65535 + 0.5f), 1), 65535));
}

__device__ __forceinline__ float dequantise(unsigned short u) {
  const float root = u * (1.0f / 65535);
  return root * root;
}

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
    // Rolled, because many loads under way would need as many registers.
#pragma unroll 1
    for (int i = channel; i < channel + N; i++) {
#pragma unroll
      for (int word = 0; word < N / 2 - 1; word++)
        channels.words[word] = channels.words[word] >> 16 | channels.words[word + 1] << 16;
      const unsigned last = i < width ? row[i].bits : 0;
      channels.words[N / 2 - 1] = channels.words[N / 2 - 1] >> 16 | last << 16;
    }
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

// ---- products with rows that lie anywhere, of 32 entries, one a lane, of which the first n > 0 count. `from` is the
// number of the row in memory, `to` that of one of 16 rows in registers.

// Where the entry's row begins in memory; the others have that of the last one.
__device__ __forceinline__ long long begin_of_row(int from, long long stride, int n) {
  return shfl(from, min(lane_of(), n - 1)) * stride;
}

// Of each row chunks `chunk` + STEP i of eight channels, all under way at once.
template <class T, int STEP, int R, int N>
__device__ __forceinline__ void load_chunks(Channels<8> (&chunks)[R][N], const T* const (&rows)[R], int chunk,
                                            int width, bool is_aligned) {
  if (is_aligned) {
#pragma unroll
    for (int i = 0; i < R * N; i++)
      chunks[i / N][i % N] = load_channels<T, 8>(rows[i / N], 8 * (chunk + STEP * (i % N)), width, true);
  } else {
#pragma unroll
    for (int i = 0; i < R * N; i++)
      chunks[i / N][i % N] = load_channels<T, 8>(rows[i / N], 8 * (chunk + STEP * (i % N)), width, false);
  }
}

// 16 sums of D channels: element e of part 8 c + i is of row lane / 4 + 8 (e / 2), and of the channel that channel_of
// tells.
template <int D>
using RowSums = float[1][D / 8][4];

__device__ __forceinline__ int channel_of(int part, int e) {
  return part / 8 * 64 + lane_of() % 4 * 16 + e % 2 * 8 + part % 8;
}

// Room of a warp for the weights of 32 entries, by the 16 rows that they go to, so that they become a left operand; all
// zeros between its uses. The rows begin in different banks.
constexpr int WEIGHTS_STRIDE = 40;
constexpr int WEIGHTS = 16 * WEIGHTS_STRIDE;

template <class T>
__device__ __forceinline__ void clear_weights(T* weights) {
  static_assert(WEIGHTS % PER_CHUNK<T> == 0);
  for (int i = lane_of(); i < WEIGHTS / PER_CHUNK<T>; i += 32) reinterpret_cast<uint4*>(weights)[i] = uint4{0, 0, 0, 0};
  syncwarp();
}

// sums[to] += weight * row.
template <class T, int D>
__device__ __forceinline__ void add_rows(RowSums<D>& sums, T* weights, const T* base, long long stride, int width,
                                         bool is_aligned, int from, int to, float weight, int n) {
  const long long begin = begin_of_row(from, stride, n);
  T& own_weight = weights[to * WEIGHTS_STRIDE + lane_of()];
  if (lane_of() < n) own_weight = from_float<T>(weight);
  syncwarp();
  // More loads under way would need as many registers.
#pragma unroll(D > 64 ? 1 : 2)
  for (int step = 0; step < 2; step++) {
    unsigned a[1][4];
    ldmatrix_x4(a[0], weights + lane_of() % 16 * WEIGHTS_STRIDE + 16 * step + lane_of() / 16 * 8);
    const T* rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = base + shfl(begin, 16 * step + i / 2 * 8 + lane_of() % 4 * 2 + i % 2);
#pragma unroll
    for (int first_part = 0; first_part < D / 8; first_part += 8) {
      Channels<8> chunks[4][1];
      load_chunks<T, 1>(chunks, rows, first_part + lane_of() / 4, width, is_aligned);
#pragma unroll
      for (int part = 0; part < 8; part += 2) {
        unsigned b[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const unsigned first = chunks[2 * i][0].words[part / 2], second = chunks[2 * i + 1][0].words[part / 2];
          b[i] = (first & 0xffffu) | second << 16;
          b[2 + i] = first >> 16 | (second & 0xffff0000u);
        }
        multiply<T>(sums, a, b, first_part + part);
      }
    }
  }
  syncwarp();
  if (lane_of() < n) own_weight = from_float<T>(0.0f);
}

// The first n rows of sums, times factor, to `width` channels of rows that lie `stride` apart; added to what is there,
// if asked for.
template <class T, int D>
__device__ __forceinline__ void store_sums(T* rows, const RowSums<D>& sums, float factor, int stride,
                                           int width, int n, bool adds = false) {
  const bool is_aligned = stride % 8 == 0;
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const int e = i % 4, part = i / 4 * 8, row = lane_of() / 4 + e / 2 * 8, channel = channel_of(part, e);
    if (row >= n || channel >= width) continue;
    T* to = rows + row * stride + channel;
    float x[8] = {};
    if (adds) unpack_channels<T>(x, load_channels<T, 8>(to, 0, width - channel, is_aligned));
    Channels<8> packed;
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] += sums[0][part + c][e] * factor;
#pragma unroll
    for (int c = 0; c < 8; c += 2) packed.words[c / 2] = pack2<T>(x[c], x[c + 1]);
    if (is_aligned) {
      *reinterpret_cast<Channels<8>*>(to) = packed;
    } else {
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (channel + c < width) to[c].bits = static_cast<unsigned short>(packed.words[c / 2] >> c % 2 * 16);
    }
  }
}

// Rows `lane / 4` and lane / 4 + 8 of 16, every fourth chunk.
template <int D>
using RowChunks = Channels<8>[2][D / 32];

// Of rows from `first` on, up to the one below `high`, which stands for all behind.
template <class T, int D>
__device__ __forceinline__ void load_row_chunks(RowChunks<D>& chunks, const T* base, long long stride, int first,
                                                int high, int width, bool is_aligned) {
  const T* rows[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = min(first + lane_of() / 4 + 8 * i, high - 1);
    rows[i] = base + row * stride;
  }
  load_chunks<T, 4>(chunks, rows, lane_of() % 4, width, is_aligned);
}

// row . rows[to].
template <class T, int D>
__device__ __forceinline__ float multiply_rows(const RowChunks<D>& rows, const T* base, long long stride, int width,
                                               bool is_aligned, int from, int to, int n) {
  const long long begin = begin_of_row(from, stride, n);
  float product = 0;
#pragma unroll(D > 64 ? 1 : 2)
  for (int step = 0; step < 2; step++) {
    const T* of_entries[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int entry = 16 * step + 8 * i + lane_of() / 4;
      of_entries[i] = base + shfl(begin, entry);
    }
    RowChunks<D> chunks;
    load_chunks<T, 4>(chunks, of_entries, lane_of() % 4, width, is_aligned);
    float products[1][2][4] = {};
#pragma unroll
    for (int c = 0; c < D / 32; c++)
#pragma unroll
      for (int word = 0; word < 4; word += 2) {
        const unsigned a[1][4] = {{chunks[0][c].words[word], chunks[1][c].words[word],
                                   chunks[0][c].words[word + 1], chunks[1][c].words[word + 1]}};
        const unsigned b[4] = {rows[0][c].words[word], rows[0][c].words[word + 1], rows[1][c].words[word],
                               rows[1][c].words[word + 1]};
        multiply<T>(products, a, b, 0);
      }
    // Of row 8 n + 2 (lane % 4) + i; the lane of its entry's row has what the entry takes.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = shfl(to, 16 * step + 8 * half + lane_of() / 4);
      const float(&first)[4] = products[0][0], (&second)[4] = products[0][1];
      const float even = row < 8 ? first[2 * half] : second[2 * half];
      const float odd = row < 8 ? first[2 * half + 1] : second[2 * half + 1];
      const float found = shfl(row % 2 ? odd : even, lane_of() % 8 * 4 + to % 8 / 2);
      if (lane_of() / 8 == 2 * step + half) product = found;
    }
  }
  return product;
}

// ---- over the lanes of a warp

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

// Where a lane stands among those with the same number, and whether it is the last of them.
struct Rank {
  int rank;
  bool is_last;
};

__device__ __forceinline__ Rank rank_of(int number) {
  const unsigned same = match_any(number);
  return Rank{popcount(same & lanes_before()), same >> lane_of() == 1};
}

// ---- a warp's entries

// take(at, key, row, n) for 32 of them at a time, one a lane; n count. The next ones are under way meanwhile. `start`
// is of row `lane`, and behind the last one.
template <int ROWS, class Take>
__device__ __forceinline__ void for_entries(const EntryList& entries, int start, Take&& take) {
  const int end = shfl(start, ROWS);
  int first = shfl(start, 0);
  int next_key = first + lane_of() < end ? entries.keys()[first + lane_of()] : 0;
#pragma unroll 1
  for (; first < end; first += 32) {
    const int at = first + lane_of(), key = next_key;
    next_key = at + 32 < end ? entries.keys()[at + 32] : 0;
    int row = 0;  // the last one that begins before the entry
#pragma unroll
    for (int step = ROWS / 2; step > 0; step /= 2)
      if (shfl(start, row + step) <= at) row += step;
    take(at, key, row, end - first);
  }
}

// ---- blocks of keys

// One block of keys of one head of keys.
struct KeyBlock {
  int i_b, i_kv, j;
  int group;
  Lengths lengths;
};

__device__ __forceinline__ KeyBlock key_block(const Params& params, Turn turn) {
  KeyBlock block;
  block.j = turn.i;
  block.i_b = turn.i_bh / params.heads_kv;
  block.i_kv = turn.i_bh % params.heads_kv;
  block.group = params.heads_q / params.heads_kv;
  block.lengths = lengths_of(params, block.i_b);
  return block;
}

// With PARTS, so many programs share a block.
template <int PARTS = 1>
__device__ __forceinline__ KeyBlock key_block(const Params& params, int* scratch) {
  const Turn turn = turn_of(params, blockIdx.x / PARTS, gridDim.x / PARTS, params.n_blocks);
  return key_block(params, keep_turn(turn, scratch));
}
