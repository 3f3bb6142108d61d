// A loop shared by several threads, made for machines whose cores have other work too: threads take pieces as they come,
// so one that gets no core holds nobody up, and between loops of different calls they sleep. Results never depend on who
// computes a piece.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// The threads of this process. One call at a time has them; others work alone meanwhile.
class Crew {
   public:
    static Crew& get() {
        static Crew* crew = new Crew;  // never destroyed: its threads may outlive main
        return *crew;
    }

    bool enter(int num_threads) {
        if (num_threads < 2 || !owner_.try_lock()) return false;
        std::lock_guard<std::mutex> lock(sleep_);
        try {
            for (; num_helpers_ < num_threads - 1; ++num_helpers_)
                std::thread([this, index = num_helpers_] { help(index); }).detach();
        } catch (const std::system_error&) {  // the system has no more of them: those there are do the work
        }
        wanted_.store(std::min(num_threads - 1, num_helpers_));
        wake_.notify_all();
        return true;
    }

    void leave() {
        wanted_.store(0);
        owner_.unlock();
    }

    // body(context, piece) for piece = 0 .. pieces - 1. Only the thread that has entered may call it.
    void share(int64_t pieces, void (*body)(void*, int64_t), void* context) {
        body_ = body;
        context_ = context;
        pending_.store(pieces, std::memory_order_relaxed);
        claims_.store(uint64_t(pieces) << 32, std::memory_order_release);
        while (take_piece()) {
        }
        for (int spins = 0; pending_.load(std::memory_order_acquire) > 0; ++spins) pause(spins);
    }

   private:
    static void pause(int spins) {
        if (spins < 256)
            relax();
        else
            std::this_thread::yield();
    }

    // Pieces in the upper half of a claim, the next one in the lower: whoever holds a valid claim holds up the loop it
    // belongs to until the piece is done, so what the claim refers to cannot change meanwhile.
    static bool is_valid(uint64_t claim) { return uint32_t(claim) < claim >> 32; }

    bool take_piece() {
        if (!is_valid(claims_.load(std::memory_order_acquire))) return false;
        const uint64_t claim = claims_.fetch_add(1, std::memory_order_acq_rel);
        if (!is_valid(claim)) return false;
        body_(context_, uint32_t(claim));
        pending_.fetch_sub(1, std::memory_order_release);
        return true;
    }

    void help(int index) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return wanted_.load() > index; });
            }
            for (int spins = 0; wanted_.load(std::memory_order_relaxed) > index; ++spins) {
                if (take_piece())
                    spins = 0;
                else
                    pause(spins);
            }
        }
    }

    std::mutex owner_, sleep_;
    std::condition_variable wake_;
    int num_helpers_ = 0;
    std::atomic<int> wanted_{0};
    std::atomic<uint64_t> claims_{0};
    std::atomic<int64_t> pending_{0};
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
};

// Threads for the time of one call; loops of one that got none run in the caller.
class Team {
   public:
    explicit Team(int num_threads) : num_threads_(num_threads), has_crew_(Crew::get().enter(num_threads)) {}
    ~Team() {
        if (has_crew_) Crew::get().leave();
    }
    Team(const Team&) = delete;

    // body(i) for i = 0 .. count - 1, in any order and by any thread.
    template <typename Body>
    void each(int64_t count, const Body& body) const {
        const int64_t grain = has_crew_ ? std::max<int64_t>(1, count / (PIECES_PER_THREAD * num_threads_)) : count;
        if (grain >= count) {
            for (int64_t i = 0; i < count; ++i) body(i);
            return;
        }
        const auto piece = [&](int64_t index) {
            const int64_t end = std::min(count, (index + 1) * grain);
            for (int64_t i = index * grain; i < end; ++i) body(i);
        };
        using Piece = decltype(piece);
        Crew::get().share((count + grain - 1) / grain, [](void* p, int64_t i) { (*static_cast<Piece*>(p))(i); },
                          const_cast<void*>(static_cast<const void*>(&piece)));
    }

   private:
    static constexpr int64_t PIECES_PER_THREAD = 32;
    int num_threads_;
    bool has_crew_;
};

}  // namespace tandem
