#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "elementwise.h"
#include "team.h"

namespace {

// The `most` largest values and their ids, the largest first, of equal ones the lowest id.
template <typename F>
struct Best {
    int64_t* ids;
    F* values;
    int64_t most, size = 0;

    bool takes(F x) const { return size < most || (most > 0 && x > values[most - 1]); }

    // In the order of ids.
    void push(F x, int64_t id) {
        int64_t place = size < most ? size++ : most - 1;
        for (; place > 0 && values[place - 1] < x; --place) {
            values[place] = values[place - 1];
            ids[place] = ids[place - 1];
        }
        values[place] = x;
        ids[place] = id;
    }
};

template <typename F>
F largest(const F* x, int64_t size) {
    F highest = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < size; ++i) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

template <typename F>
void score(const F* x, int64_t vocab, int64_t token_id, Best<F> best, F* logprob, int64_t* rank) {
    constexpr int64_t BLOCK = 256, PART = 16;
    const F highest = largest(x, vocab), chosen = x[token_id];
    double total = 0;
    int64_t num_above = 0;
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        const int64_t count = std::min(BLOCK, vocab - start);
        const F* values = x + start;
        F sum = 0;
        int32_t above = 0;
#pragma omp simd reduction(+ : sum, above)
        for (int64_t i = 0; i < count; ++i) {
            sum += tandem::exponential(values[i] - highest);
            above += values[i] > chosen;
        }
        total += sum;
        num_above += above;
        if (!best.takes(largest(values, count))) continue;
        for (int64_t first = 0; first < count; first += PART) {
            const int64_t end = std::min(count, first + PART);
            if (!best.takes(largest(values + first, end - first))) continue;
            for (int64_t i = first; i < end; ++i)
                if (best.takes(values[i])) best.push(values[i], start + i);
        }
    }
    const F log_total = F(std::log(total));
    *logprob = chosen - highest - log_total;
    *rank = 1 + num_above;
    for (int64_t i = 0; i < best.size; ++i) best.values[i] = best.values[i] - highest - log_total;
}

template <typename F>
void score_rows(const F* logits, const int64_t* places, const int64_t* token_ids, F* logprobs, int64_t* top_ids,
                F* top_values, int64_t* ranks, int64_t rows, int64_t vocab, int64_t num_top, int num_threads) {
    const tandem::Team team(num_threads);
    team.each(rows, [&](int64_t n) {
        const Best<F> best{top_ids + n * num_top, top_values + n * num_top, num_top};
        const int64_t place = places == nullptr ? n : places[n];
        score(logits + place * vocab, vocab, token_ids[place], best, logprobs + n, ranks + n);
    });
}

}  // namespace

// logits [*, vocab]; token_ids [*]; places [rows] of both, or null for the first ones; logprobs, ranks [rows]; top_ids,
// top_values [rows, num_top].
extern "C" void logprobs_float32(const float* logits, const int64_t* places, const int64_t* token_ids, float* logprobs,
                                 int64_t* top_ids, float* top_values, int64_t* ranks, int64_t rows, int64_t vocab,
                                 int64_t num_top, int num_threads) {
    score_rows(logits, places, token_ids, logprobs, top_ids, top_values, ranks, rows, vocab, num_top, num_threads);
}

extern "C" void logprobs_float64(const double* logits, const int64_t* places, const int64_t* token_ids,
                                 double* logprobs, int64_t* top_ids, double* top_values, int64_t* ranks, int64_t rows,
                                 int64_t vocab, int64_t num_top, int num_threads) {
    score_rows(logits, places, token_ids, logprobs, top_ids, top_values, ranks, rows, vocab, num_top, num_threads);
}
