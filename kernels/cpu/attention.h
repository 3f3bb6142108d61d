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

// COUNT vectors of each row of out [ROWS, dim] += p · v for `count` positions, whose values lie `token` apart and whose
// probabilities [ROWS, stride].
template <int ROWS, int COUNT, typename C, typename F>
void add_vectors(const C* value, int64_t token, int64_t count, const F* p, int64_t stride, int64_t dim, F* out) {
    using V = typename Vector<F>::type;
    constexpr int64_t L = Vector<F>::lanes;
    V sums[ROWS][COUNT];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) sums[r][c] = load(out + r * dim + c * L);
    for (int64_t j = 0; j < count; ++j) {
        V v[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) v[c] = load(value + j * token + c * L);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; ++c) sums[r][c] += p[r * stride + j] * v[c];
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) std::memcpy(out + r * dim + c * L, &sums[r][c], sizeof(V));
}

// The same for whole rows: a column is summed position after position, whatever the other rows are.
template <int ROWS, typename C, typename F>
void add_values(const C* value, int64_t token, int64_t count, const F* p, int64_t stride, int64_t dim, F* out) {
    constexpr int64_t L = Vector<F>::lanes;
    int64_t i = 0;
    for (; i + 4 * L <= dim; i += 4 * L) add_vectors<ROWS, 4>(value + i, token, count, p, stride, dim, out + i);
    for (; i + L <= dim; i += L) add_vectors<ROWS, 1>(value + i, token, count, p, stride, dim, out + i);
    for (int r = 0; r < ROWS; ++r)
        for (int64_t j = 0; j < count; ++j)
            for (int64_t k = i; k < dim; ++k) out[r * dim + k] += p[r * stride + j] * widen(value[j * token + k]);
}

template <typename F>
void softmax(F* scores, int64_t length) {
    constexpr int64_t L = Vector<F>::lanes;
    F best = scores[0], sum = 0;
#pragma omp simd reduction(max : best)
    for (int64_t i = 1; i < length; ++i) best = std::max(best, scores[i]);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) scores[i] = exponential(scores[i] - best);
    typename Vector<F>::type sums = {};
    int64_t i = 0;
    for (; i + L <= length; i += L) sums += load(scores + i);
    for (int64_t lane = 0; lane < L; ++lane) sum += sums[lane];
    for (; i < length; ++i) sum += scores[i];
#pragma omp simd
    for (int64_t k = 0; k < length; ++k) scores[k] /= sum;
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
    const auto page_at = [&](const C* base, int64_t start) {
        return base + table[b * n.table_width + start / n.page_size] * n.page_size * token;
    };
    for (int64_t start = 0; start < longest; start += n.page_size) {
        const int64_t count = std::min(n.page_size, longest - start);
        const C* page = page_at(keys, start);
        for (int64_t r = 0; r < rows; r += 4) {
            const int64_t few = std::min<int64_t>(4, rows - r);
            F* out_scores = scores + r * longest + start;
            int64_t j = 0;
            for (; j + 4 <= count; j += 4)
                multiply_rows<4>(packed + r * D, page + j * token, out_scores + j, few, D, token, longest);
            for (; j < count; ++j)
                multiply_rows<1>(packed + r * D, page + j * token, out_scores + j, few, D, token, longest);
        }
    }
    for (int64_t r = 0; r < rows; ++r) softmax(scores + r * longest, lengths[r]);
    for (int64_t start = 0; start < longest; start += n.page_size) {
        const C* page = page_at(values, start);
        if (start + n.page_size < longest) {
            // Read some columns at a time, a page is no stream that the processor would see coming.
            const C* next = page_at(values, start + n.page_size);
            for (int64_t j = 0; j < n.page_size; ++j)
                for (int64_t i = 0; i < D; i += 64 / sizeof(C)) __builtin_prefetch(next + j * token + i);
        }
        for (int64_t r = 0; r < rows;) {
            // Those of one token see as much as each other.
            const int64_t left = group - r % group, count = std::min(n.page_size, lengths[r] - start);
            const F* p = scores + r * longest + start;
            if (left >= 4)
                add_values<4>(page, token, count, p, longest, D, sums + r * D), r += 4;
            else if (left >= 2)
                add_values<2>(page, token, count, p, longest, D, sums + r * D), r += 2;
            else
                add_values<1>(page, token, count, p, longest, D, sums + r * D), r += 1;
        }
    }
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * D, D, out + place(r));
    if (scratch.size() > MAX_KEPT) std::vector<F>().swap(scratch);
}

}  // namespace tandem
