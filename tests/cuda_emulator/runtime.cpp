// Runs the blocks of a grid one after another, the threads of a block as fibers of one thread of the system.
//
// A fiber runs until it waits for its warp or its block. Any order of lanes and warps between two barriers is one that a
// GPU may take, so a seed draws another one and a missing barrier becomes a wrong number. With checks on, the kernel is
// compiled with -fsanitize=thread, whose calls before each load and store end here instead of in its own library:
// accesses out of bounds and shared memory touched by two threads without a barrier between them are then errors.
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ptx.cuh"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// What a function must keep is pushed on the stack of the fiber that stops, and popped from that of the one that goes on.
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
// A function finds the stack 8 bytes off a multiple of 16, where its caller's address lies.
constexpr int FRAME_WORDS = 8, RETURN_WORD = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");
constexpr int FRAME_WORDS = 20, RETURN_WORD = 11;
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif
extern "C" void emulator_switch(void** save, void* restore);

namespace emulator {

Thread* current;
uint3 block_index;
dim3 block_dim, grid_dim;
unsigned char* shared_memory;

namespace {

constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32, BARRIERS = 16;
constexpr std::size_t STACK = 256 << 10, PAGE = 64 << 10, MAX_SHARED = 1 << 20;
constexpr unsigned char POISON = 0xff;  // every float, half and bfloat16 of it is NaN, every int -1
constexpr unsigned char CANARY = 0xa5;

struct Region {
    uintptr_t begin, end;
    int argument;
};

struct Copy {
    unsigned char* shared;
    const void* global;
    int bytes;
    bool valid;
    int group;
};

struct Copies {
    std::vector<Copy> pending;
    int committed = 0;
};

enum class State { running, collective, barrier, ended };

struct Fiber : Thread {
    State state;
    const char* waits_in;
    Site site;
    Copies copies;
};

struct Warp {
    uint32_t lanes, runnable, arrived;
    Operation operation;
    void* arguments[32];
};

struct Barrier {
    int expected, arrived, votes;
    BarrierVotes result;
    const char* name;
    Site site;
    uint32_t waiting[MAX_WARPS];
};

struct Launch {
    const Kernel* kernel;
    uint32_t grid[3], block[3];
    int64_t shared_bytes;
    void* const* arguments;
    uint64_t seed;
    int shuffled, checked;
    const Region* regions;
    int region_count;
    char* error;
    int error_bytes;
};

Fiber fibers[MAX_THREADS];
Thread scheduler;
Warp warps[MAX_WARPS];
Barrier barriers[BARRIERS];
unsigned char *stacks, *shared_arena;
const Launch* launch;
int thread_count, warp_count, ended;
int64_t shared_bytes;
bool failed;
uint64_t random_state;

uint64_t random_bits() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1dull >> 32;
}

void switch_to(Thread* next) {
    Thread* self = current;
    current = next;
    emulator_switch(&self->stack_pointer, next->stack_pointer);
}

// Of the set lanes, one at random, or the first after the given one.
int pick_bit(uint32_t mask, int after) {
    int turn = (launch->shuffled ? int(random_bits()) : after + 1) & 31;
    uint32_t turned = mask >> turn | mask << (-turn & 31);
    return (turn + __builtin_ctz(turned)) & 31;
}

Thread* next_thread(int warp, int lane) {
    if (warps[warp].runnable) return &fibers[warp * 32 + pick_bit(warps[warp].runnable, lane)];
    int start = launch->shuffled ? int(random_bits() % warp_count) : warp + 1;
    for (int i = 0; i < warp_count; ++i) {
        int other = (start + i) % warp_count;
        if (warps[other].runnable) return &fibers[other * 32 + pick_bit(warps[other].runnable, 31)];
    }
    return &scheduler;
}

void wait_here(State state, const char* name, Site site) {
    auto* self = static_cast<Fiber*>(current);
    self->state = state;
    self->waits_in = name;
    self->site = site;
    warps[self->warp].runnable &= ~(1u << self->lane);
    switch_to(next_thread(self->warp, self->lane));
}

void end_thread() {
    ++ended;
    wait_here(State::ended, "", {"", 0});
    __builtin_unreachable();
}

void run_thread() {
    launch->kernel->call(launch->kernel->function, launch->arguments);
    end_thread();
}

const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
    char buffer[512];
    va_list values;
    va_start(values, text);
    vsnprintf(buffer, sizeof buffer, text, values);
    va_end(values);
    return buffer;
}

std::string at(Site site) { return format("%s:%d", base_name(site.file), site.line); }

void report(const std::string& message) {
    failed = true;
    snprintf(launch->error, launch->error_bytes, "%s", message.c_str());
}

std::string where() {
    std::string block = format("block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
    if (current == &scheduler) return block;
    return format("thread (%u, %u, %u) of ", current->index.x, current->index.y, current->index.z) + block;
}

[[noreturn]] void abandon(const std::string& message) {
    report(message);
    switch_to(&scheduler);
    __builtin_unreachable();
}

// What each lane of a warp does: "lanes 0-15 wait in shfl_xor (a.cu:12), lanes 16-31 have ended".
std::string lanes_of(int warp) {
    auto activity = [](const Fiber& fiber) {
        if (fiber.state == State::ended) return std::string("ended");
        if (fiber.state == State::running) return std::string("not there yet");
        return std::string("in ") + fiber.waits_in + " (" + at(fiber.site) + ")";
    };
    std::string text;
    int count = std::min(32, thread_count - 32 * warp);
    for (int first = 0, last; first < count; first = last + 1) {
        std::string what = activity(fibers[warp * 32 + first]);
        for (last = first; last + 1 < count && activity(fibers[warp * 32 + last + 1]) == what;) ++last;
        text += (text.empty() ? "" : ", ") + (first == last ? format("lane %d ", first) : format("lanes %d-%d ", first, last)) + what;
    }
    return format("warp %d: ", warp) + text;
}

void report_standstill() {
    for (int warp = 0; warp < warp_count; ++warp)
        if (warps[warp].arrived)
            return report("divergence: only a part of a warp reaches a collective; " + where() + ", " + lanes_of(warp));
    std::string text;
    for (int warp = 0, last; warp < warp_count; warp = last + 1) {
        auto tail = [](int w) { auto lanes = lanes_of(w); return lanes.substr(lanes.find(':')); };
        for (last = warp; last + 1 < warp_count && tail(last + 1) == tail(warp);) ++last;
        text += "; " + (last == warp ? lanes_of(warp) : format("warps %d-%d", warp, last) + tail(warp));
    }
    report("barrier not reached by all of its threads; " + where() + text);
}

bool in(uintptr_t address, const void* begin, int64_t bytes) {
    return address - reinterpret_cast<uintptr_t>(begin) < uint64_t(bytes);
}

bool in_shared(const void* address, int64_t bytes) {
    int64_t offset = static_cast<const unsigned char*>(address) - shared_memory;
    return offset >= 0 && offset + bytes <= shared_bytes;
}

std::string describe_address(const void* address) {
    int64_t offset = static_cast<const unsigned char*>(address) - shared_memory;
    if (in(uintptr_t(address), shared_arena, MAX_SHARED + 2 * PAGE))
        return format("byte %lld of shared memory, which has %lld", (long long)offset, (long long)shared_bytes);
    const Region* nearest = nullptr;
    uint64_t distance = UINT64_MAX;
    bool behind = false;
    auto a = uintptr_t(address);
    for (int i = 0; i < launch->region_count; ++i) {
        const Region& region = launch->regions[i];
        uint64_t gap = a < region.begin ? region.begin - a : a >= region.end ? a - region.end : 0;
        if (gap < distance) nearest = &region, distance = gap, behind = a >= region.begin;
    }
    if (!nearest) return format("%p, and no argument is a tensor", address);
    return format("%p, %llu bytes %s argument %d", address, (unsigned long long)distance,
                  behind ? "past the end of" : "before", nearest->argument);
}

bool in_regions(const void* address, int bytes) {
    auto begin = uintptr_t(address);
    for (int i = 0; i < launch->region_count; ++i)
        if (begin >= launch->regions[i].begin && begin + bytes <= launch->regions[i].end) return true;
    return false;
}

std::string in_code(const void* address) {
    Dl_info info;
    if (!dladdr(address, &info)) return "";
    return format(" [%s+0x%llx]", info.dli_fname,
                  (unsigned long long)(uintptr_t(address) - uintptr_t(info.dli_fbase) - 1));
}

void on_fault(int number, siginfo_t* info, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    auto* instruction = reinterpret_cast<void*>(machine.gregs[REG_RIP]);
#else
    auto* instruction = reinterpret_cast<void*>(machine.pc);
#endif
    std::string what;
    if (number == SIGFPE) what = "division of an integer by zero";
    else if (!info->si_addr) what = "invalid memory access: a null pointer, or a vector access that is not aligned";
    else if (in(uintptr_t(info->si_addr), stacks, STACK * MAX_THREADS)) what = "stack overflow";
    else what = "invalid memory access: " + describe_address(info->si_addr);
    // The context of the fault is left for good; SA_NODEFER keeps the signal unblocked.
    abandon(what + "; " + where() + in_code(static_cast<char*>(instruction) + 1));
}

struct Faults {
    static constexpr int numbers[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(64 << 10);

    Faults() {
        stack_t own = {};
        own.ss_sp = stack.data();
        own.ss_size = stack.size();
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &action, &before[i]);
    }
    ~Faults() {
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

void* map(std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("cuda_emulator: mmap");
        abort();
    }
    return memory;
}

void allocate() {
    if (stacks) return;
    stacks = static_cast<unsigned char*>(map(STACK * MAX_THREADS));
    for (int i = 0; i < MAX_THREADS; ++i) mprotect(stacks + STACK * i, PAGE, PROT_NONE);
    shared_arena = static_cast<unsigned char*>(map(MAX_SHARED + 2 * PAGE));
    mprotect(shared_arena, PAGE, PROT_NONE);
    mprotect(shared_arena + PAGE + MAX_SHARED, PAGE, PROT_NONE);
}

// Shared memory ends as near to a page without access as its alignment lets it.
constexpr std::size_t SHARED_ALIGNMENT = 1024;

void place_shared() {
    std::size_t padded = (shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    shared_memory = shared_arena + PAGE + MAX_SHARED - padded;
    std::memset(shared_memory - SHARED_ALIGNMENT, CANARY, padded + SHARED_ALIGNMENT);
}

void check_canaries() {
    auto check = [](int64_t from, int64_t to) {
        for (int64_t i = from; i < to && !failed; ++i)
            if (shared_memory[i] != CANARY)
                report("shared memory written out of bounds: " + describe_address(shared_memory + i) + "; " + where());
    };
    check(-int64_t(SHARED_ALIGNMENT), 0);
    check(shared_bytes, (shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT);
}

void start_thread(int number) {
    Fiber& fiber = fibers[number];
    auto* top = reinterpret_cast<void**>(stacks + STACK * (number + 1)) - 8;
    auto* frame = top - FRAME_WORDS;
    std::memset(frame, 0, sizeof(void*) * (top - frame));
    frame[RETURN_WORD] = reinterpret_cast<void*>(run_thread);
    fiber.stack_pointer = frame;
    unsigned n = unsigned(number);
    fiber.index = {n % block_dim.x, n / block_dim.x % block_dim.y, n / block_dim.x / block_dim.y};
    fiber.lane = number % 32;
    fiber.warp = number / 32;
    fiber.number = number;
    fiber.state = State::running;
    fiber.copies.pending.clear();
    fiber.copies.committed = 0;
}

void start_checks();

void run_block() {
    std::memset(shared_memory, POISON, shared_bytes);
    ended = 0;
    for (int i = 0; i < thread_count; ++i) start_thread(i);
    for (int w = 0; w < warp_count; ++w) {
        int count = std::min(32, thread_count - 32 * w);
        uint32_t lanes = count == 32 ? ~0u : (1u << count) - 1;
        warps[w] = {lanes, lanes, 0, nullptr, {}};
    }
    for (Barrier& barrier : barriers) barrier = {};
    if (launch->checked) start_checks();
    switch_to(next_thread(warp_count - 1, 31));
    if (failed) return;
    if (ended < thread_count) report_standstill();
    else check_canaries();
}

}  // namespace

void fail(Site site, const char* text, ...) {
    char buffer[512];
    va_list values;
    va_start(values, text);
    vsnprintf(buffer, sizeof buffer, text, values);
    va_end(values);
    abandon(buffer + ("; " + where() + ", ") + at(site));
}

void synchronise_warp(int warp);
void synchronise_threads(const uint32_t* lanes);

void collective(Operation operation, const char* name, void* argument, Site site) {
    auto* self = static_cast<Fiber*>(current);
    Warp& warp = warps[self->warp];
    if (warp.lanes != ~0u) fail(site, "%s in a warp of %d lanes: blocks of a multiple of 32 threads only", name, __builtin_popcount(warp.lanes));
    if (warp.arrived) {
        const Fiber& first = fibers[self->warp * 32 + __builtin_ctz(warp.arrived)];
        if (operation != warp.operation || site.line != first.site.line) {
            self->state = State::collective;
            self->waits_in = name;
            self->site = site;
            abandon("divergence: the lanes of a warp reach different collectives; " + where() + ", " + lanes_of(self->warp));
        }
    }
    warp.operation = operation;
    warp.arguments[self->lane] = argument;
    warp.arrived |= 1u << self->lane;
    if (warp.arrived != warp.lanes) {
        wait_here(State::collective, name, site);
        return;
    }
    operation(warp.arguments);
    if (launch->checked && operation == nothing) synchronise_warp(self->warp);
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) fibers[self->warp * 32 + lane].state = State::running;
    warp.runnable = warp.lanes;
    if (launch->shuffled) {
        // Now and then another warp goes on first.
        bool leave = warp_count > 1 && random_bits() % 8 == 0;
        int next = leave ? int(random_bits() % warp_count) : self->warp;
        Thread* thread = next_thread(warps[next].runnable ? next : self->warp, self->lane);
        if (thread != self) switch_to(thread);
    }
}

BarrierVotes barrier(int id, int threads, bool vote, const char* name, Site site) {
    auto* self = static_cast<Fiber*>(current);
    if (id < 0 || id >= BARRIERS) fail(site, "%s: barrier %d: expected 0 to %d", name, id, BARRIERS - 1);
    if (threads == 0) threads = thread_count;
    if (threads > thread_count) fail(site, "%s waits for %d threads; the block has %d", name, threads, thread_count);
    Barrier& barrier = barriers[id];
    bool strict = id == 0;
    if (barrier.arrived == 0) barrier.expected = threads, barrier.name = name, barrier.site = site;
    else if (threads != barrier.expected)
        fail(site, "%s waits for %d threads, but %s (%s) for %d", name, threads, barrier.name, at(barrier.site).c_str(), barrier.expected);
    else if (strict && (barrier.name != name || barrier.site.line != site.line))
        fail(site, "the threads of a block reach different barriers: %s (%s) and %s", barrier.name, at(barrier.site).c_str(), name);
    ++barrier.arrived;
    barrier.votes += vote;
    barrier.waiting[self->warp] |= 1u << self->lane;
    if (barrier.arrived < barrier.expected) {
        wait_here(State::barrier, name, site);
        return barrier.result;
    }
    if (launch->checked) synchronise_threads(barrier.waiting);
    BarrierVotes result = {barrier.votes, barrier.expected};
    for (int w = 0; w < warp_count; ++w) {
        for (uint32_t lanes = barrier.waiting[w]; lanes; lanes &= lanes - 1)
            fibers[w * 32 + __builtin_ctz(lanes)].state = State::running;
        warps[w].runnable |= barrier.waiting[w];
    }
    barrier = {};
    barrier.result = result;
    if (launch->shuffled) {
        int next = int(random_bits() % warp_count);
        Thread* thread = next_thread(warps[next].runnable ? next : self->warp, self->lane);
        if (thread != self) switch_to(thread);
    }
    return result;
}

namespace {

void land(const Copy& copy, Site site) {
    (void)site;
    if (copy.valid) std::memcpy(copy.shared, copy.global, copy.bytes);
    else std::memset(copy.shared, 0, copy.bytes);
}

}  // namespace

void start_copy(const void* shared, int bytes, Site site);
void finish_copy(const void* shared, int bytes);

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site) {
    check_shared(shared, bytes, bytes, true, "cp_async", site);
    if (uintptr_t(global) % bytes) fail(site, "cp_async from %p, which is not aligned to %d bytes", global, bytes);
    if (valid && !in_regions(global, bytes)) fail(site, "cp_async out of bounds: %s", describe_address(global).c_str());
    std::memset(shared, POISON, bytes);
    if (launch->checked) start_copy(shared, bytes, site);
    Copies& copies = static_cast<Fiber*>(current)->copies;
    copies.pending.push_back({static_cast<unsigned char*>(shared), global, bytes, valid, copies.committed});
}

void copy_async_commit() { ++static_cast<Fiber*>(current)->copies.committed; }

void copy_async_wait(int groups) {
    Copies& copies = static_cast<Fiber*>(current)->copies;
    std::size_t done = 0;
    for (; done < copies.pending.size() && copies.pending[done].group < copies.committed - groups; ++done) {
        land(copies.pending[done], {});
        if (launch->checked) finish_copy(copies.pending[done].shared, copies.pending[done].bytes);
    }
    copies.pending.erase(copies.pending.begin(), copies.pending.begin() + done);
}

void touch_shared(const void* address, int bytes, bool writes, const std::string& site);

void check_shared(const void* address, int bytes, int alignment, bool writes, const char* name, Site site) {
    if (!in_shared(address, bytes)) fail(site, "%s out of bounds: %s", name, describe_address(address).c_str());
    if (uintptr_t(address) % alignment)
        fail(site, "%s at byte %d of shared memory: expected a multiple of %d", name, int(static_cast<const unsigned char*>(address) - shared_memory), alignment);
    if (launch->checked && !writes) touch_shared(address, bytes, false, at(site));
}

void check_atomic(const void* address, int bytes, const char* name, Site site) {
    if (!in_shared(address, bytes) && !in_regions(address, bytes))
        fail(site, "%s out of bounds: %s", name, describe_address(address).c_str());
}

uint32_t shared_offset(const void* address, Site site) {
    if (!in_shared(address, 0)) fail(site, "smem_address of memory that is not shared: %s", describe_address(address).c_str());
    return uint32_t(static_cast<const unsigned char*>(address) - shared_memory);
}

// Operations on warps. Lane l of a fragment holds row l / 4 and the columns 2 (l % 4) and 2 (l % 4) + 1.

namespace {

template <class T, int K>
void mma(void* const* lanes) {
    alignas(64) float a[16][K], b[K][8], d[16][8] = {};
    auto unpack = [](uint32_t word, float& low, float& high) {
        low = widen(T{uint16_t(word)});
        high = widen(T{uint16_t(word >> 16)});
    };
    for (int lane = 0; lane < 32; ++lane) {
        auto& fragments = *static_cast<const Fragments*>(lanes[lane]);
        int row = lane / 4, column = lane % 4 * 2;
        for (int half = 0; half < K / 8; ++half) {
            int k = column + 8 * half;
            for (int i = 0; i < 2; ++i) unpack(fragments.a[2 * half + i], a[row + 8 * i][k], a[row + 8 * i][k + 1]);
            unpack(fragments.b[half], b[k][row], b[k + 1][row]);
        }
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        float* out = static_cast<const Fragments*>(lanes[lane])->d;
        int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) out[i] += d[row + i / 2 * 8][column + i % 2];
    }
}

}  // namespace

void mma_16x8x16_half(void* const* lanes) { mma<__half, 16>(lanes); }
void mma_16x8x16_bfloat16(void* const* lanes) { mma<__nv_bfloat16, 16>(lanes); }
void mma_16x8x8_half(void* const* lanes) { mma<__half, 8>(lanes); }

template <int MATRICES, bool TRANSPOSED>
void ldmatrix(void* const* lanes) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
        uint16_t values[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(values[row], static_cast<const Rows*>(lanes[8 * matrix + row])->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            int i = lane / 4, j = lane % 4 * 2;
            uint32_t low = TRANSPOSED ? values[j][i] : values[i][j];
            uint32_t high = TRANSPOSED ? values[j + 1][i] : values[i][j + 1];
            static_cast<const Rows*>(lanes[lane])->registers[matrix] = low | high << 16;
        }
    }
}
template void ldmatrix<1, false>(void* const*);
template void ldmatrix<2, false>(void* const*);
template void ldmatrix<4, false>(void* const*);
template void ldmatrix<1, true>(void* const*);
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
    uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane) result |= uint32_t(static_cast<const Vote*>(lanes[lane])->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Vote*>(lanes[lane])->result = result;
}

void nothing(void* const*) {}

// Checks.

namespace {
void start_checks() {}
}
void synchronise_warp(int) {}
void synchronise_threads(const uint32_t*) {}
void start_copy(const void*, int, Site) {}
void finish_copy(const void*, int) {}
void touch_shared(const void*, int, bool, const std::string&) {}

}  // namespace emulator

// 0, or 1 with the message in launch->error.
extern "C" __attribute__((visibility("default"))) int emulator_launch(const emulator::Launch* request) {
    using namespace emulator;
    launch = request;
    failed = false;
    shared_bytes = request->shared_bytes;
    random_state = request->seed * 0x9e3779b97f4a7c15ull | 1;
    grid_dim = {request->grid[0], request->grid[1], request->grid[2]};
    block_dim = {request->block[0], request->block[1], request->block[2]};
    thread_count = int(block_dim.x * block_dim.y * block_dim.z);
    warp_count = (thread_count + 31) / 32;
    allocate();
    place_shared();
    current = &scheduler;
    Faults faults;
    uint64_t blocks = uint64_t(grid_dim.x) * grid_dim.y * grid_dim.z;
    // A step that has no divisor in common with their number visits all blocks once, in another order.
    uint64_t step = 1, start = 0;
    if (request->shuffled && blocks > 1) {
        auto divisor = [](uint64_t a, uint64_t b) { while (b) { uint64_t rest = a % b; a = b; b = rest; } return a; };
        do step = random_bits() % blocks + 1; while (divisor(step, blocks) != 1);
        start = random_bits() % blocks;
    }
    for (uint64_t i = 0; i < blocks && !failed; ++i) {
        uint64_t block = (start + i * step) % blocks;
        block_index = {unsigned(block % grid_dim.x), unsigned(block / grid_dim.x % grid_dim.y), unsigned(block / grid_dim.x / grid_dim.y)};
        run_block();
    }
    return failed;
}
