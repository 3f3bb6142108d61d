// Causal grouped-query attention of few tokens over the paged cache. One task is one key-value head of one request; the
// order of every sum depends on the token's own position only, so company and drafts change no bit.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "products.h"

namespace tandem {

// Numbers that a thread keeps for its next call.
constexpr size_t MAX_KEPT = 1 << 20;

// Sizes of the paged cache of one layer, [2, pages, page_size, kv_heads, dim], and of the queries.
struct AttentionSizes {
    int64_t heads, kv_heads, dim, pages, page_size, table_width;
};

// out [rows, D] += p · v for one position, for the rows that may see it.
template <typename C, typename F>
void add_value(const C* value, const F* probability, int64_t stride, const int64_t* lengths, int64_t position,
               int64_t rows, int64_t dim, F* out) {
    for (int64_t r = 0; r < rows; ++r) {
        if (position >= lengths[r]) continue;
        const F p = probability[r * stride];
        F* target = out + r * dim;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) target[i] += p * widen(value[i]);
    }
}

template <typename F>
void softmax(F* scores, int64_t length) {
    F best = scores[0];
    for (int64_t i = 1; i < length; ++i) best = std::max(best, scores[i]);
    F sum = 0;
    for (int64_t i = 0; i < length; ++i) {
        scores[i] = exponential(scores[i] - best);
        sum += scores[i];
    }
    for (int64_t i = 0; i < length; ++i) scores[i] /= sum;
}

// Tokens first..first+tokens of the queries, those of request b, for one key-value head. q and out [N, heads, dim];
// positions [N]; table [B, table_width].
template <typename C, typename F>
void attend_head(const AttentionSizes& n, const F* q, const C* kv, const int64_t* table, const int64_t* positions,
                 int64_t b, int64_t first, int64_t tokens, int64_t head, F* out) {
    thread_local std::vector<F> scratch;
    const int64_t D = n.dim, group = n.heads / n.kv_heads, rows = tokens * group, token = n.kv_heads * D;
    const C* keys = kv + head * D;
    const C* values = keys + n.pages * n.page_size * token;
    const auto place = [&](int64_t r) { return ((first + r / group) * n.heads + head * group + r % group) * D; };
    std::vector<int64_t> lengths(rows);
    int64_t longest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        lengths[r] = positions[first + r / group] + 1;
        longest = std::max(longest, lengths[r]);
    }
    scratch.assign(2 * rows * D + rows * longest, F(0));
    F *packed = scratch.data(), *sums = packed + rows * D, *scores = sums + rows * D;
    const F scale = F(1) / std::sqrt(F(D));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < D; ++i) packed[r * D + i] = q[place(r) + i] * scale;
    for (int64_t start = 0; start < longest; start += n.page_size) {
        const int64_t count = std::min(n.page_size, longest - start);
        const C* page = keys + table[b * n.table_width + start / n.page_size] * n.page_size * token;
        int64_t j = 0;
        for (; j + 4 <= count; j += 4) multiply_rows<4>(packed, page + j * token, scores + start + j, rows, D, token, longest);
        for (; j < count; ++j) multiply_rows<1>(packed, page + j * token, scores + start + j, rows, D, token, longest);
    }
    for (int64_t r = 0; r < rows; ++r) softmax(scores + r * longest, lengths[r]);
    for (int64_t j = 0; j < longest; ++j) {
        const C* page = values + table[b * n.table_width + j / n.page_size] * n.page_size * token;
        add_value(page + j % n.page_size * token, scores + j, longest, lengths.data(), j, rows, D, sums);
    }
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * D, D, out + place(r));
    if (scratch.size() > MAX_KEPT) std::vector<F>().swap(scratch);
}

}  // namespace tandem
