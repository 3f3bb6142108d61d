// A Gated DeltaNet layer between its two projections, for a CPU: convolution, gates, fold, T rows of the delta rule one
// after the other, gated norm. The formulas and the contract are those of kernels/gated_delta_net.py, whose torch version
// is the oracle. One task is one value head of one request, so a state is read once and written once per step.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementwise.h"

namespace tandem {

struct DeltaNetSizes {
    int64_t key_heads, value_heads, key_dim, value_dim, taps, conv_ring_len, ring_len;
};

// One layer's cache: conv_ring [R, conv_ring_len, C], state [R, HV, DK, DV], and the delta ring. Ring lengths are powers
// of two.
template <typename F>
struct DeltaNetMemory {
    F *conv_ring, *state, *ring_k, *ring_u, *ring_alpha;
};

template <typename F>
struct DeltaNetWeights {
    const F *conv, *a_log, *dt_bias, *norm;
    F eps;
};

// One request's share of a pass: its row of the cache, the position of its first token, what its state has not folded
// yet, its first token's index in the pass, and how many there are. history [taps - 1, C]: the inputs before them. Known
// tokens store the state behind the last of them, guessed ones only what a later fold needs.
template <typename F>
struct DeltaNetPlace {
    int64_t row, start, accepted, first, tokens;
    const F* history;
    bool is_known;
};

// Channels first..first+count of all tokens -> out [T, count]; the owner of the channels also records its inputs.
template <typename F>
void convolve(const DeltaNetSizes& n, int64_t tokens, const F* inputs, int64_t stride, const F* weight,
              const F* history, F* ring, int64_t start, int64_t first, int64_t count, int64_t channels, bool is_owner,
              F* out) {
    const int64_t ring_mask = n.conv_ring_len - 1;
    for (int64_t t = 0; t < tokens; ++t) {
        F* row = out + t * count;
        for (int64_t c = 0; c < count; ++c) row[c] = 0;
        for (int64_t tap = 0; tap < n.taps; ++tap) {
            const int64_t ahead = t - (n.taps - 1) + tap;
            const F* u = ahead >= 0 ? inputs + ahead * stride : history + (ahead + n.taps - 1) * channels;
#pragma omp simd
            for (int64_t c = 0; c < count; ++c) row[c] += u[first + c] * weight[(first + c) * n.taps + tap];
        }
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) row[c] *= sigmoid(row[c]);
    }
    if (!is_owner) return;
    for (int64_t t = std::max<int64_t>(0, tokens - n.conv_ring_len); t < tokens; ++t) {
        F* slot = ring + ((start + t) & ring_mask) * channels;
        for (int64_t c = 0; c < count; ++c) slot[first + c] = inputs[t * stride + first + c];
    }
}

template <typename F>
void l2_normalise(F* rows, int64_t count, int64_t dim, F scale) {
    for (int64_t t = 0; t < count; ++t) {
        F* x = rows + t * dim;
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) sum += x[i] * x[i];
        const F factor = scale / std::sqrt(sum + F(1e-6));
        for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
    }
}

// One row of the state: source · decay + k · u, written to target, and added to what q and k read.
template <typename F>
void update_and_read(const F* source, F* target, int64_t dim, F decay, F k, const F* u, F next_q, F next_k, F* read_q,
                     F* read_k) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const F value = source[i] * decay + k * u[i];
        target[i] = value;
        read_q[i] += value * next_q;
        read_k[i] += value * next_k;
    }
}

template <typename F>
void verify_head(const DeltaNetSizes& n, const DeltaNetWeights<F>& w, const DeltaNetMemory<F>& m, const F* projected,
                 const DeltaNetPlace<F>& place, int64_t head, F* out) {
    thread_local std::vector<F> scratch;
    const int64_t DK = n.key_dim, DV = n.value_dim, T = place.tokens, HV = n.value_heads;
    const int64_t group = HV / n.key_heads, key_head = head / group, key_size = n.key_heads * DK;
    const int64_t channels = 2 * key_size + HV * DV, stride = channels + HV * DV + 2 * HV;
    const int64_t row = place.row, start = place.start, accepted = place.accepted;
    const bool owns_keys = head % group == 0;
    const int64_t ring_mask = n.ring_len - 1;

    scratch.resize(T * (2 * DK + 2 * DV) + 2 * DV + DK * DV);
    F *q = scratch.data(), *k = q + T * DK, *v = k + T * DK, *u = v + T * DV;
    F *read_q = u + T * DV, *read_k = read_q + DV, *running = read_k + DV;

    const F* inputs = projected + place.first * stride;
    F* conv_ring = m.conv_ring + row * n.conv_ring_len * channels;
    const auto read = [&](int64_t first, int64_t count, bool is_owner, F* rows) {
        convolve(n, T, inputs, stride, w.conv, place.history, conv_ring, start, first, count, channels, is_owner, rows);
    };
    read(key_head * DK, DK, owns_keys, q);
    read(key_size + key_head * DK, DK, owns_keys, k);
    read(2 * key_size + head * DV, DV, true, v);
    l2_normalise(q, T, DK, F(1) / std::sqrt(F(DK)));
    l2_normalise(k, T, DK, F(1));

    F* state = m.state + (row * HV + head) * DK * DV;
    const F rate = -std::exp(w.a_log[head]);
    F decay = 1;
    for (int64_t t = 0; t < T; ++t) {
        for (int64_t i = 0; i < 2 * DV; ++i) read_q[i] = 0;
        if (t == 0) {
            for (int64_t j = 0; j < accepted; ++j) {
                const int64_t slot = row * n.ring_len + ((start - accepted + j) & ring_mask);
                const F* ring_u = m.ring_u + (slot * HV + head) * DV;
                const F* ring_k = m.ring_k + (slot * n.key_heads + key_head) * DK;
                const F alpha = m.ring_alpha[slot * HV + head];
                const bool is_last = j == accepted - 1;
                for (int64_t i = 0; i < DK; ++i)
                    update_and_read(state + i * DV, state + i * DV, DV, alpha, ring_k[i], ring_u,
                                    is_last ? q[i] : F(0), is_last ? k[i] : F(0), read_q, read_k);
            }
            if (accepted == 0)
                for (int64_t i = 0; i < DK; ++i)
#pragma omp simd
                    for (int64_t c = 0; c < DV; ++c) {
                        read_q[c] += state[i * DV + c] * q[i];
                        read_k[c] += state[i * DV + c] * k[i];
                    }
        } else {
            // The stored state stays before the guesses; they advance a copy.
            const F* source = t == 1 ? state : running;
            for (int64_t i = 0; i < DK; ++i)
                update_and_read(source + i * DV, running + i * DV, DV, decay, k[(t - 1) * DK + i], u + (t - 1) * DV,
                                q[t * DK + i], k[t * DK + i], read_q, read_k);
        }
        const F* gates = inputs + t * stride + channels + HV * DV;
        const F beta = sigmoid(gates[head]);
        decay = std::exp(rate * softplus(gates[HV + head] + w.dt_bias[head]));
        F qk = 0;
#pragma omp simd reduction(+ : qk)
        for (int64_t i = 0; i < DK; ++i) qk += q[t * DK + i] * k[t * DK + i];

        F square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < DV; ++c) {
            const F delta = beta * (v[t * DV + c] - decay * read_k[c]);
            u[t * DV + c] = delta;
            read_q[c] = decay * read_q[c] + qk * delta;
            square += read_q[c] * read_q[c];
        }
        if (!place.is_known) {
            const int64_t slot = row * n.ring_len + ((start + t) & ring_mask);
            for (int64_t c = 0; c < DV; ++c) m.ring_u[(slot * HV + head) * DV + c] = u[t * DV + c];
            m.ring_alpha[slot * HV + head] = decay;
            if (owns_keys)
                for (int64_t i = 0; i < DK; ++i) m.ring_k[(slot * n.key_heads + key_head) * DK + i] = k[t * DK + i];
        }
        const F factor = F(1) / std::sqrt(square / DV + w.eps);
        const F* z = inputs + t * stride + channels + head * DV;
        F* y = out + ((place.first + t) * HV + head) * DV;
#pragma omp simd
        for (int64_t c = 0; c < DV; ++c) y[c] = w.norm[c] * read_q[c] * factor * (z[c] * sigmoid(z[c]));
    }
    if (!place.is_known) return;
    const F* source = T == 1 ? state : running;
    const F *last_k = k + (T - 1) * DK, *last_u = u + (T - 1) * DV;
    for (int64_t i = 0; i < DK; ++i)
#pragma omp simd
        for (int64_t c = 0; c < DV; ++c) state[i * DV + c] = source[i * DV + c] * decay + last_k[i] * last_u[c];
}

}  // namespace tandem
