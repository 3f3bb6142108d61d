// The gated delta rule over whole sequences in chunks, and its gradients, for a CPU in float32. The formulas are those
// of kernels/gated_delta_rule.py, whose torch version is the oracle. One task is one key head of one request with the
// value heads that read it. What both directions need of a chunk is computed here, they stand in delta_rule.cpp.
//
// With D_tj = e^(G_t - G_j), zero above the diagonal, x = v - e^G KS, A = beta (KKt o D) below it and P = QKt o D:
//     (I + A) u = beta x ,   o = e^G QS + P u ,   S' = e^(G_n) S + (w K)t u ,   w_t = e^(G_n - G_t)
// G is kept in double: neighbouring tokens may stand after thousands of decay, and their difference counts.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "tiles.h"

namespace tandem {

constexpr int64_t CHUNK = 32;

struct DeltaRuleSizes {
    int64_t batch, tokens, key_heads, value_heads, key_dim, value_dim;

    int64_t group() const { return value_heads / key_heads; }
    int64_t num_chunks() const { return (tokens + CHUNK - 1) / CHUNK; }
    int64_t state_size() const { return pad(key_dim) * pad(value_dim); }
};

// q, k [B, T, HK, DK], v [B, T, HV, DV], log_alpha, beta [B, T, HV]; inputs, or gradients of them.
template <typename F>
struct DeltaRuleTensors {
    F *q, *k, *v, *log_alpha, *beta;
};

// e^-80 and less counts as nothing: products with it are subnormal, and slow.
inline float decay_of(double log_decay) {
    const float x = float(log_decay);
    return x < -80.0f ? 0.0f : exponential(x);
}

// Where a chunk of one request lies: its first token, how many there are, and this padded to whole tiles.
struct ChunkPlace {
    int64_t batch, first, count, rows;

    ChunkPlace(const DeltaRuleSizes& n, int64_t b, int64_t chunk)
        : batch(b), first(chunk * CHUNK), count(std::min(CHUNK, n.tokens - first)), rows(pad(count)) {}
    // Index of the chunk's first token at a head in a tensor [B, T, heads].
    int64_t at(const DeltaRuleSizes& n, int64_t heads, int64_t head) const {
        return (batch * n.tokens + first) * heads + head;
    }
};

// What the value heads of a key head share: rows of q and k, Kt, and lower triangles of QKt and KKt.
struct KeyChunk {
    float *q, *k, *kt, *qk, *kk;

    explicit KeyChunk(const DeltaRuleSizes& n, Scratch& scratch) {
        const int64_t rows = CHUNK * pad(n.key_dim);
        for (float** part : {&q, &k, &kt}) *part = scratch.take(rows);
        for (float** part : {&qk, &kk}) *part = scratch.take(CHUNK * CHUNK);
    }
    static int64_t size(const DeltaRuleSizes& n) { return 3 * CHUNK * pad(n.key_dim) + 2 * CHUNK * CHUNK; }

    void load(const DeltaRuleSizes& n, const DeltaRuleTensors<const float>& in, const ChunkPlace& place, int64_t head) {
        const int64_t DK = n.key_dim, width = pad(DK), rows = place.rows, at = place.at(n, n.key_heads, head) * DK;
        load_rows(in.q + at, n.key_heads * DK, place.count, DK, rows, q);
        load_rows(in.k + at, n.key_heads * DK, place.count, DK, rows, k);
        transpose(k, rows, width, kt);
        for (int64_t t = 0; t < rows; t += TILE_ROWS) {
            const int64_t seen = pad(t + TILE_ROWS);
            product_rows<Into::set>(plain(q + t * width, width), kt, rows, width, seen, qk + t * rows, rows);
            product_rows<Into::set>(plain(k + t * width, width), kt, rows, width, seen, kk + t * rows, rows);
        }
    }
};

// What a chunk of a value head is made of, from its inputs and the state [DK, DV] before it.
struct ValueChunk {
    float *decay, *a, *p, *x, *u, *q_state, *k_state;  // q_state = e^G QS, k_state = e^G KS
    float *beta, *scale, *weight;                      // scale = e^G
    double total[CHUNK];                               // G
    float state_decay;

    explicit ValueChunk(const DeltaRuleSizes& n, Scratch& scratch) {
        for (float** part : {&decay, &a, &p}) *part = scratch.take(CHUNK * CHUNK);
        for (float** part : {&x, &u, &q_state, &k_state}) *part = scratch.take(CHUNK * pad(n.value_dim));
        for (float** part : {&beta, &scale, &weight}) *part = scratch.take(CHUNK);
    }
    static int64_t size(const DeltaRuleSizes& n) {
        return 3 * CHUNK * CHUNK + 4 * CHUNK * pad(n.value_dim) + 3 * CHUNK;
    }

    void load(const DeltaRuleSizes& n, const DeltaRuleTensors<const float>& in, const ChunkPlace& place, int64_t head,
              const KeyChunk& keys, const float* state) {
        const int64_t width = pad(n.value_dim), rows = place.rows;
        load_gates(in, n, place, head);
        mix(keys, rows);
        load_rows(in.v + place.at(n, n.value_heads, head) * n.value_dim, n.value_heads * n.value_dim, place.count,
                  n.value_dim, rows, x);
        product<Into::set>(plain(keys.q, pad(n.key_dim)), state, rows, width, pad(n.key_dim), q_state);
        product<Into::set>(plain(keys.k, pad(n.key_dim)), state, rows, width, pad(n.key_dim), k_state);
        for (int64_t t = 0; t < rows; ++t)
#pragma omp simd
            for (int64_t c = t * width; c < (t + 1) * width; ++c) {
                q_state[c] *= scale[t];
                k_state[c] *= scale[t];
                x[c] -= k_state[c];
                u[c] = beta[t] * x[c];
            }
        solve(rows, width);
    }

   private:
    void load_gates(const DeltaRuleTensors<const float>& in, const DeltaRuleSizes& n, const ChunkPlace& place,
                    int64_t head) {
        double sum = 0;
        for (int64_t t = 0; t < place.rows; ++t) {
            const bool is_token = t < place.count;
            const int64_t at = place.at(n, n.value_heads, head) + t * n.value_heads;
            sum += is_token ? in.log_alpha[at] : 0;
            beta[t] = is_token ? in.beta[at] : 0;
            total[t] = sum;
        }
        for (int64_t t = 0; t < place.rows; ++t) {
            scale[t] = decay_of(total[t]);
            weight[t] = decay_of(sum - total[t]);
        }
        state_decay = decay_of(sum);
    }

    void mix(const KeyChunk& keys, int64_t rows) {
        for (int64_t t = 0; t < rows; ++t)
#pragma omp simd
            for (int64_t j = 0; j < pad(t + 1); ++j) {
                const int64_t at = t * rows + j;
                const float d = j <= t ? decay_of(total[t] - total[j]) : 0.0f;
                decay[at] = d;
                p[at] = keys.qk[at] * d;
                a[at] = j < t ? beta[t] * keys.kk[at] * d : 0.0f;
            }
    }

    // u = (I + A)^-1 u, eight rows at a time.
    void solve(int64_t rows, int64_t width) {
        for (int64_t t = 0; t < rows; t += TILE_ROWS) {
            product_rows<Into::subtract>(plain(a + t * rows, rows), u, width, t, width, u + t * width, width);
            for (int64_t i = t + 1; i < t + TILE_ROWS; ++i)
                for (int64_t j = t; j < i; ++j) subtract(u + j * width, a[i * rows + j], width, u + i * width);
        }
    }

   public:
    // y = (I + A)^-T y
    void solve_transposed(int64_t rows, int64_t width, float* y) const {
        for (int64_t t = rows - TILE_ROWS; t >= 0; t -= TILE_ROWS) {
            const int64_t next = t + TILE_ROWS;
            product_rows<Into::subtract>(transposed(a + next * rows + t, rows), y + next * width, width, rows - next,
                                         width, y + t * width, width);
            for (int64_t i = next - 1; i > t; --i)
                for (int64_t j = t; j < i; ++j) subtract(y + i * width, a[i * rows + j], width, y + j * width);
        }
    }

   private:
    static void subtract(const float* source, float factor, int64_t width, float* target) {
        for (int64_t c = 0; c < width; c += TILE)
            store(tandem::load(target + c) - factor * tandem::load(source + c), target + c);
    }
};

}  // namespace tandem
