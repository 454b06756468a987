// Every load and store of a kernel, looked at: is it in bounds, aligned, of something written, and ordered after the
// others' there.
//
// With checks, g++ compiles a kernel with -fsanitize=thread and others, which put calls before accesses; the functions
// called are these, not the sanitizers' own libraries.
//
// Each thread has a clock of every other thread's: how much of what that one did it has seen, by the barriers that both
// passed. Two accesses to the same byte, one of them a store, by threads of which neither has seen the other's, are a
// race. Threads of different blocks never see one another.
#include "runtime.hpp"

#include <link.h>

#include <algorithm>
#include <cstdlib>

namespace emulator {

namespace {

struct Event {
    int32_t block = -1;
    int16_t thread;  // from their number on: the bulk copies of an mbarrier, with its phase as their clock
    Access access;
    uint32_t clock, fences;
    const void* from;
};

struct Shadow {
    Event written, read[2];
    const char* taken = nullptr;  // why no thread may touch it
};

struct Memory {
    uintptr_t begin, end;
    std::vector<Shadow> bytes;
};

constexpr const char *UNDER_WAY = "touched while a bulk copy to it is under way",
                     *IS_MBARRIER = "touched as data while it is an mbarrier";

uint32_t clocks[MAX_THREADS][MAX_THREADS + MAX_MBARRIERS];
std::vector<Memory> tensors;
std::vector<Shadow> shared;
// Of each byte of shared memory, the first reader since it was written that may lack a fence.
std::vector<Event> plain_reads;
// Constants and variables of the kernels' library.
std::vector<Region> statics;

// A store in a race with another store, and what was there: harmless where it writes the same.
struct Suspect {
    const unsigned char* address;
    unsigned char value;
    std::string message;
};
std::vector<Suspect> suspects;

// Tensors may overlap; a byte has one shadow.
std::vector<Memory> merged(std::vector<Region> regions) {
    std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
    std::vector<Memory> result;
    for (const Region& region : regions)
        if (result.empty() || region.begin > result.back().end) result.push_back({region.begin, region.end, {}});
        else result.back().end = std::max(result.back().end, region.end);
    for (Memory& memory : result) memory.bytes.resize(memory.end - memory.begin);
    return result;
}

Shadow* shadow_of(const void* address, int64_t bytes) {
    auto a = uintptr_t(address);
    if (is_shared(address, bytes)) return &shared[a - uintptr_t(shared_memory)];
    if (!is_in_tensors(address, bytes)) return nullptr;
    for (Memory& memory : tensors)
        if (a >= memory.begin && a < memory.end) return &memory.bytes[a - memory.begin];
    return nullptr;
}

bool is_static(const void* address) {
    return std::any_of(statics.begin(), statics.end(), [a = uintptr_t(address)](const Region& region) {
        return a >= region.begin && a < region.end;
    });
}

bool is_seen(const Event& event, const Fiber& self) {
    if (event.block < 0) return true;
    if (event.block != block_number) return false;
    return event.thread == self.number || clocks[self.number][event.thread] >= event.clock;
}

// Whether it was no access of a thread's own, or the thread has fenced since, and this one has seen that.
bool is_fenced(const Event& event, const Fiber& self) {
    if (event.block < 0 || event.access == Access::product || event.access == Access::bulk) return true;
    const std::vector<uint32_t>& fences = fibers[event.thread].fences;
    if (event.fences >= fences.size()) return false;
    return event.thread == self.number || clocks[self.number][event.thread] >= fences[event.fences];
}

[[noreturn]] void fail(const std::string& what, const void* address, const void* from) {
    abandon(what + ": " + describe_address(address) + "; " + where() + " at " + to_string({{"", 0}, from}));
}

std::string after(const Event& other, const char* did) {
    bool is_bulk = other.access == Access::bulk;
    std::string who = is_bulk ? "a bulk copy" : format("thread %d of block %d", other.thread, other.block);
    return " after " + who + " has " + did + " it at " + to_string({{"", 0}, other.from});
}

std::string race(const Event& other, const char* did, Access access, const void* address, const void* from) {
    const char* missing = other.access == Access::bulk ? " without a wait" : " without a barrier";
    return std::string("race: ") + (is_read(access) ? "read" : "written") + missing + after(other, did) + ": " +
            describe_address(address) + "; " + where() + " at " + to_string({{"", 0}, from});
}

// By the copy engine, later.
void begin_bulk(Shadow& shadow, const Event& read, const void* address, const void* from) {
    const Fiber& self = running();
    const char* what = "written by a bulk copy without a fence";
    if (!is_fenced(shadow.written, self)) fail(what + after(shadow.written, "written"), address, from);
    if (!is_fenced(read, self)) fail(what + after(read, "read"), address, from);
    shadow.taken = UNDER_WAY;
}

void touch(Shadow& shadow, Access access, const void* address, const void* from) {
    const Fiber& self = running();
    bool is_of_mbarrier = access == Access::phase || access == Access::signal;
    if (shadow.taken && !is_of_mbarrier) fail(shadow.taken, address, from);
    bool are_atomic = access == Access::atomic && shadow.written.access == Access::atomic;
    if (!is_seen(shadow.written, self) && !are_atomic) {
        std::string message = race(shadow.written, "written", access, address, from);
        if (access != Access::write) abandon(message);
        auto* byte = static_cast<const unsigned char*>(address);
        suspects.push_back({byte, *byte, message});
    }
    Event event = {block_number, int16_t(self.number), access, clocks[self.number][self.number],
                   uint32_t(self.fences.size()), from};
    Event* plain_read = is_shared(address, 1) ? &plain_reads[uintptr_t(address) - uintptr_t(shared_memory)] : nullptr;
    if (shadow.written.block < 0 && (is_read(access) || access == Access::atomic) && plain_read)
        fail("read before it is written", address, from);
    if (access == Access::product && !is_fenced(shadow.written, self))
        fail("read by wgmma without a fence after it was written", address, from);
    if (access == Access::signal && !is_fenced(shadow.written, self))
        fail("bulk copy without a fence after its mbarrier was initialised", address, from);
    if (is_read(access)) {
        // The first reader and the last one stand for all.
        shadow.read[is_seen(shadow.read[0], self) ? 0 : 1] = event;
        if (access == Access::read && plain_read && is_fenced(*plain_read, self)) *plain_read = event;
        return;
    }
    for (const Event& read : shadow.read)
        if (!is_seen(read, self)) abandon(race(read, "read", access, address, from));
    if (access == Access::bulk) return begin_bulk(shadow, *plain_read, address, from);
    shadow = {event, {}, nullptr};
    if (plain_read) *plain_read = {};
}

void take(const void* address, int64_t bytes, const char* why) {
    Shadow* shadow = shadow_of(address, bytes);
    for (int64_t i = 0; i < bytes; ++i) shadow[i].taken = why;
}

}  // namespace

void check_launch() {
    begin_kernel();
    tensors = merged({launch->regions, launch->regions + launch->n_regions});
    statics.clear();
    dl_iterate_phdr(
        [](dl_phdr_info* library, std::size_t, void*) {
            for (int i = 0; i < library->dlpi_phnum; ++i) {
                const auto& segment = library->dlpi_phdr[i];
                uintptr_t begin = library->dlpi_addr + segment.p_vaddr;
                if (segment.p_type == PT_LOAD) statics.push_back({begin, begin + segment.p_memsz});
            }
            return 0;
        },
        nullptr);
}

void end_launch_checks() {
    tensors.clear();
    suspects.clear();
}

void check_block() {
    begin_block();
    shared.assign(std::size_t(launch->shared_bytes), {});
    plain_reads.assign(std::size_t(launch->shared_bytes), {});
    for (int i = 0; i < n_threads; ++i) {
        std::fill(clocks[i], clocks[i] + n_threads + MAX_MBARRIERS, 0);
        clocks[i][i] = 1;
    }
}

void join(const uint32_t* lanes_of_warps) {
    const int n_clocks = n_threads + MAX_MBARRIERS;
    uint32_t latest[MAX_THREADS + MAX_MBARRIERS] = {};
    auto each = [=](auto&& action) {
        for (int w = 0; w < n_warps; ++w)
            for (uint32_t lanes = lanes_of_warps[w]; lanes; lanes &= lanes - 1) action(w * 32 + __builtin_ctz(lanes));
    };
    each([&](int i) {
        for (int j = 0; j < n_clocks; ++j) latest[j] = std::max(latest[j], clocks[i][j]);
    });
    each([&](int i) {
        std::copy(latest, latest + n_clocks, clocks[i]);
        ++clocks[i][i];
    });
}

void begin_copy(const Copy& copy, const void* address) {
    check_access(copy.to, copy.bytes, Access::write, address);
    if (copy.is_valid) check_access(copy.from, copy.bytes, Access::read, address);
    take(copy.to, copy.bytes, "touched while a cp.async to it is under way");
}

void end_copy(const Copy& copy) {
    Shadow* shadow = shadow_of(copy.to, copy.bytes);
    for (int i = 0; i < copy.bytes; ++i) {
        shadow[i].taken = nullptr;
        shadow[i].written.clock = clocks[running().number][running().number];
        shadow[i].written.fences = uint32_t(running().fences.size());
    }
}

void begin_mbarrier(const void* address, const void* from) {
    check_access(address, 8, Access::setup, from);
    take(address, 8, IS_MBARRIER);
}

void end_mbarrier(const void* address, const void* from) {
    take(address, 8, nullptr);
    check_access(address, 8, Access::setup, from);
}

void end_bulk(const void* to, int64_t bytes, int mbarrier, uint32_t phase, const void* from) {
    Event event = {block_number, int16_t(n_threads + mbarrier), Access::bulk, phase, 0, from};
    std::fill_n(shadow_of(to, bytes), bytes, Shadow{event, {}, nullptr});
    std::fill_n(&plain_reads[uintptr_t(to) - uintptr_t(shared_memory)], bytes, Event{});
}

void tell(Clock& seen) {
    uint32_t* own = clocks[running().number];
    seen.resize(std::size_t(n_threads + MAX_MBARRIERS));
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], own[i]);
    ++own[running().number];
}

void see_phase(int mbarrier, uint32_t phase, const Clock& seen) {
    uint32_t* own = clocks[running().number];
    for (std::size_t i = 0; i < seen.size(); ++i) own[i] = std::max(own[i], seen[i]);
    own[n_threads + mbarrier] = phase;
}

void fence_proxy() { running().fences.push_back(clocks[running().number][running().number]); }

std::string settle_suspects() {
    std::string message;
    for (const Suspect& suspect : suspects)
        if (*suspect.address != suspect.value) message = suspect.message;
    suspects.clear();
    return message;
}

void check_access(const void* address, int64_t bytes, Access access, const void* from) {
    if (!launch) return;  // the library is being loaded
    if (!suspects.empty())
        if (std::string message = settle_suspects(); !message.empty()) abandon(message);
    if (is_stack(address)) return;
    if (Shadow* shadow = shadow_of(address, bytes)) {
        if (!is_shared(address, bytes))
            if (const char* wrong = touch_tensor(address, bytes, access)) fail(wrong, address, from);
        for (int64_t i = 0; i < bytes; ++i) touch(shadow[i], access, static_cast<const char*>(address) + i, from);
        return;
    }
    if (!is_static(address)) fail("memory accessed out of bounds", address, from);
}

}  // namespace emulator

// What g++ calls for -fsanitize=thread.
#define ON_ACCESS(BYTES)                                                                                       \
    extern "C" void __tsan_read##BYTES(void* address) {                                                        \
        emulator::check_access(address, BYTES, emulator::Access::read, __builtin_return_address(0));           \
    }                                                                                                          \
    extern "C" void __tsan_write##BYTES(void* address) {                                                       \
        emulator::check_access(address, BYTES, emulator::Access::write, __builtin_return_address(0));          \
    }                                                                                                          \
    extern "C" void __tsan_unaligned_read##BYTES(void* address) {                                              \
        emulator::check_access(address, BYTES, emulator::Access::read, __builtin_return_address(0));           \
    }                                                                                                          \
    extern "C" void __tsan_unaligned_write##BYTES(void* address) {                                             \
        emulator::check_access(address, BYTES, emulator::Access::write, __builtin_return_address(0));          \
    }
ON_ACCESS(1)
ON_ACCESS(2)
ON_ACCESS(4)
ON_ACCESS(8)
ON_ACCESS(16)
extern "C" void __tsan_read_range(void* address, std::size_t bytes) {
    emulator::check_access(address, int64_t(bytes), emulator::Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, std::size_t bytes) {
    emulator::check_access(address, int64_t(bytes), emulator::Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// And for what is undefined: every argument begins with the place.
namespace {

struct Undefined {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment;  // of a pointer's type
};

[[noreturn]] void undefined(const Undefined* data, const std::string& what, const void* from) {
    emulator::abandon(what + "; " + emulator::where() + " at " +
                      emulator::to_string({{data->file, int(data->line)}, from}));
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(Undefined* data, void* address) {
    std::string what = emulator::format("access that is not aligned to %d bytes: ", 1 << data->log_alignment);
    undefined(data, what + emulator::describe_address(address), __builtin_return_address(0));
}
extern "C" void __ubsan_handle_out_of_bounds(Undefined* data, uintptr_t index) {
    undefined(data, emulator::format("index %lld out of an array's bounds", (long long)index),
              __builtin_return_address(0));
}
extern "C" void __ubsan_handle_shift_out_of_bounds(Undefined* data, uintptr_t, uintptr_t by) {
    undefined(data, emulator::format("shift by %lld", (long long)by), __builtin_return_address(0));
}
extern "C" void __ubsan_handle_divrem_overflow(Undefined* data, uintptr_t, uintptr_t) {
    undefined(data, "division of an integer by zero, or overflow", __builtin_return_address(0));
}
#define ON_OVERFLOW(OPERATION)                                                                                 \
    extern "C" void __ubsan_handle_##OPERATION##_overflow(Undefined* data, uintptr_t, uintptr_t) {             \
        undefined(data, "overflow of a signed integer: " #OPERATION, __builtin_return_address(0));             \
    }
ON_OVERFLOW(add)
ON_OVERFLOW(sub)
ON_OVERFLOW(mul)
ON_OVERFLOW(negate)
