// The functions of the kernels' ptx.cuh without a GPU: the same names, the same lane layouts.
#pragma once

#include "emulator.hpp"

// Storage alone: arithmetic is done in float.
struct half {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// As __init__.py packs it.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

template <class T>
constexpr bool IS_BF16 = std::is_same_v<T, bf16>;

namespace emulator {

#if defined(__aarch64__)
using native_half = __fp16;
#else
using native_half = _Float16;
#endif

inline float widen(half x) { return float(bits<native_half>(x.bits)); }
inline float widen(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
inline float widen(float x) { return x; }

// To nearest, ties to even.
inline void narrow(half& to, float x) { to.bits = bits<unsigned short>(native_half(x)); }
inline void narrow(bf16& to, float x) {
    uint32_t word = bits<uint32_t>(x);
    to.bits = x != x ? 0x7fff : (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline void narrow(float& to, float x) { to = x; }

struct Fragments {
    float* d;
    const unsigned* a;
    const unsigned* b;
};
struct Matrices {
    unsigned* registers;
    const void* row;
};
struct Exchange {
    const void* from;
    void* to;
    int lane;
};
struct Vote {
    bool predicate;
    unsigned result;
};

// A step of a product by wgmma: 64 x `columns` sums of a warpgroup from 16 columns of a and 16 rows of b^T, or of b.
struct Step {
    float* d;
    int columns;
    unsigned a[4];
    uint64_t a_operand, b_operand;
    bool a_is_shared, b_is_by_columns, is_bf16, adds;
};
void begin_step(const Step& step, Site site);
void commit_steps();
void wait_for_steps(int groups, Site site);
void fence_proxy();
void init_mbarrier(const void* mbarrier, int arrivals, Site site);
void invalidate_mbarrier(const void* mbarrier, Site site);
void arrive_at_mbarrier(const void* mbarrier, int bytes, Site site);
void wait_for_mbarrier(const void* mbarrier, unsigned parity, Site site);
void copy_bulk(void* shared, const void* global, int bytes, const void* mbarrier, Site site);
void copy_box(void* shared, const TensorMap& map, int i_group, int i_head, const void* mbarrier, Site site);
void wait_for_kernel();
void let_kernel_begin();
uint64_t operand(const void* tile, int stride, int leading, Site site);

void mma_half(void* const* lanes);
void mma_bf16(void* const* lanes);
template <int MATRICES, bool TRANSPOSED>
void ldmatrix(void* const* lanes);
template <int BYTES>
void shuffle(void* const* lanes);
void vote(void* const* lanes);
void syncwarp(void* const* lanes);

template <int MATRICES, bool TRANSPOSED>
inline void load_matrices(unsigned* registers, const void* row, const char* name, Site site) {
    if (current->lane < 8 * MATRICES) check_shared(row, 16, name, site);
    Matrices matrices = {registers, row};
    collective(ldmatrix<MATRICES, TRANSPOSED>, name, &matrices, site);
}

template <class V>
inline V shuffled(V value, int lane, const char* name, Site site) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8, "4 or 8 bytes");
    V result;
    Exchange exchange = {&value, &result, lane & 31};
    collective(shuffle<sizeof(V)>, name, &exchange, site);
    return result;
}

inline unsigned voted(bool predicate, const char* name, Site site) {
    Vote own = {predicate, 0};
    collective(vote, name, &own, site);
    return own.result;
}

// Its load and store are no plain ones, that another thread's could race with.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) void atomic(T* address, Update update, const char* name, Site site) {
    check_atomic(address, sizeof(T), name, site);
    *address = update(*address);
}

}  // namespace emulator

inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }

inline void cp_async_16(void* smem, const void* global, bool valid, EMULATOR_SITE) {
    emulator::copy_async(smem, global, 16, valid, site);
}
inline void cp_async_4(void* smem, const void* global, bool valid, EMULATOR_SITE) {
    emulator::copy_async(smem, global, 4, valid, site);
}
inline void wait_for_kernel_before() { emulator::wait_for_kernel(); }
inline void let_kernel_behind_begin() { emulator::let_kernel_begin(); }

inline void cp_async_commit() { emulator::copy_async_commit(); }
template <int N>
inline void cp_async_wait() {
    emulator::copy_async_wait(N);
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<4, false>(r, row, "ldmatrix_x4", site);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, EMULATOR_SITE) {
    emulator::load_matrices<4, true>(r, row, "ldmatrix_x4_trans", site);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATOR_SITE) {
    static_assert(std::is_same_v<T, half> || std::is_same_v<T, bf16>, "half or bf16");
    emulator::Fragments fragments = {d, a, b};
    auto operation = std::is_same_v<T, half> ? emulator::mma_half : emulator::mma_bf16;
    emulator::collective(operation, "mma_m16n8k16", &fragments, site);
}

inline void wgmma_proxy_fence() { emulator::fence_proxy(); }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_steps(); }
template <int N>
inline void wgmma_wait(EMULATOR_SITE) {
    emulator::wait_for_steps(N, site);
}
template <int N>
inline void wgmma_pin(float (&)[N][4]) {}
inline unsigned long long wgmma_operand(const void* tile, int stride, int leading, EMULATOR_SITE) {
    return emulator::operand(tile, stride, leading, site);
}
inline unsigned long long wgmma_advance(unsigned long long operand, int bytes) {
    return (operand & ~0xffffffffULL) | (unsigned(operand) + unsigned(bytes >> 4));
}
template <class T, bool ADDS, int N>
inline void wgmma_rows(float (&d)[N][4], unsigned long long a, unsigned long long b, EMULATOR_SITE) {
    emulator::begin_step({d[0], 8 * N, {}, a, b, true, false, IS_BF16<T>, ADDS}, site);
}
template <class T, bool ADDS, int N>
inline void wgmma_rows(float (&d)[N][4], const unsigned (&a)[4], unsigned long long b, EMULATOR_SITE) {
    emulator::begin_step({d[0], 8 * N, {a[0], a[1], a[2], a[3]}, 0, b, false, false, IS_BF16<T>, ADDS}, site);
}
template <class T, bool ADDS, int N>
inline void wgmma_columns(float (&d)[N][4], const unsigned (&a)[4], unsigned long long b, EMULATOR_SITE) {
    emulator::begin_step({d[0], 8 * N, {a[0], a[1], a[2], a[3]}, 0, b, false, true, IS_BF16<T>, ADDS}, site);
}

inline void mbarrier_init(unsigned long long* barrier, int arrivals, EMULATOR_SITE) {
    emulator::init_mbarrier(barrier, arrivals, site);
}
inline void mbarrier_invalidate(unsigned long long* barrier, EMULATOR_SITE) {
    emulator::invalidate_mbarrier(barrier, site);
}
inline void mbarrier_arrive(unsigned long long* barrier, int bytes, EMULATOR_SITE) {
    emulator::arrive_at_mbarrier(barrier, bytes, site);
}
inline void mbarrier_arrive(unsigned long long* barrier, EMULATOR_SITE) {
    emulator::arrive_at_mbarrier(barrier, 0, site);
}
inline void mbarrier_wait(unsigned long long* barrier, unsigned parity, EMULATOR_SITE) {
    emulator::wait_for_mbarrier(barrier, parity, site);
}
inline void bulk_copy(void* smem, const void* global, int bytes, unsigned long long* barrier, EMULATOR_SITE) {
    emulator::copy_bulk(smem, global, bytes, barrier, site);
}
inline void bulk_copy_rows(void* smem, const TensorMap& map, int i_group, int i_head, unsigned long long* barrier,
                           EMULATOR_SITE) {
    emulator::copy_box(smem, map, i_group, i_head, barrier, site);
}

template <int THREADS>
inline void sync_first(EMULATOR_SITE) {
    emulator::barrier_of_first(THREADS, "sync_first", site);
}
template <int COUNT>
inline void give_registers_back() {}
template <int COUNT>
inline void take_registers() {}

inline float log2_approx(float x) { return std::log2(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float saturated(float a, float b, float c) { return std::min(std::fmax(std::fma(a, b, c), 0.0f), 1.0f); }
template <class V>
inline void keep(V*&) {}
template <class V>
inline V* bytes_behind(V* pointer, unsigned a, unsigned b) {
    return (V*)(uintptr_t(pointer) + uint64_t(a) * b);
}
inline int load_kept(const int* global, unsigned i) { return global[i]; }

template <class V>
inline V shfl_xor(V value, int mask, EMULATOR_SITE) {
    return emulator::shuffled(value, emulator::current->lane ^ mask, "shfl_xor", site);
}
template <class V>
inline V shfl(V value, int lane, EMULATOR_SITE) {
    return emulator::shuffled(value, lane & 31, "shfl", site);
}
inline unsigned ballot(bool predicate, EMULATOR_SITE) { return emulator::voted(predicate, "ballot", site); }
inline bool any_sync(bool predicate, EMULATOR_SITE) { return emulator::voted(predicate, "any_sync", site) != 0; }
inline unsigned match_any(int number, EMULATOR_SITE) {
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane)
        same |= unsigned(emulator::shuffled(number, lane, "match_any", site) == number) << lane;
    return same;
}
inline void syncwarp(EMULATOR_SITE) { emulator::collective(emulator::syncwarp, "syncwarp", nullptr, site); }

inline int popcount(unsigned bits) { return __builtin_popcount(bits); }
inline int highest_bit(unsigned bits) { return bits ? 31 - __builtin_clz(bits) : -1; }

inline void atomic_or(unsigned* address, unsigned bits, EMULATOR_SITE) {
    emulator::atomic(address, [=](unsigned old) { return old | bits; }, "atomic_or", site);
}
inline void atomic_add(int* address, int n, EMULATOR_SITE) {
    emulator::atomic(address, [=](int old) { return old + n; }, "atomic_add", site);
}

template <class T>
inline float to_float(T x) {
    return emulator::widen(x);
}
template <class T>
inline T from_float(float x) {
    T result;
    emulator::narrow(result, x);
    return result;
}
template <class T>
inline unsigned pack2(float low, float high) {
    return unsigned(from_float<T>(low).bits) | unsigned(from_float<T>(high).bits) << 16;
}
template <class T>
inline float2 unpack2(unsigned packed) {
    return {to_float(T{(unsigned short)packed}), to_float(T{(unsigned short)(packed >> 16)})};
}
