// States behind tokens that a verify step has recorded, written elsewhere: kernels/gated_delta_rule.py has the contract
// and the law.

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace {

// Strides are those between layers; within a layer everything lies side by side.
struct Sizes {
    int64_t layers, key_heads, value_heads, key_dim, value_dim, recorded, state_stride, out_stride;
};

// One head of one layer, a row of the state at a time.
template <typename F>
void fold_head(const Sizes& n, int64_t layer, int64_t head, const F* state, const F* k, const F* u, const F* alpha, F* out,
               int64_t count) {
    const int64_t HV = n.value_heads, DK = n.key_dim, DV = n.value_dim, key_head = head / (HV / n.key_heads);
    state += layer * n.state_stride + head * DK * DV;
    out += layer * n.out_stride + head * DK * DV;
    for (int64_t i = 0; i < DK; ++i, state += DV, out += DV) {
        std::copy_n(state, DV, out);
        for (int64_t token = layer * n.recorded; token < layer * n.recorded + count; ++token) {
            const F decay = alpha[token * HV + head], key = k[(token * n.key_heads + key_head) * DK + i];
            const F* values = u + (token * HV + head) * DV;
#pragma omp simd
            for (int64_t c = 0; c < DV; ++c) out[c] = out[c] * decay + key * values[c];
        }
    }
}

template <typename F>
void fold(const Sizes& n, const F* state, const F* k, const F* u, const F* alpha, F* out, int64_t count,
          int num_threads) {
    tandem::Team(num_threads).each(n.layers * n.value_heads, [&](int64_t task) {
        fold_head(n, task / n.value_heads, task % n.value_heads, state, k, u, alpha, out, count);
    });
}

}  // namespace

extern "C" void fold_recorded_float32(const Sizes* n, const float* state, const float* k, const float* u,
                                      const float* alpha, float* out, int64_t count, int num_threads) {
    fold(*n, state, k, u, alpha, out, count, num_threads);
}

extern "C" void fold_recorded_float64(const Sizes* n, const double* state, const double* k, const double* u,
                                      const double* alpha, double* out, int64_t count, int num_threads) {
    fold(*n, state, k, u, alpha, out, count, num_threads);
}
