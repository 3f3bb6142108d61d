#include <algorithm>
#include <cstdint>
#include <limits>

#include "team.h"

// A product and a sum stay two roundings, as in torch: these are the law's own numbers. GCC knows the first, clang the
// second (with -ffp-contract=fast-honor-pragmas).
#pragma GCC optimize("fp-contract=off")
#pragma STDC FP_CONTRACT OFF

namespace {

template <typename F>
struct Penalties {
    F repetition, frequency, presence;

    bool are_neutral() const { return repetition == 1 && frequency == 0 && presence == 0; }

    F apply(F x, int32_t count, uint8_t in_prompt) const {
        const F scale = (count > 0) | (in_prompt != 0) ? repetition : F(1);
        const F scaled = x > 0 ? x / scale : x * scale;
        return scaled - frequency * F(count) - (count > 0 ? presence : F(0));
    }
};

template <typename F>
void penalise(const F* logits, F* out, const int64_t* rows, const float* penalties, int64_t stride,
              const int32_t* output_counts, const uint8_t* in_prompt, const int64_t* window, int64_t num_rows,
              int64_t vocab, int num_threads) {
    const tandem::Team team(num_threads);
    team.each(num_rows, [&](int64_t n) {
        const F* x = logits + n * vocab;
        F* y = out + n * vocab;
        const float* own = penalties + rows[n] * stride;
        const Penalties<F> law{own[0], own[1], own[2]};
        if (law.are_neutral()) {
            std::copy_n(x, vocab, y);
            return;
        }
        const int32_t* counts = output_counts + rows[n] * vocab;
        const uint8_t* known = in_prompt + rows[n] * vocab;
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i) y[i] = law.apply(x[i], counts[i], known[i]);
        if (window == nullptr) return;
        int64_t first = n;
        while (first > 0 && rows[first - 1] == rows[n]) --first;
        const int64_t *begin = window + first + 1, *end = window + n + 1;
        for (const int64_t* draft = begin; draft < end; ++draft) {
            const int32_t count = counts[*draft] + int32_t(std::count(begin, end, *draft));
            y[*draft] = law.apply(x[*draft], count, known[*draft]);
        }
    });
}

template <typename F>
void mask(const F* logits, F* out, const uint32_t* packed, int64_t num_rows, int64_t vocab, int num_threads) {
    constexpr int64_t BITS = 32;
    const int64_t num_words = (vocab + BITS - 1) / BITS;
    const tandem::Team team(num_threads);
    team.each(num_rows, [&](int64_t n) {
        for (int64_t w = 0; w < num_words; ++w) {
            const F* x = logits + n * vocab + w * BITS;
            F* y = out + n * vocab + w * BITS;
            const uint32_t word = packed[n * num_words + w];
            const int64_t count = std::min(BITS, vocab - w * BITS);
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) y[i] = word >> i & 1 ? x[i] : -std::numeric_limits<F>::infinity();
        }
    });
}

}  // namespace

// logits, out [num_rows, vocab]; packed [num_rows, ceil(vocab / 32)].
extern "C" void mask_float32(const float* logits, float* out, const uint32_t* packed, int64_t num_rows, int64_t vocab,
                             int num_threads) {
    mask(logits, out, packed, num_rows, vocab, num_threads);
}

extern "C" void mask_float64(const double* logits, double* out, const uint32_t* packed, int64_t num_rows,
                             int64_t vocab, int num_threads) {
    mask(logits, out, packed, num_rows, vocab, num_threads);
}

// logits, out [num_rows, vocab]; rows [num_rows]: each one's row of penalties [*, 3], `stride` apart, of output_counts
// and of in_prompt [*, vocab]. window [num_rows], or null: a row counts those behind the first of its run of equal rows,
// up to its own, too.
extern "C" void penalise_float32(const float* logits, float* out, const int64_t* rows, const float* penalties,
                                 int64_t stride, const int32_t* output_counts, const uint8_t* in_prompt,
                                 const int64_t* window, int64_t num_rows, int64_t vocab, int num_threads) {
    penalise(logits, out, rows, penalties, stride, output_counts, in_prompt, window, num_rows, vocab, num_threads);
}

extern "C" void penalise_float64(const double* logits, double* out, const int64_t* rows, const float* penalties,
                                 int64_t stride, const int32_t* output_counts, const uint8_t* in_prompt,
                                 const int64_t* window, int64_t num_rows, int64_t vocab, int num_threads) {
    penalise(logits, out, rows, penalties, stride, output_counts, in_prompt, window, num_rows, vocab, num_threads);
}

// Of token_ids [count, width] the first accept_lens[i] of request i count in row rows[i] of output_counts [*, vocab].
extern "C" void count_outputs_int32(int32_t* output_counts, const int64_t* rows, const int64_t* token_ids,
                                    const int64_t* accept_lens, int64_t count, int64_t width, int64_t vocab) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t t = 0; t < accept_lens[i]; ++t) ++output_counts[rows[i] * vocab + token_ids[i * width + t]];
}
