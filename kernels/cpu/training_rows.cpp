// Norms, activations and gates of a training step with their gradients, row by row. The laws stand in
// kernels/rms_norm.py, kernels/activation.py and kernels/rotary.py.

#include "rows.h"

namespace {

using namespace tandem;

// Rows [N, heads, dim] of a wider tensor.
struct HeadRows {
    int64_t count, heads, dim, stride, head_stride;

    int64_t at(int64_t row) const { return row / heads * stride + row % heads * head_stride; }
};

// The half-split pairs (i, i + half) of cos and sin [N, half], whose rows lie `stride` apart.
struct Rotation {
    const float *cos, *sin;
    int64_t half, stride;

    // direction 1 turns x, -1 turns a gradient back.
    void turn(const float* x, int64_t row, float direction, float* y) const {
        const float *c = cos + row * stride, *s = sin + row * stride;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float first = x[i], second = x[i + half], sine = direction * s[i];
            y[i] = first * c[i] - second * sine;
            y[i + half] = second * c[i] + first * sine;
        }
    }
};

// The gradient of x in y = scale · x · factor(x), added to d_x's `first`; and that of scale, to `sum`.
void norm_backward(const float* x, const float* scale, const float* d_y, const float* first, int64_t dim, float factor,
                   float* d_x, float* sum) {
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < dim; ++i) along += d_y[i] * scale[i] * x[i];
    const float pull = along * factor * factor * factor / dim;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        sum[i] += d_y[i] * x[i] * factor;
        d_x[i] = (first == nullptr ? 0.0f : first[i]) + factor * d_y[i] * scale[i] - pull * x[i];
    }
}

}  // namespace

// total = x + delta (delta may be null: then total is x and not written), y = norm(total); all [rows, dim].
extern "C" void add_norm_float32(const float* x, const float* delta, const float* scale, float* total, float* y,
                                 int64_t rows, int64_t dim, double eps, int num_threads) {
    for_rows(rows, num_threads, [=](int64_t row) {
        const float* sum = x + row * dim;
        if (delta != nullptr) {
            sum = total + row * dim;
#pragma omp simd
            for (int64_t i = row * dim; i < (row + 1) * dim; ++i) total[i] = x[i] + delta[i];
        }
        const float factor = rms_factor(sum, dim, float(eps));
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) y[row * dim + i] = sum[i] * factor * scale[i];
    });
}

// d_x, which is also that of delta, from d_y and d_total (may be null); d_scale [dim].
extern "C" void add_norm_backward_float32(const float* total, const float* scale, const float* d_y,
                                          const float* d_total, float* d_x, float* d_scale, int64_t rows, int64_t dim,
                                          double eps, int num_threads) {
    for_rows(rows, num_threads, dim, d_scale, [=](int64_t row, float* sum) {
        const float* x = total + row * dim;
        norm_backward(x, scale, d_y + row * dim, d_total == nullptr ? nullptr : d_total + row * dim, dim,
                      rms_factor(x, dim, float(eps)), d_x + row * dim, sum);
    });
}

// y [N, heads, dim] = weight · norm(x) · silu(gate); x is contiguous, the gates are `shape`.
extern "C" void gated_norm_float32(const float* x, const float* gate, const float* weight, float* y,
                                   const HeadRows* shape, double eps, int num_threads) {
    const HeadRows n = *shape;
    for_rows(n.count * n.heads, num_threads, [=](int64_t row) {
        const float *in = x + row * n.dim, *g = gate + n.at(row);
        const float factor = rms_factor(in, n.dim, float(eps));
#pragma omp simd
        for (int64_t i = 0; i < n.dim; ++i) y[row * n.dim + i] = weight[i] * in[i] * factor * (g[i] * sigmoid(g[i]));
    });
}

extern "C" void gated_norm_backward_float32(const float* x, const float* gate, const float* weight, const float* d_y,
                                            float* d_x, float* d_gate, float* d_weight, const HeadRows* shape,
                                            double eps, int num_threads) {
    const HeadRows n = *shape;
    for_rows(n.count * n.heads, num_threads, n.dim, d_weight, [=](int64_t row, float* sum) {
        const float *in = x + row * n.dim, *g = gate + n.at(row), *d = d_y + row * n.dim;
        float *out = d_x + row * n.dim, *out_gate = d_gate + row * n.dim;
        const float factor = rms_factor(in, n.dim, float(eps));
#pragma omp simd
        for (int64_t i = 0; i < n.dim; ++i) {
            const float open = sigmoid(g[i]), of_norm = d[i] * (g[i] * open);
            out_gate[i] = d[i] * weight[i] * in[i] * factor * silu_slope(g[i], open);
            out[i] = of_norm;
        }
        norm_backward(in, weight, out, nullptr, n.dim, factor, out, sum);
    });
}

// y [N, heads, dim], contiguous, of x, which is `shape`: normed, and its first 2 · half dimensions turned.
extern "C" void norm_rotary_float32(const float* x, const float* scale, const Rotation* rotation, float* y,
                                    const HeadRows* shape, double eps, int num_threads) {
    const HeadRows n = *shape;
    for_rows(n.count * n.heads, num_threads, [=](int64_t row) {
        const float* in = x + n.at(row);
        float* out = y + row * n.dim;
        const float factor = rms_factor(in, n.dim, float(eps));
#pragma omp simd
        for (int64_t i = 0; i < n.dim; ++i) out[i] = in[i] * factor * scale[i];
        rotation->turn(out, row / n.heads, 1.0f, out);
    });
}

extern "C" void norm_rotary_backward_float32(const float* x, const float* scale, const Rotation* rotation,
                                             const float* d_y, float* d_x, float* d_scale, const HeadRows* shape,
                                             double eps, int num_threads) {
    const HeadRows n = *shape;
    for_rows(n.count * n.heads, num_threads, n.dim, d_scale, [=](int64_t row, float* sum) {
        const float* in = x + n.at(row);
        float* d = d_x + row * n.dim;
        std::copy_n(d_y + row * n.dim, n.dim, d);
        rotation->turn(d, row / n.heads, -1.0f, d);
        norm_backward(in, scale, d, nullptr, n.dim, rms_factor(in, n.dim, float(eps)), d, sum);
    });
}

// y [rows, dim] = silu(gate) · up of gate_up [rows, 2 · dim].
extern "C" void silu_and_mul_float32(const float* gate_up, float* y, int64_t rows, int64_t dim, int num_threads) {
    for_rows(rows, num_threads, [=](int64_t row) {
        const float *gate = gate_up + 2 * row * dim, *up = gate + dim;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) y[row * dim + i] = gate[i] * sigmoid(gate[i]) * up[i];
    });
}

extern "C" void silu_and_mul_backward_float32(const float* gate_up, const float* d_y, float* d_gate_up, int64_t rows,
                                              int64_t dim, int num_threads) {
    for_rows(rows, num_threads, [=](int64_t row) {
        const float *gate = gate_up + 2 * row * dim, *up = gate + dim, *d = d_y + row * dim;
        float *d_gate = d_gate_up + 2 * row * dim, *d_up = d_gate + dim;
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) {
            const float open = sigmoid(gate[i]);
            d_gate[i] = d[i] * up[i] * silu_slope(gate[i], open);
            d_up[i] = d[i] * (gate[i] * open);
        }
    });
}
