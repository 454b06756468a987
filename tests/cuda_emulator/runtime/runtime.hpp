// What the parts of the runtime know of one another: the grid that runs, its threads, and how a run ends with an error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ptx.cuh"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {

constexpr int MAX_COLUMNS = 128;  // of a step of wgmma
constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
constexpr int MAX_MBARRIERS = 16;  // initialised at the same time
constexpr int64_t MAX_SHARED = 1 << 20;
constexpr unsigned char POISON = 0xff;  // every float, half and bf16 made of it is NaN, every int -1

struct Region {
    uintptr_t begin, end;
};

// As __init__.py lays it out.
struct Launch {
    const Kernel* kernel;
    uint32_t grid[3], block[3];
    int64_t shared_bytes;
    void* const* arguments;
    uint64_t seed;
    int is_shuffled, is_checked, follows;
    const Region* regions;  // of the tensors
    int n_regions;
    char* error;
    int error_bytes;
};

// Where in the kernel a thread is: the file and line of the call, and its address for what was inlined around it.
struct Place {
    Site site;
    const void* address;
};
std::string to_string(Place place);

struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
    bool is_valid;
    int group;
};

struct StepUnderWay : Step {
    float before[MAX_COLUMNS / 2];
    bool is_first;  // of those under way that change these sums
    int group;

    std::size_t bytes() const { return std::size_t(columns) / 2 * sizeof(float); }  // of a thread's sums
};

// Of each thread, and of each mbarrier, how much has been seen; empty: nothing.
using Clock = std::vector<uint32_t>;

enum class State { running, waiting, ended };

struct Fiber : Thread {
    int warp, number;
    State state;
    const char* waits_in;
    Place place;
    std::vector<Copy> copies;
    int groups;  // committed
    std::vector<StepUnderWay> steps;
    int step_groups;
    // The thread's clock at each fence of the proxies.
    std::vector<uint32_t> fences;
    bool has_waited;  // for the kernel before
};

extern const Launch* launch;
extern int n_threads, n_warps;
extern int32_t block_number;
extern Fiber fibers[MAX_THREADS];

inline Fiber& running() { return *static_cast<Fiber*>(current); }

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
// "thread (3, 0, 0) of block (1, 0, 0)"
std::string where();
// "byte 70 of shared memory, which has 64"
std::string describe_address(const void* address);
bool is_shared(const void* address, int64_t bytes);
bool is_in_tensors(const void* address, int64_t bytes);
// Not the kernel's memory, but its threads' stacks.
bool is_stack(const void* address);
// Ends the launch with this message.
[[noreturn]] void abandon(const std::string& message);
[[noreturn]] void fail(const std::string& message, Place place);

// Lets other threads run until one wakes this one.
void wait(Fiber& self, State state);
void wake(const Fiber& fiber);
// Lets another warp go on first, if the order is drawn.
void shuffle_warps(const Fiber& self);

// warpgroups.cpp
void start_warpgroups();

// copies.cpp
void start_mbarriers();
// A copy that nobody has waited for, or nothing.
std::string copy_under_way();
// Those that threads wait for, or nothing.
std::string mbarriers_waited_for();

// checks.cpp: which thread has seen whose accesses.
void check_launch();
void end_launch_checks();
void check_block();
// A race that the last stores have turned out to be, or nothing.
std::string settle_suspects();
void join(const uint32_t* lanes_of_warps);
void begin_copy(const Copy& copy, const void* address);
void end_copy(const Copy& copy);
// A product reads and a bulk copy writes by another proxy than the threads. Of an mbarrier: setup begins and ends its
// use, a phase is what threads do to it, a signal what a bulk copy does.
enum class Access : unsigned char { read, write, atomic, product, bulk, setup, phase, signal };
inline bool is_read(Access access) {
    return access == Access::read || access == Access::product || access == Access::phase || access == Access::signal;
}
void check_access(const void* address, int64_t bytes, Access access, const void* from);
void begin_mbarrier(const void* address, const void* from);
void end_mbarrier(const void* address, const void* from);
// A copy has landed, with this phase of its mbarrier.
void end_bulk(const void* to, int64_t bytes, int mbarrier, uint32_t phase, const void* from);
// Adds what the running thread has seen, and done, up to now.
void tell(Clock& seen);
// The running thread has seen the phase, and what those had seen that arrived.
void see_phase(int mbarrier, uint32_t phase, const Clock& seen);

// chains.cpp: what kernels that may run together do to the tensors.
void begin_kernel();
void begin_block();
void end_block();
// What is wrong with the kernel as a whole, or nothing.
std::string end_kernel();
// What is wrong with an access, or null.
const char* touch_tensor(const void* address, int64_t bytes, Access access);

}  // namespace emulator
