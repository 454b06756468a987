// The functions of backends/cupy_cuda/kernels/ptx.cuh without a GPU: same names, same lane layouts.
#pragma once

#include "emulator.hpp"

namespace emulator {

struct Fragments {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};
struct Rows {
    uint32_t* registers;
    const void* row;
};
struct Exchange {
    const void* from;
    void* to;
    int lane;
};
struct Vote {
    bool predicate;
    uint32_t result;
};

void mma_16x8x16_half(void* const* lanes);
void mma_16x8x16_bfloat16(void* const* lanes);
void mma_16x8x8_half(void* const* lanes);
template <int MATRICES, bool TRANSPOSED>
void ldmatrix(void* const* lanes);
template <int BYTES>
void shuffle(void* const* lanes);
void vote(void* const* lanes);
void nothing(void* const* lanes);

template <int MATRICES, bool TRANSPOSED>
inline void load_matrices(uint32_t* registers, const void* row, const char* name, Site site) {
    if (current->lane < 8 * MATRICES) check_shared(row, 16, 16, false, name, site);
    Rows rows = {registers, row};
    collective(ldmatrix<MATRICES, TRANSPOSED>, name, &rows, site);
}

template <class V>
inline V shuffled(V value, int lane, const char* name, Site site) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "4 or 8 bytes");
    V result;
    Exchange exchange = {&value, &result, lane & 31};
    collective(shuffle<sizeof(V)>, name, &exchange, site);
    return result;
}

}  // namespace emulator

inline uint32_t smem_address(const void* address, EMULATOR_SITE) { return emulator::shared_offset(address, site); }

inline void cp_async_16(void* smem, const void* global, bool valid, EMULATOR_SITE) {
    emulator::copy_async(smem, global, 16, valid, site);
}
inline void cp_async_commit() { emulator::copy_async_commit(); }
template <int N>
inline void cp_async_wait() { emulator::copy_async_wait(N); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<4, false>(r, row, "ldmatrix_x4", site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<4, true>(r, row, "ldmatrix_x4_trans", site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<2, false>(r, row, "ldmatrix_x2", site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<2, true>(r, row, "ldmatrix_x2_trans", site);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_SITE) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "__half or __nv_bfloat16");
    emulator::Fragments fragments = {d, a, b};
    auto operation = std::is_same_v<T, __half> ? emulator::mma_16x8x16_half : emulator::mma_16x8x16_bfloat16;
    emulator::collective(operation, "mma_m16n8k16", &fragments, site);
}
template <class T = __half>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], EMULATOR_SITE) {
    static_assert(std::is_same_v<T, __half>, "__half");
    emulator::Fragments fragments = {d, a, b};
    emulator::collective(emulator::mma_16x8x8_half, "mma_m16n8k8", &fragments, site);
}

template <class V>
inline V shfl_xor(V value, int mask, EMULATOR_SITE) {
    return emulator::shuffled(value, emulator::current->lane ^ mask, "shfl_xor", site);
}
template <class V>
inline V shfl(V value, int lane, EMULATOR_SITE) {
    return emulator::shuffled(value, lane, "shfl", site);
}
inline uint32_t ballot(bool predicate, EMULATOR_SITE) {
    emulator::Vote vote = {predicate, 0};
    emulator::collective(emulator::vote, "ballot", &vote, site);
    return vote.result;
}
inline bool any_sync(bool predicate, EMULATOR_SITE) {
    emulator::Vote vote = {predicate, 0};
    emulator::collective(emulator::vote, "any_sync", &vote, site);
    return vote.result != 0;
}
inline void syncwarp(EMULATOR_SITE) { emulator::collective(emulator::nothing, "syncwarp", nullptr, site); }

template <class T>
inline float to_float(T x) { return emulator::widen(x); }
template <class T>
inline T from_float(float x) {
    T result;
    emulator::narrow(result, x);
    return result;
}
template <class T>
inline uint32_t pack2(float lo, float hi) {
    return uint32_t(from_float<T>(lo).bits) | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
inline float2 unpack2(uint32_t word) {
    return {to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)})};
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float sqrt_approx(float x) { return sqrtf(x); }

template <class T>
inline T atomic_add(T* address, T value, EMULATOR_SITE) {
    emulator::check_atomic(address, sizeof(T), "atomic_add", site);
    T old = *address;
    *address = old + value;
    return old;
}
template <class T>
inline T atomic_max(T* address, T value, EMULATOR_SITE) {
    emulator::check_atomic(address, sizeof(T), "atomic_max", site);
    T old = *address;
    *address = value > old ? value : old;
    return old;
}
