#include "random.h"
#include "team.h"

namespace {

template <typename F>
void draw(const F* logits, const F* temperatures, const int64_t* seeds, const int64_t* positions, int64_t* token_ids,
          int64_t rows, int64_t vocab, int num_threads) {
    const tandem::Team team(num_threads);
    team.each(rows, [&](int64_t r) {
        tandem::Draw<F> draw{temperatures[r], tandem::row_key(seeds[r], positions[r])};
        draw.take(logits + r * vocab, vocab, 0);
        token_ids[r] = draw.token_id;
    });
}

}  // namespace

// logits [rows, vocab]; temperatures, seeds, positions, token_ids [rows].
extern "C" void draw_float32(const float* logits, const float* temperatures, const int64_t* seeds,
                             const int64_t* positions, int64_t* token_ids, int64_t rows, int64_t vocab,
                             int num_threads) {
    draw(logits, temperatures, seeds, positions, token_ids, rows, vocab, num_threads);
}

extern "C" void draw_float64(const double* logits, const double* temperatures, const int64_t* seeds,
                             const int64_t* positions, int64_t* token_ids, int64_t rows, int64_t vocab,
                             int num_threads) {
    draw(logits, temperatures, seeds, positions, token_ids, rows, vocab, num_threads);
}
