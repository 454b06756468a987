// Bulk copies and the mbarriers that tell of them. The bytes of a phase land when a thread waits for it and all of them
// have been asked for, and not earlier.
#include "runtime.hpp"

#include <algorithm>

namespace emulator {

namespace {

constexpr int64_t ROW = 128, SWIZZLE_REPEATS = 1024;
constexpr int MAX_COUNT = (1 << 20) - 1;  // of a phase: bytes, and arrivals
// As __init__.py packs a map: the address, five sizes, four strides, five sizes of the box, and this.
constexpr int SIZES = 1, STRIDES = 6, BOX = 10, MARK = 15;
constexpr unsigned long long IS_MAP = 0x70616d5f64746d65;

struct Run {
    unsigned char* to;
    const unsigned char* from;
    int64_t bytes;
};

struct BulkCopy {
    unsigned char* to;
    int64_t bytes;
    bool is_swizzled;
    std::vector<Run> runs;  // before the swizzle; all else becomes zero
    Place place;
};

struct Mbarrier {
    const void* address;  // null: free
    unsigned phase;
    uint32_t ended;  // phases of all mbarriers that were here
    int arrivals, arrived;  // of a phase, and those that have been
    int64_t announced, asked;  // bytes
    std::vector<BulkCopy> copies;
    std::vector<int> waiting;
    Place place;  // of the last arrival
    Clock seen, seen_by_phases;  // by those that have arrived, and by those of the phases that have ended
};
Mbarrier mbarriers[MAX_MBARRIERS];

std::string describe(const Mbarrier& mbarrier) {
    return format("the mbarrier at byte %lld of shared memory, phase %u",
                  (long long)(static_cast<const unsigned char*>(mbarrier.address) - shared_memory), mbarrier.phase);
}

Mbarrier* find(const void* address) {
    auto* found = std::find_if(mbarriers, std::end(mbarriers), [=](auto& other) { return other.address == address; });
    return found == std::end(mbarriers) ? nullptr : found;
}

void check_place(const void* address, const char* name, Place place) {
    if (!is_shared(address, 8)) fail(name + (" out of bounds: " + describe_address(address)), place);
    if (uintptr_t(address) % 8) fail(name + (" at " + describe_address(address)) + ": expected a multiple of 8", place);
}

Mbarrier& mbarrier_at(const void* address, const char* name, Access access, Place place) {
    check_place(address, name, place);
    Mbarrier* mbarrier = find(address);
    if (!mbarrier) fail(name + (" of an mbarrier that is not initialised: " + describe_address(address)), place);
    if (launch->is_checked) check_access(address, 8, access, place.address);
    return *mbarrier;
}

bool have_arrived(const Mbarrier& mbarrier) { return mbarrier.arrived == mbarrier.arrivals; }

bool is_complete(const Mbarrier& mbarrier) { return have_arrived(mbarrier) && mbarrier.asked == mbarrier.announced; }

void land(const BulkCopy& copy) {
    std::memset(copy.to, 0, std::size_t(copy.bytes));
    for (const Run& run : copy.runs)
        for (int64_t i = 0; i < run.bytes; i += 16) {
            int64_t offset = run.to + i - shared_memory;
            if (copy.is_swizzled) offset ^= offset >> 3 & 0x70;
            std::memcpy(shared_memory + offset, run.from + i, std::size_t(std::min<int64_t>(16, run.bytes - i)));
        }
}

void end_phase(Mbarrier& mbarrier) {
    ++mbarrier.phase;
    ++mbarrier.ended;
    for (const BulkCopy& copy : mbarrier.copies) {
        land(copy);
        if (launch->is_checked)
            end_bulk(copy.to, copy.bytes, int(&mbarrier - mbarriers), mbarrier.ended, copy.place.address);
    }
    mbarrier.copies.clear();
    mbarrier.seen_by_phases = mbarrier.seen;
    mbarrier.arrived = 0;
    mbarrier.announced = mbarrier.asked = 0;
}

// After an arrival or a copy.
void count(Mbarrier& mbarrier, Place place) {
    if (have_arrived(mbarrier) && mbarrier.asked > mbarrier.announced)
        fail(format("bulk copies of %lld bytes, of which %lld are announced: ", (long long)mbarrier.asked,
                    (long long)mbarrier.announced) + describe(mbarrier),
             place);
    if (!is_complete(mbarrier)) return;
    if (mbarrier.copies.empty()) end_phase(mbarrier);
    for (int thread : mbarrier.waiting) wake(fibers[thread]);
    mbarrier.waiting.clear();
}

void ask(const BulkCopy& copy, int64_t alignment, const void* mbarrier_address) {
    Mbarrier& mbarrier = mbarrier_at(mbarrier_address, "bulk copy", Access::signal, copy.place);
    std::string what = format("bulk copy of %lld bytes ", (long long)copy.bytes);
    if (!is_shared(copy.to, copy.bytes))
        fail(what + "to memory out of bounds: " + describe_address(copy.to), copy.place);
    if ((copy.to - shared_memory) % alignment)
        fail(what + "to " + describe_address(copy.to) + format(": expected a multiple of %d", int(alignment)),
             copy.place);
    for (const Run& run : copy.runs) {
        if (launch->n_regions && !is_in_tensors(run.from, run.bytes))
            fail(what + "from memory out of bounds: " + describe_address(run.from), copy.place);
        if (launch->is_checked) check_access(run.from, run.bytes, Access::read, copy.place.address);
    }
    if (launch->is_checked) check_access(copy.to, copy.bytes, Access::bulk, copy.place.address);
    std::memset(copy.to, POISON, std::size_t(copy.bytes));
    mbarrier.copies.push_back(copy);
    mbarrier.asked += copy.bytes;
    count(mbarrier, copy.place);
}

}  // namespace

void start_mbarriers() {
    for (Mbarrier& mbarrier : mbarriers) mbarrier = {};
}

std::string copy_under_way() {
    for (const Mbarrier& mbarrier : mbarriers)
        if (!mbarrier.copies.empty())
            return "a bulk copy is under way at the end of the block: " + describe(mbarrier) + "; " + where() + " at " +
                   to_string(mbarrier.copies[0].place);
    return "";
}

std::string mbarriers_waited_for() {
    std::string text;
    for (const Mbarrier& mbarrier : mbarriers) {
        if (mbarrier.waiting.empty()) continue;
        text += "mbarrier_wait that nothing ends: " + describe(mbarrier);
        text += have_arrived(mbarrier)
                        ? format(", has %lld of the %lld bytes announced at ", (long long)mbarrier.asked,
                                 (long long)mbarrier.announced) + to_string(mbarrier.place)
                        : format(", has %d of %d arrivals", mbarrier.arrived, mbarrier.arrivals);
        text += "; ";
    }
    return text;
}

void init_mbarrier(const void* address, int arrivals, Site site) {
    Place place = {site, __builtin_return_address(0)};
    check_place(address, "mbarrier_init", place);
    if (arrivals < 1 || arrivals > MAX_COUNT)
        fail(format("mbarrier_init for %d arrivals: expected 1 to %d", arrivals, MAX_COUNT), place);
    if (Mbarrier* other = find(address)) fail("mbarrier_init of one that is initialised: " + describe(*other), place);
    Mbarrier* free = find(nullptr);
    if (!free) fail(format("mbarrier_init of more than %d", MAX_MBARRIERS), place);
    if (launch->is_checked) begin_mbarrier(address, place.address);
    std::memset(const_cast<void*>(address), POISON, 8);
    free->address = address;
    free->phase = 0;
    free->arrivals = arrivals;
    free->seen.clear();
}

void invalidate_mbarrier(const void* address, Site site) {
    Place place = {site, __builtin_return_address(0)};
    Mbarrier& mbarrier = mbarrier_at(address, "mbarrier_invalidate", Access::phase, place);
    const char* use = !mbarrier.copies.empty() ? "a bulk copy is under way" : "threads wait";
    if (!mbarrier.copies.empty() || !mbarrier.waiting.empty())
        fail(format("mbarrier_invalidate while %s: ", use) + describe(mbarrier), place);
    if (launch->is_checked) end_mbarrier(address, place.address);
    mbarrier.address = nullptr;
    mbarrier.arrived = 0;
}

void arrive_at_mbarrier(const void* address, int bytes, Site site) {
    Place place = {site, __builtin_return_address(0)};
    Mbarrier& mbarrier = mbarrier_at(address, "mbarrier_arrive", Access::phase, place);
    if (have_arrived(mbarrier))
        fail(format("more arrivals in a phase than %d: ", mbarrier.arrivals) + describe(mbarrier), place);
    if (bytes < 0 || bytes > MAX_COUNT)
        fail(format("mbarrier_arrive of %d bytes: expected 0 to %d", bytes, MAX_COUNT), place);
    ++mbarrier.arrived;
    mbarrier.announced += bytes;
    mbarrier.place = place;
    if (launch->is_checked) tell(mbarrier.seen);
    count(mbarrier, place);
}

void wait_for_mbarrier(const void* address, unsigned parity, Site site) {
    Fiber& self = running();
    self.waits_in = "mbarrier_wait";
    self.place = {site, __builtin_return_address(0)};
    if (parity > 1) fail(format("mbarrier_wait for parity %u: expected 0 or 1", parity), self.place);
    if (launch->is_shuffled) shuffle_warps(self);
    Mbarrier& mbarrier = mbarrier_at(address, "mbarrier_wait", Access::phase, self.place);
    // A thread that is late finds the phase after the one it means, and waits for the next of its parity.
    while (mbarrier.phase % 2 == parity) {
        if (is_complete(mbarrier)) {
            end_phase(mbarrier);
        } else {
            mbarrier.waiting.push_back(self.number);
            wait(self, State::waiting);
        }
    }
    if (launch->is_checked) see_phase(int(&mbarrier - mbarriers), mbarrier.ended, mbarrier.seen_by_phases);
}

void copy_bulk(void* to, const void* from, int bytes, const void* mbarrier, Site site) {
    Place place = {site, __builtin_return_address(0)};
    if (bytes <= 0 || bytes % 16) fail(format("bulk copy of %d bytes: expected a multiple of 16", bytes), place);
    if (uintptr_t(from) % 16) fail(format("bulk copy from %p: expected a multiple of 16", from), place);
    auto* begin = static_cast<unsigned char*>(to);
    ask({begin, bytes, false, {{begin, static_cast<const unsigned char*>(from), bytes}}, place}, 16, mbarrier);
}

void copy_box(void* to, const TensorMap& map, int i_group, int i_head, const void* mbarrier, Site site) {
    Place place = {site, __builtin_return_address(0)};
    if (map.words[MARK] != IS_MAP) fail("bulk copy by a map that tensor_map has not made", place);
    auto word = [&](int i) { return int64_t(map.words[i]); };
    if (word(BOX) * 2 != ROW) fail(format("bulk copy of rows of %d bytes: expected 128", int(word(BOX) * 2)), place);
    const int64_t n_rows = word(BOX + 1) * word(BOX + 2) * word(BOX + 3) * word(BOX + 4);
    BulkCopy copy = {static_cast<unsigned char*>(to), n_rows * ROW, true, {}, place};
    const int64_t first[] = {0, 0, 0, i_group, i_head};
    for (int64_t i = 0; i < n_rows; ++i) {
        auto from = uintptr_t(map.words[0]);
        bool is_inside = true;
        int64_t rest = i;
        for (int d = 1; d < 5; ++d) {
            int64_t at = first[d] + rest % word(BOX + d);
            rest /= word(BOX + d);
            is_inside = is_inside && at >= 0 && at < word(SIZES + d);
            from += uintptr_t(at * word(STRIDES + d - 1));
        }
        int64_t bytes = std::min(ROW, 2 * word(SIZES));
        if (is_inside) copy.runs.push_back({copy.to + i * ROW, reinterpret_cast<const unsigned char*>(from), bytes});
    }
    ask(copy, SWIZZLE_REPEATS, mbarrier);
}

}  // namespace emulator
