// Runs the blocks of a grid one after another, the threads of a block as fibers of one thread of the system.
//
// A fiber runs until it waits for its warp or its block. A GPU may take any order of lanes and warps between two
// barriers, so a seed draws one, and a missing barrier becomes a wrong number.
#include "runtime.hpp"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>

// What a function must keep goes on the stack of the fiber that stops, and comes from that of the one that goes on.
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
uint3 block_index, block_dim, grid_dim;
unsigned char* shared_memory;

const Launch* launch;
int n_threads, n_warps;
int32_t block_number;
Fiber fibers[MAX_THREADS];

namespace {

constexpr std::size_t STACK = 256 << 10, STACK_GUARD = 64 << 10, SHARED_GUARD = 64 << 20;
constexpr unsigned char CANARY = 0xa5;
// Shared memory ends as near to a page without access as its alignment lets it.
constexpr int64_t SHARED_ALIGNMENT = 1024;

struct Warp {
    uint32_t lanes, runnable, arrived;
    Operation operation;
    void* arguments[32];
};

struct Barrier {
    int arrived, votes, result;
    const char* name;
    Place place;
    uint32_t waiting[MAX_WARPS];
};

Thread scheduler;
Warp warps[MAX_WARPS];
Barrier block_barrier, first_barrier;
unsigned char *stacks, *shared_arena;
int n_ended;
bool has_failed;
uint64_t random_state;

uint32_t random_bits() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return uint32_t(random_state * 0x2545f4914f6cdd1dull >> 32);
}

void switch_to(Thread* next) {
    Thread* self = current;
    current = next;
    emulator_switch(&self->stack_pointer, next->stack_pointer);
}

// One of the lanes set: the first after the given one, or any.
int pick(uint32_t lanes, int after) {
    int turn = int(launch->is_shuffled ? random_bits() : unsigned(after + 1)) & 31;
    uint32_t turned = lanes >> turn | lanes << (-turn & 31);
    return (turn + __builtin_ctz(turned)) & 31;
}

// The next thread that can run: of this warp, else of another one; now and then of another one at once if the order is
// drawn.
Thread* next_thread(int warp, int lane) {
    bool stays = warps[warp].runnable && !(launch->is_shuffled && random_bits() % 8 == 0);
    if (stays) return &fibers[warp * 32 + pick(warps[warp].runnable, lane)];
    int start = launch->is_shuffled ? int(random_bits() % unsigned(n_warps)) : warp + 1;
    for (int i = 0; i < n_warps; ++i) {
        int other = (start + i) % n_warps;
        if (warps[other].runnable) return &fibers[other * 32 + pick(warps[other].runnable, 31)];
    }
    return &scheduler;
}

void run_thread() {
    launch->kernel->call(launch->kernel->function, launch->arguments);
    ++n_ended;
    wait(running(), State::ended);
}

std::string activity(const Fiber& fiber) {
    if (fiber.state == State::ended) return "ended";
    if (&fiber != current && warps[fiber.warp].runnable >> fiber.lane & 1) return "not there yet";
    return fiber.waits_in + (" at " + to_string(fiber.place));
}

// "lanes 0-15 shfl_xor at a.cu:12, lanes 16-31 ended"
std::string lanes_of(int warp) {
    std::string text;
    int count = std::min(32, n_threads - 32 * warp);
    for (int first = 0, last; first < count; first = last + 1) {
        std::string what = activity(fibers[warp * 32 + first]);
        for (last = first; last + 1 < count && activity(fibers[warp * 32 + last + 1]) == what;) ++last;
        if (first > 0) text += ", ";
        text += first == last ? format("lane %d ", first) : format("lanes %d-%d ", first, last);
        text += what;
    }
    return text;
}

void report(const std::string& message) {
    if (has_failed) return;
    has_failed = true;
    snprintf(launch->error, std::size_t(launch->error_bytes), "%s", message.c_str());
}

// No thread can run, and not all have ended.
void report_standstill() {
    std::string mbarriers = mbarriers_waited_for();
    for (int warp = 0; warp < n_warps; ++warp)
        if (warps[warp].arrived)
            return report("divergence: a part of a warp reaches a collective; " + mbarriers + where() +
                          format(", warp %d: ", warp) + lanes_of(warp));
    std::string text = (mbarriers.empty() ? "barrier not reached by all threads; " : mbarriers) + where();
    for (int warp = 0, last; warp < n_warps; warp = last + 1) {
        std::string lanes = lanes_of(warp);
        for (last = warp; last + 1 < n_warps && lanes_of(last + 1) == lanes;) ++last;
        text += warp == last ? format(", warp %d: ", warp) : format(", warps %d-%d: ", warp, last);
        text += lanes;
    }
    report(text);
}

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
    for (int i = 0; i < MAX_THREADS; ++i) mprotect(stacks + STACK * std::size_t(i), STACK_GUARD, PROT_NONE);
    shared_arena = static_cast<unsigned char*>(map(MAX_SHARED + 2 * SHARED_GUARD));
    mprotect(shared_arena, SHARED_GUARD, PROT_NONE);
    mprotect(shared_arena + SHARED_GUARD + MAX_SHARED, SHARED_GUARD, PROT_NONE);
}

int64_t padded_shared_bytes() {
    return (launch->shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
}

void place_shared() {
    shared_memory = shared_arena + SHARED_GUARD + MAX_SHARED - padded_shared_bytes();
    std::memset(shared_memory - SHARED_ALIGNMENT, CANARY, std::size_t(padded_shared_bytes() + SHARED_ALIGNMENT));
}

void check_canaries() {
    for (int64_t i = -SHARED_ALIGNMENT; i < padded_shared_bytes(); ++i)
        if ((i < 0 || i >= launch->shared_bytes) && shared_memory[i] != CANARY)
            return report("shared memory written out of bounds: " + describe_address(shared_memory + i) + "; " +
                          where());
}

void start_thread(int number) {
    Fiber& fiber = fibers[number];
    // Not all at the same offset in a page: the same frames of all threads would then compete for the same cache lines.
    auto* top = reinterpret_cast<void**>(stacks + STACK * std::size_t(number + 1) - 64 * (1 + 17 * number % 256));
    void** frame = top - FRAME_WORDS;
    std::fill(frame, top, nullptr);
    frame[RETURN_WORD] = reinterpret_cast<void*>(run_thread);
    fiber.stack_pointer = frame;
    auto n = unsigned(number);
    fiber.index = {n % block_dim.x, n / block_dim.x % block_dim.y, n / block_dim.x / block_dim.y};
    fiber.lane = number % 32;
    fiber.warp = number / 32;
    fiber.number = number;
    fiber.state = State::running;
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.steps.clear();
    fiber.step_groups = 0;
    fiber.fences.clear();
    fiber.has_waited = false;
}

void run_block() {
    std::memset(shared_memory, POISON, std::size_t(launch->shared_bytes));
    n_ended = 0;
    block_barrier = first_barrier = {};
    start_warpgroups();
    start_mbarriers();
    for (int i = 0; i < n_threads; ++i) start_thread(i);
    for (int w = 0; w < n_warps; ++w) {
        int count = std::min(32, n_threads - 32 * w);
        uint32_t lanes = count == 32 ? ~0u : (1u << count) - 1;
        warps[w] = {lanes, lanes, 0, nullptr, {}};
    }
    if (launch->is_checked) check_block();
    switch_to(next_thread(0, 31));
    if (!has_failed && n_ended < n_threads) report_standstill();
    if (std::string message = copy_under_way(); !message.empty()) report(message);
    check_canaries();
    if (!launch->is_checked) return;
    if (std::string message = settle_suspects(); !message.empty()) report(message);
    end_block();
}

void on_fault(int number, siginfo_t* info, void* context) {
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    auto* instruction = reinterpret_cast<char*>(machine.gregs[REG_RIP]);
#else
    auto* instruction = reinterpret_cast<char*>(machine.pc);
#endif
    std::string what;
    if (number == SIGFPE) what = "division of an integer by zero";
    else if (!info->si_addr) what = "invalid memory access: a null pointer, or a vector access that is not aligned";
    else if (is_stack(info->si_addr)) what = "stack overflow";
    else what = "invalid memory access: " + describe_address(info->si_addr);
    // The handler never returns: SA_NODEFER has left the signal unblocked.
    abandon(what + "; " + where() + " at " + to_string({{"", 0}, instruction + 1}));
}

// Faults of the kernel become errors while this object lives.
class Faults {
    static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before_[3];
    stack_t stack_before_;
    std::vector<char> stack_ = std::vector<char>(64 << 10);

  public:
    Faults() {
        stack_t own = {};
        own.ss_sp = stack_.data();
        own.ss_size = stack_.size();
        sigaltstack(&own, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(NUMBERS[i], &action, &before_[i]);
    }
    ~Faults() {
        for (int i = 0; i < 3; ++i) sigaction(NUMBERS[i], &before_[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
};

bool is_in(const void* address, const void* begin, std::size_t bytes) {
    return uintptr_t(address) - uintptr_t(begin) < bytes;
}

}  // namespace

std::string format(const char* text, ...) {
    char buffer[512];
    va_list values;
    va_start(values, text);
    vsnprintf(buffer, sizeof buffer, text, values);
    va_end(values);
    return buffer;
}

// The part in brackets is for __init__.py, which finds the source lines of an address.
std::string to_string(Place place) {
    const char* slash = std::strrchr(place.site.file, '/');
    std::string text;
    if (place.site.line) text = format("%s:%d", slash ? slash + 1 : place.site.file, place.site.line);
    Dl_info info;
    if (!place.address || !dladdr(place.address, &info)) return text;
    auto offset = uintptr_t(place.address) - uintptr_t(info.dli_fbase) - 1;
    return text + format("[%s+0x%llx]", info.dli_fname, (unsigned long long)offset);
}

std::string where() {
    std::string block = format("block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
    if (current == &scheduler) return block;
    return format("thread (%u, %u, %u) of ", current->index.x, current->index.y, current->index.z) + block;
}

std::string describe_address(const void* address) {
    auto a = uintptr_t(address);
    if (is_in(address, shared_arena, MAX_SHARED + 2 * SHARED_GUARD))
        return format("byte %lld of shared memory, which has %lld",
                      (long long)(static_cast<const unsigned char*>(address) - shared_memory),
                      (long long)launch->shared_bytes);
    const Region* nearest = nullptr;
    uintptr_t least = 0;
    for (const Region* region = launch->regions; region < launch->regions + launch->n_regions; ++region) {
        uintptr_t gap = a < region->begin ? region->begin - a : a >= region->end ? a - region->end + 1 : 0;
        if (!nearest || gap < least) nearest = region, least = gap;
    }
    if (!nearest) return format("%p", address);
    long long size = (long long)(nearest->end - nearest->begin);
    if (least == 0) return format("byte %lld of a tensor of %lld bytes", (long long)(a - nearest->begin), size);
    return format("%p, %lld bytes %s a tensor of %lld", address, (long long)least,
                  a < nearest->begin ? "before the start of" : "past the last of", size);
}

bool is_shared(const void* address, int64_t bytes) {
    int64_t offset = static_cast<const unsigned char*>(address) - shared_memory;
    return offset >= 0 && offset + bytes <= launch->shared_bytes;
}

bool is_in_tensors(const void* address, int64_t bytes) {
    return std::any_of(launch->regions, launch->regions + launch->n_regions, [=](const Region& region) {
        return uintptr_t(address) >= region.begin && uintptr_t(address) + uintptr_t(bytes) <= region.end;
    });
}

bool is_stack(const void* address) { return is_in(address, stacks, STACK * MAX_THREADS); }

void abandon(const std::string& message) {
    report(message);
    switch_to(&scheduler);
    __builtin_unreachable();
}

void fail(const std::string& message, Place place) { abandon(message + "; " + where() + " at " + to_string(place)); }

void wait(Fiber& self, State state) {
    self.state = state;
    warps[self.warp].runnable &= ~(1u << self.lane);
    switch_to(next_thread(self.warp, self.lane));
    self.state = State::running;
}

void wake(const Fiber& fiber) { warps[fiber.warp].runnable |= 1u << fiber.lane; }

void shuffle_warps(const Fiber& self) {
    if (!launch->is_shuffled || n_warps == 1) return;
    int warp = int(random_bits() % unsigned(n_warps));
    Thread* next = next_thread(warps[warp].runnable ? warp : self.warp, self.lane);
    if (next != current) switch_to(next);
}

void collective(Operation operation, const char* name, void* argument, Site site) {
    Fiber& self = running();
    Warp& warp = warps[self.warp];
    self.waits_in = name;
    self.place = {site, __builtin_return_address(0)};
    if (warp.lanes != ~0u)
        fail(format("%s in a warp of %d threads: expected 32", name, __builtin_popcount(warp.lanes)), self.place);
    if (warp.arrived) {
        const Fiber& first = fibers[self.warp * 32 + __builtin_ctz(warp.arrived)];
        if (operation != warp.operation || site.line != first.place.site.line)
            abandon("divergence: the lanes of a warp reach different collectives; " + where() +
                    format(", warp %d: ", self.warp) + lanes_of(self.warp));
    }
    warp.operation = operation;
    warp.arguments[self.lane] = argument;
    warp.arrived |= 1u << self.lane;
    if (warp.arrived != warp.lanes) return wait(self, State::waiting);
    operation(warp.arguments);
    if (launch->is_checked && operation == static_cast<Operation>(syncwarp)) {
        uint32_t lanes[MAX_WARPS] = {};
        lanes[self.warp] = warp.lanes;
        join(lanes);
    }
    warp.arrived = 0;
    warp.runnable = warp.lanes;
    if (launch->is_shuffled && random_bits() % 8 == 0) shuffle_warps(self);
}

namespace {

int pass(Barrier& barrier, int threads, bool vote, const char* name, Place place) {
    Fiber& self = running();
    self.waits_in = name;
    self.place = place;
    if (barrier.arrived && (barrier.name != name || barrier.place.site.line != place.site.line))
        fail(format("the threads of a block reach different barriers: %s at ", barrier.name) +
                 to_string(barrier.place) + " and " + name,
             self.place);
    barrier.name = name;
    barrier.place = self.place;
    barrier.votes += vote;
    barrier.waiting[self.warp] |= 1u << self.lane;
    if (++barrier.arrived < threads) {
        wait(self, State::waiting);
        return barrier.result;
    }
    if (launch->is_checked) join(barrier.waiting);
    for (int w = 0; w < n_warps; ++w) warps[w].runnable |= barrier.waiting[w];
    // Nobody passes the next barrier before all have left this one with its result.
    int result = barrier.votes;
    barrier = {};
    barrier.result = result;
    shuffle_warps(self);
    return result;
}

}  // namespace

int barrier(bool vote, const char* name, Site site) {
    return pass(block_barrier, n_threads, vote, name, {site, __builtin_return_address(0)});
}

void barrier_of_first(int threads, const char* name, Site site) {
    Place place = {site, __builtin_return_address(0)};
    if (running().number >= threads) fail(format("%s of %d threads by another one", name, threads), place);
    pass(first_barrier, threads, false, name, place);
}

void copy_async(void* to, const void* from, int bytes, bool is_valid, Site site) {
    Fiber& self = running();
    Copy copy = {static_cast<unsigned char*>(to), from, bytes, is_valid, self.groups};
    Place place = {site, __builtin_return_address(0)};
    if (!is_shared(to, bytes)) fail("cp.async to memory out of bounds: " + describe_address(to), place);
    if (uintptr_t(to) % unsigned(bytes)) fail(format("cp.async to %p: expected a multiple of %d", to, bytes), place);
    if (uintptr_t(from) % unsigned(bytes))
        fail(format("cp.async from %p: expected a multiple of %d", from, bytes), place);
    if (is_valid && launch->n_regions && !is_in_tensors(from, bytes))
        fail("cp.async from memory out of bounds: " + describe_address(from), place);
    if (launch->is_checked) begin_copy(copy, place.address);
    std::memset(to, POISON, std::size_t(bytes));
    self.copies.push_back(copy);
}

void copy_async_commit() { ++running().groups; }

// The bytes land here, and not earlier.
void copy_async_wait(int groups) {
    Fiber& self = running();
    auto copy = self.copies.begin();
    for (; copy != self.copies.end() && copy->group < self.groups - groups; ++copy) {
        if (copy->is_valid) std::memcpy(copy->to, copy->from, std::size_t(copy->bytes));
        else std::memset(copy->to, 0, std::size_t(copy->bytes));
        if (launch->is_checked) end_copy(*copy);
    }
    self.copies.erase(self.copies.begin(), copy);
}

void check_shared(const void* address, int bytes, const char* name, Site site) {
    Place place = {site, __builtin_return_address(0)};
    if (!is_shared(address, bytes)) fail(name + (" out of bounds: " + describe_address(address)), place);
    if (uintptr_t(address) % unsigned(bytes))
        fail(name + (" at " + describe_address(address)) + format(": expected a multiple of %d", bytes), place);
    if (launch->is_checked) check_access(address, bytes, Access::read, place.address);
}

void check_atomic(const void* address, int bytes, const char* name, Site site) {
    if (launch->is_checked) check_access(address, bytes, Access::atomic, __builtin_return_address(0));
    else if (launch->n_regions && !is_shared(address, bytes) && !is_in_tensors(address, bytes))
        fail(name + (" out of bounds: " + describe_address(address)), {site, __builtin_return_address(0)});
}

namespace {

void run_grid() {
    int64_t blocks = int64_t(grid_dim.x) * grid_dim.y * grid_dim.z;
    // A step that has no divisor in common with their number visits all blocks once.
    int64_t step = 1, start = 0;
    if (launch->is_shuffled) {
        start = random_bits() % blocks;
        do step = random_bits() % blocks + 1;
        while (std::gcd(step, blocks) != 1);
    }
    for (int64_t i = 0; i < blocks && !has_failed; ++i) {
        block_number = int32_t((start + i * step) % blocks);
        auto n = uint64_t(block_number);
        block_index = {unsigned(n % grid_dim.x), unsigned(n / grid_dim.x % grid_dim.y),
                       unsigned(n / grid_dim.x / grid_dim.y)};
        run_block();
    }
}

}  // namespace

}  // namespace emulator

// 0, or 1 with a message in launch->error.
extern "C" int emulator_launch(const emulator::Launch* launch) {
    using namespace emulator;
    emulator::launch = launch;
    has_failed = false;
    random_state = (launch->seed + 1) * 0x9e3779b97f4a7c15ull;
    grid_dim = {launch->grid[0], launch->grid[1], launch->grid[2]};
    block_dim = {launch->block[0], launch->block[1], launch->block[2]};
    n_threads = int(block_dim.x * block_dim.y * block_dim.z);
    n_warps = (n_threads + 31) / 32;
    allocate();
    place_shared();
    current = &scheduler;
    Faults faults;
    if (launch->is_checked) check_launch();
    run_grid();
    if (launch->is_checked) {
        if (std::string message = has_failed ? "" : end_kernel(); !message.empty()) report(message);
        end_launch_checks();
    }
    emulator::launch = nullptr;
    return has_failed;
}
