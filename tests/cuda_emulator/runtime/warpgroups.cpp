// Products by wgmma: they read shared memory, and their sums change, when a thread waits for them and not earlier.
//
// An operand lies in shared memory in rows of 128 bytes, groups of eight rows one behind the other by the stride, 64
// columns behind the 64 before by the leading stride, the 16-byte chunks of a row permuted by bits 7 to 9 of its address:
// "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Strides" of the PTX ISA, for a swizzle of 128 bytes.
#include "runtime.hpp"

namespace emulator {

namespace {

constexpr int64_t ROW = 128, ROWS = 8, SWIZZLED = 1;

// What a warp of a warpgroup multiplied, which the others must multiply too.
struct Operands {
    uint64_t a, b;
};
std::vector<Operands> operands_of[MAX_WARPS / 4];
std::size_t n_multiplied[MAX_WARPS];
Place place_of_wait;

struct Operand {
    int64_t start, leading, stride;

    explicit Operand(uint64_t bits)
        : start(int64_t(bits & 0x3fff) << 4), leading(int64_t(bits >> 16 & 0x3fff) << 4),
          stride(int64_t(bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != SWIZZLED || bits >> 49 & 7)
            fail(format("wgmma of operand 0x%llx: expected a swizzle of 128 bytes and no base offset",
                        (unsigned long long)bits), place_of_wait);
    }

    unsigned short at(int row, int column) const {
        int64_t offset = start + row / ROWS * stride + row % ROWS * ROW + column / 64 * leading + column % 64 * 2;
        const unsigned char* address = shared_memory + (offset ^ (offset >> 3 & 0x70));
        if (!is_shared(address, 2)) fail("wgmma out of bounds: " + describe_address(address), place_of_wait);
        if (launch->is_checked) check_access(address, 2, Access::product, place_of_wait.address);
        unsigned short value;
        std::memcpy(&value, address, sizeof value);
        return value;
    }
};

float widened(unsigned short bits, bool is_bf16) { return is_bf16 ? to_float(bf16{bits}) : to_float(half{bits}); }

// Nobody may read the sums of a step that is under way: they turn into NaN, and come back when it is multiplied.
void hide_sums(std::vector<StepUnderWay>& steps, std::size_t i) {
    for (std::size_t other = 0; other < i; ++other)
        if (steps[other].d == steps[i].d) return;
    StepUnderWay& step = steps[i];
    step.is_first = true;
    std::memcpy(step.before, step.d, step.bytes());
    std::memset(step.d, 0xff, step.bytes());
}

// A warp's 16 rows of a step.
void multiply(void* const* lanes, std::size_t i) {
    auto step_of = [=](int lane) -> StepUnderWay& { return static_cast<Fiber*>(lanes[lane])->steps[i]; };
    const StepUnderWay& step = step_of(0);
    const Fiber& first = *static_cast<Fiber*>(lanes[0]);
    float a[16][16], b[16][MAX_COLUMNS];
    const Operand b_operand(step.b_operand);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < step.columns; ++n)
            b[k][n] = widened(step.b_is_by_columns ? b_operand.at(k, n) : b_operand.at(n, k), step.is_bf16);
    if (step.a_is_shared) {
        const Operand a_operand(step.a_operand);
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k) a[row][k] = widened(a_operand.at(first.warp % 4 * 16 + row, k), step.is_bf16);
    } else {
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 8; ++e)
                a[lane / 4 + e / 2 % 2 * 8][lane % 4 * 2 + e % 2 + e / 4 * 8] =
                    widened((unsigned short)(step_of(lane).a[e / 2] >> 16 * (e % 2)), step.is_bf16);
    }
    float d[16][MAX_COLUMNS] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < step.columns; ++n) d[row][n] += a[row][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane) {
        StepUnderWay& own = step_of(lane);
        if (own.is_first) std::memcpy(own.d, own.before, own.bytes());
        for (int e = 0; e < step.columns / 2; ++e) {
            float sum = d[lane / 4 + e / 2 % 2 * 8][e / 4 * 8 + lane % 4 * 2 + e % 2];
            own.d[e] = own.adds ? own.d[e] + sum : sum;
        }
    }
}

// Steps that are waited for: the first so many of each lane.
std::size_t n_waited_for;

void multiply_all(void* const* lanes) {
    Fiber& first = *static_cast<Fiber*>(lanes[0]);
    place_of_wait = first.place;
    for (int lane = 0; lane < 32; ++lane)
        if (static_cast<Fiber*>(lanes[lane])->steps.size() != first.steps.size())
            fail("wgmma by a part of a warp", place_of_wait);
    for (std::size_t i = 0; i < n_waited_for; ++i) {
        Operands own = {first.steps[i].a_operand, first.steps[i].b_operand};
        auto& others = operands_of[first.warp / 4];
        std::size_t at = n_multiplied[first.warp]++;
        if (at == others.size()) others.push_back(own);
        bool is_same = others[at].a == own.a && others[at].b == own.b;
        for (int lane = 0; lane < 32; ++lane) {
            const Step& step = static_cast<Fiber*>(lanes[lane])->steps[i];
            is_same = is_same && step.a_operand == own.a && step.b_operand == own.b;
        }
        if (!is_same) fail("wgmma of different operands in a warpgroup", place_of_wait);
        multiply(lanes, i);
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto& steps = static_cast<Fiber*>(lanes[lane])->steps;
        steps.erase(steps.begin(), steps.begin() + std::ptrdiff_t(n_waited_for));
        for (std::size_t i = 0; i < steps.size(); ++i)
            if (!steps[i].is_first) hide_sums(steps, i);
    }
}

}  // namespace

void start_warpgroups() {
    for (auto& operands : operands_of) operands.clear();
    for (auto& n : n_multiplied) n = 0;
}

uint64_t operand(const void* tile, int stride, int leading, Site site) {
    int64_t offset = static_cast<const unsigned char*>(tile) - shared_memory;
    if (!is_shared(tile, 1) || offset % 16 || stride % 16 || leading % 16)
        fail("operand of wgmma at " + describe_address(tile) +
                 format(", strides %d and %d: expected multiples of 16", stride, leading),
             {site, __builtin_return_address(0)});
    return uint64_t(SWIZZLED) << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
           uint64_t(offset >> 4);
}

void begin_step(const Step& step, Site site) {
    Fiber& self = running();
    if (n_threads % 128) fail("wgmma in a block without whole warpgroups", {site, __builtin_return_address(0)});
    self.steps.push_back({step, {}, false, self.step_groups});
    hide_sums(self.steps, self.steps.size() - 1);
}

void commit_steps() { ++running().step_groups; }

void wait_for_steps(int groups, Site site) {
    Fiber& self = running();
    std::size_t n = 0;
    while (n < self.steps.size() && self.steps[n].group < self.step_groups - groups) ++n;
    n_waited_for = n;
    collective(multiply_all, "wgmma_wait", &self, site);
}

}  // namespace emulator
