// A Gated DeltaNet layer between its two projections, for a CPU: convolution, gates, fold, T rows of the delta rule one
// after the other, gated norm. The formulas and the contract are those of kernels/gated_delta_net.py, whose torch version
// is the oracle. One task is one value head of one request, so a state is read once and written once per step; where
// there are several tokens, a few columns of it at a time, which stay in the processor's fastest memory meanwhile.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementwise.h"
#include "products.h"

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
    thread_local std::vector<F> by_tap;  // [taps, count]
    by_tap.resize(n.taps * count);
    for (int64_t c = 0; c < count; ++c)
        for (int64_t tap = 0; tap < n.taps; ++tap) by_tap[tap * count + c] = weight[(first + c) * n.taps + tap];
    const int64_t ring_mask = n.conv_ring_len - 1;
    for (int64_t t = 0; t < tokens; ++t) {
        F* row = out + t * count;
        for (int64_t c = 0; c < count; ++c) row[c] = 0;
        for (int64_t tap = 0; tap < n.taps; ++tap) {
            const int64_t ahead = t - (n.taps - 1) + tap;
            const F* u = (ahead >= 0 ? inputs + ahead * stride : history + (ahead + n.taps - 1) * channels) + first;
            const F* w = by_tap.data() + tap * count;
#pragma omp simd
            for (int64_t c = 0; c < count; ++c) row[c] += u[c] * w[c];
        }
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) row[c] *= sigmoid(row[c]);
    }
    if (!is_owner) return;
    for (int64_t t = std::max<int64_t>(0, tokens - n.conv_ring_len); t < tokens; ++t)
        std::copy_n(inputs + t * stride + first, count, ring + ((start + t) & ring_mask) * channels + first);
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

// One value head's tokens: q, k [T, DK], v, u, reads [T, DV], and per token the decay, beta and q · k. `state` [DK, DV]
// has not folded the `accepted` tokens at ring places `slots`, whose k, u and alpha lie strides apart.
template <typename F>
struct DeltaHead {
    int64_t T, DK, DV, accepted;
    const F *q, *k, *v, *decay, *beta, *qk;
    F *u, *reads, *state, *running;
    const F *ring_k, *ring_u, *ring_alpha;
    const int64_t* slots;
    int64_t k_stride, u_stride, alpha_stride;
    bool is_known;
};

template <typename V, typename F>
V advance(V state, F decay, F k, V u) {
    return state * decay + k * u;
}

// Columns first .. first + COUNT · (numbers in a V) of one head, token after token. V is a vector of F, or F itself. Each
// column is summed on its own, in one order.
template <typename V, int COUNT, typename F>
void run_columns(const DeltaHead<F>& h, int64_t first) {
    constexpr int64_t L = sizeof(V) / sizeof(F), WIDTH = COUNT * L;
    const auto at = [](const F* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    };
    V u[COUNT], read_q[COUNT], read_k[COUNT];
    // source · decay + k · u, kept in target if that is not null, and read by the next q and k.
    const auto pass = [&](const F* source, int64_t source_stride, F* target, int64_t target_stride, F decay, const F* k,
                          const F* next_q, const F* next_k) {
        for (int c = 0; c < COUNT; ++c) read_q[c] = read_k[c] = V{};
        for (int64_t i = 0; i < h.DK; ++i) {
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; ++c) {
                V value = at(source + i * source_stride + c * L);
                if (k != nullptr) value = advance(value, decay, k[i], u[c]);
                if (target != nullptr) std::memcpy(target + i * target_stride + c * L, &value, sizeof value);
                if (next_q == nullptr) continue;
                read_q[c] += value * next_q[i];
                read_k[c] += value * next_k[i];
            }
        }
    };
    F* state = h.state + first;
    if (h.accepted == 0) pass(state, h.DV, nullptr, 0, F(1), nullptr, h.q, h.k);
    for (int64_t j = 0; j < h.accepted; ++j) {
        const bool is_last = j == h.accepted - 1;
        for (int c = 0; c < COUNT; ++c) u[c] = at(h.ring_u + h.slots[j] * h.u_stride + first + c * L);
        pass(state, h.DV, state, h.DV, h.ring_alpha[h.slots[j] * h.alpha_stride], h.ring_k + h.slots[j] * h.k_stride,
             is_last ? h.q : nullptr, h.k);
    }
    // The stored state stays before the guesses; they advance a copy.
    for (int64_t t = 0;; ++t) {
        for (int c = 0; c < COUNT; ++c) {
            const int64_t place = t * h.DV + first + c * L;
            u[c] = h.beta[t] * (at(h.v + place) - h.decay[t] * read_k[c]);
            const V read = h.decay[t] * read_q[c] + h.qk[t] * u[c];
            std::memcpy(h.u + place, &u[c], sizeof(V));
            std::memcpy(h.reads + place, &read, sizeof(V));
        }
        const F* source = t == 0 ? state : h.running;
        const int64_t stride = t == 0 ? h.DV : WIDTH;
        if (t + 1 < h.T) {
            const int64_t next = (t + 1) * h.DK;
            pass(source, stride, h.running, WIDTH, h.decay[t], h.k + t * h.DK, h.q + next, h.k + next);
            continue;
        }
        if (h.is_known) pass(source, stride, state, h.DV, h.decay[t], h.k + t * h.DK, nullptr, nullptr);
        return;
    }
}

template <typename F>
void run_delta_rule(const DeltaHead<F>& head) {
    using V = typename Vector<F>::type;
    constexpr int64_t L = Vector<F>::lanes;
    int64_t first = 0;
    for (; first + 4 * L <= head.DV; first += 4 * L) run_columns<V, 4>(head, first);
    for (; first + L <= head.DV; first += L) run_columns<V, 1>(head, first);
    for (; first < head.DV; ++first) run_columns<F, 1>(head, first);
}

template <typename F>
void verify_head(const DeltaNetSizes& n, const DeltaNetWeights<F>& w, const DeltaNetMemory<F>& m, const F* projected,
                 const DeltaNetPlace<F>& place, int64_t head, F* out) {
    thread_local std::vector<F> scratch;
    thread_local std::vector<int64_t> slots;
    const int64_t DK = n.key_dim, DV = n.value_dim, T = place.tokens, HV = n.value_heads;
    const int64_t group = HV / n.key_heads, key_head = head / group, key_size = n.key_heads * DK;
    const int64_t channels = 2 * key_size + HV * DV, stride = channels + HV * DV + 2 * HV;
    const int64_t row = place.row, start = place.start, accepted = place.accepted;
    const bool owns_keys = head % group == 0;
    const int64_t ring_mask = n.ring_len - 1;

    scratch.resize(T * (2 * DK + 3 * DV + 3) + DK * DV);
    F *q = scratch.data(), *k = q + T * DK, *v = k + T * DK, *u = v + T * DV, *reads = u + T * DV;
    F *running = reads + T * DV, *decay = running + DK * DV, *beta = decay + T, *qk = beta + T;

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
    const F rate = -std::exp(w.a_log[head]);
    for (int64_t t = 0; t < T; ++t) {
        const F* gates = inputs + t * stride + channels + HV * DV;
        beta[t] = sigmoid(gates[head]);
        decay[t] = std::exp(rate * softplus(gates[HV + head] + w.dt_bias[head]));
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < DK; ++i) sum += q[t * DK + i] * k[t * DK + i];
        qk[t] = sum;
    }
    slots.resize(accepted);
    for (int64_t j = 0; j < accepted; ++j) slots[j] = row * n.ring_len + ((start - accepted + j) & ring_mask);
    run_delta_rule(DeltaHead<F>{T, DK, DV, accepted, q, k, v, decay, beta, qk, u, reads,
                                m.state + (row * HV + head) * DK * DV, running, m.ring_k + key_head * DK,
                                m.ring_u + head * DV, m.ring_alpha + head, slots.data(), n.key_heads * DK, HV * DV, HV,
                                place.is_known});

    for (int64_t t = 0; t < T; ++t) {
        if (!place.is_known) {
            const int64_t slot = row * n.ring_len + ((start + t) & ring_mask);
            std::copy_n(u + t * DV, DV, m.ring_u + (slot * HV + head) * DV);
            m.ring_alpha[slot * HV + head] = decay[t];
            if (owns_keys) std::copy_n(k + t * DK, DK, m.ring_k + (slot * n.key_heads + key_head) * DK);
        }
        F square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < DV; ++c) square += reads[t * DV + c] * reads[t * DV + c];
        const F factor = F(1) / std::sqrt(square / DV + w.eps);
        const F* z = inputs + t * stride + channels + head * DV;
        F* y = out + ((place.first + t) * HV + head) * DV;
#pragma omp simd
        for (int64_t c = 0; c < DV; ++c) y[c] = w.norm[c] * reads[t * DV + c] * factor * (z[c] * sigmoid(z[c]));
    }
}

}  // namespace tandem
