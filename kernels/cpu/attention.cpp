#include "attention.h"

namespace {

using namespace tandem;

template <typename C, typename F>
void attend(const AttentionSizes& n, int64_t requests, int64_t tokens, const F* q, const C* kv, const int64_t* table,
            const int64_t* positions, F* out, int num_threads) {
    Team(num_threads).each(requests * n.kv_heads, [&](int64_t task) {
        const int64_t b = task / n.kv_heads, head = task % n.kv_heads;
        attend_head(n, q, kv, table, positions, b, b * tokens, tokens, head, out);
    });
}

}  // namespace

// q, out [B · T, HQ, D]; kv [2, pages, page_size, HKV, D]; table [B, table_width]; positions [B · T].
extern "C" void attention_bfloat16(const AttentionSizes* n, int64_t requests, int64_t tokens, const float* q,
                                   const bf16* kv, const int64_t* table, const int64_t* positions, float* out,
                                   int num_threads) {
    attend(*n, requests, tokens, q, kv, table, positions, out, num_threads);
}

extern "C" void attention_float32(const AttentionSizes* n, int64_t requests, int64_t tokens, const float* q,
                                  const float* kv, const int64_t* table, const int64_t* positions, float* out,
                                  int num_threads) {
    attend(*n, requests, tokens, q, kv, table, positions, out, num_threads);
}

extern "C" void attention_float64(const AttentionSizes* n, int64_t requests, int64_t tokens, const double* q,
                                  const double* kv, const int64_t* table, const int64_t* positions, double* out,
                                  int num_threads) {
    attend(*n, requests, tokens, q, kv, table, positions, out, num_threads);
}
