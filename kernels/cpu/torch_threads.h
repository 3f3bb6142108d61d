// Loops on the threads that torch's own operations run on. In a training step the two take turns, and torch's threads
// keep their cores for a while after each of its operations: threads of our own would have to share these.

#pragma once

#include <atomic>
#include <cstdint>

#include "team.h"

// Of the OpenMP library that torch has brought along; absent with a torch built otherwise.
extern "C" void GOMP_parallel(void (*body)(void*), void* context, unsigned num_threads, unsigned flags)
    __attribute__((weak));

namespace tandem {

// body(i) for i = 0 .. count - 1, in any order and by any thread.
template <typename Body>
void share(int64_t count, int num_threads, const Body& body) {
    if (GOMP_parallel == nullptr || num_threads < 2 || count < 2) {
        Team(count < 2 ? 1 : num_threads).each(count, body);
        return;
    }
    struct Loop {
        const Body& body;
        int64_t count;
        std::atomic<int64_t> next;
    } loop{body, count, {0}};
    const auto run = [](void* context) {
        Loop& shared = *static_cast<Loop*>(context);
        for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.body(i);
    };
    GOMP_parallel(run, &loop, unsigned(num_threads), 0);
}

}  // namespace tandem
