// What warps do together. Lane l of a fragment holds row l / 4 and the columns 2 (l % 4) and 2 (l % 4) + 1.
#include "runtime.hpp"

namespace emulator {

namespace {

template <class T>
void mma(void* const* lanes) {
    alignas(64) float a[16][16], b[16][8], d[16][8] = {};
    auto unpack = [](unsigned packed, float& low, float& high) {
        low = to_float(T{(unsigned short)packed});
        high = to_float(T{(unsigned short)(packed >> 16)});
    };
    for (int lane = 0; lane < 32; ++lane) {
        auto& fragments = *static_cast<const Fragments*>(lanes[lane]);
        int row = lane / 4, column = lane % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            int k = column + 8 * half;
            for (int i = 0; i < 2; ++i) unpack(fragments.a[2 * half + i], a[row + 8 * i][k], a[row + 8 * i][k + 1]);
            unpack(fragments.b[half], b[k][row], b[k + 1][row]);
        }
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        float* out = static_cast<const Fragments*>(lanes[lane])->d;
        int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) out[i] += d[row + i / 2 * 8][column + i % 2];
    }
}

}  // namespace

void mma_half(void* const* lanes) { mma<half>(lanes); }
void mma_bf16(void* const* lanes) { mma<bf16>(lanes); }

template <int MATRICES, bool TRANSPOSED>
void ldmatrix(void* const* lanes) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
        unsigned short values[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(values[row], static_cast<const Matrices*>(lanes[8 * matrix + row])->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            int i = lane / 4, j = lane % 4 * 2;
            unsigned low = TRANSPOSED ? values[j][i] : values[i][j];
            unsigned high = TRANSPOSED ? values[j + 1][i] : values[i][j + 1];
            static_cast<const Matrices*>(lanes[lane])->registers[matrix] = low | high << 16;
        }
    }
}
template void ldmatrix<2, false>(void* const*);
template void ldmatrix<4, false>(void* const*);
template void ldmatrix<2, true>(void* const*);
template void ldmatrix<4, true>(void* const*);

template <int BYTES>
void shuffle(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& exchange = *static_cast<const Exchange*>(lanes[lane]);
        std::memcpy(exchange.to, static_cast<const Exchange*>(lanes[exchange.lane])->from, BYTES);
    }
}
template void shuffle<4>(void* const*);
template void shuffle<8>(void* const*);

void vote(void* const* lanes) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane) result |= unsigned(static_cast<const Vote*>(lanes[lane])->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Vote*>(lanes[lane])->result = result;
}

void syncwarp(void* const*) {}

}  // namespace emulator
