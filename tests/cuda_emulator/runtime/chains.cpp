// Kernels of which one may begin before the one it follows has ended. Here they run one after the other; whether they could
// run together is told by what each has read and written in the tensors.
#include <array>
#include <unordered_map>
#include <utility>

#include "runtime.hpp"

namespace emulator {

namespace {

constexpr uintptr_t PAGE = 4096;
constexpr unsigned char READ = 1, WRITTEN = 2;

// What a kernel did to each byte.
class Trace {
    std::unordered_map<uintptr_t, std::array<unsigned char, PAGE>> pages_;

  public:
    void add(uintptr_t address, int64_t bytes, unsigned char bits) {
        for (int64_t i = 0; i < bytes; ++i, ++address) pages_[address / PAGE][address % PAGE] |= bits;
    }

    // To any of them.
    unsigned char bits_of(uintptr_t address, int64_t bytes) const {
        unsigned char bits = 0;
        for (int64_t i = 0; i < bytes; ++i, ++address)
            if (auto page = pages_.find(address / PAGE); page != pages_.end()) bits |= page->second[address % PAGE];
        return bits;
    }
};

// Of the kernels that may still run when blocks of this one begin: the one before, and those that it had not waited for
// when it let this one begin.
std::vector<Trace> others;
Trace own;
bool has_waited;  // any thread
bool block_has_waited, block_has_let;
bool has_always_waited;  // each block, before it let the next kernel begin

}  // namespace

void begin_kernel() {
    if (!launch->follows) others.clear();
    own = {};
    has_waited = false;
    has_always_waited = true;
}

void begin_block() { block_has_waited = block_has_let = false; }

void end_block() {
    if (!block_has_let && !block_has_waited) has_always_waited = false;
}

std::string end_kernel() {
    if (launch->follows && !has_waited) return "no thread waits for the kernel before, which may end later";
    if (has_always_waited) others.clear();
    others.push_back(std::move(own));
    return "";
}

void wait_for_kernel() { running().has_waited = block_has_waited = has_waited = true; }

void let_kernel_begin() {
    if (!block_has_let && !running().has_waited) has_always_waited = false;
    block_has_let = true;
}

const char* touch_tensor(const void* address, int64_t bytes, Access access) {
    auto a = uintptr_t(address);
    if (launch->follows && !running().has_waited)
        for (const Trace& other : others) {
            unsigned char bits = other.bits_of(a, bytes);
            if (bits & WRITTEN && is_read(access)) return "read before the kernel that wrote it is waited for";
            if (bits & WRITTEN) return "written before the kernel that wrote it, too, is waited for";
            if (bits && !is_read(access)) return "written before the kernel that read it is waited for";
        }
    own.add(a, bytes, is_read(access) ? READ : access == Access::atomic ? READ | WRITTEN : WRITTEN);
    return nullptr;
}

}  // namespace emulator
