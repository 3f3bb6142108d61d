// The depthwise causal convolution of a delta-net layer with SiLU and the norms of q and k, and their gradients, for
// whole sequences in float32. The law is that of kernels/gated_delta_net.py. One task is one head of one request.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"
#include "tiles.h"

namespace {

using namespace tandem;

// u [B, T, C] has rows `stride` apart; C = 2 · HK · DK + HV · DV.
struct ConvolutionSizes {
    int64_t batch, tokens, key_heads, value_heads, key_dim, value_dim, taps, stride;

    int64_t heads() const { return 2 * key_heads + value_heads; }
    int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

template <typename F>
struct Heads {
    F *q, *k, *v;  // [B, T, HK, DK] twice, [B, T, HV, DV]
};

// Where a head's channels lie in u and its rows in q, k or v. scale is 0 for a head without a norm.
template <typename F>
struct HeadPlace {
    int64_t dim, channel, stride;
    float scale;
    F* rows;

    HeadPlace(const ConvolutionSizes& n, const Heads<F>& heads, int64_t batch, int64_t head) {
        const bool is_value = head >= 2 * n.key_heads, is_key = head >= n.key_heads;
        const int64_t first = is_value ? 2 * n.key_heads : is_key ? n.key_heads : 0;
        dim = is_value ? n.value_dim : n.key_dim;
        channel = first * n.key_dim + (head - first) * dim;
        stride = (is_value ? n.value_heads : n.key_heads) * dim;
        scale = is_value ? 0.0f : is_key ? 1.0f : 1.0f / std::sqrt(float(n.key_dim));
        rows = (is_value ? heads.v : is_key ? heads.k : heads.q) + batch * n.tokens * stride + (head - first) * dim;
    }
};

float l2_factor(const float* x, int64_t dim) { return 1.0f / std::sqrt(dot(x, x, dim) + 1e-6f); }

// The tokens of a head that are worked on together, in rows of pad(dim) numbers: inputs with the W - 1 before them,
// what the convolution makes of these, and its gradient with that of the W - 1 tokens after them.
class Block {
   public:
    Block(const ConvolutionSizes& n, const float* weight, int64_t channel, int64_t dim)
        : taps_(n.taps), dim_(dim), width_(pad(dim)), stride_(n.stride), scratch_(size()) {
        weight_ = scratch_.take(taps_ * width_);
        for (float** part : {&inputs_, &d_sums_}) *part = scratch_.take((TOKENS + taps_) * width_);
        for (float** part : {&sums, &values, &d_values}) *part = scratch_.take(TOKENS * width_);
        std::fill_n(weight_, taps_ * width_, 0.0f);
        std::fill_n(d_sums_, (TOKENS + taps_) * width_, 0.0f);
        for (int64_t tap = 0; tap < taps_; ++tap)
            for (int64_t c = 0; c < dim; ++c) weight_[tap * width_ + c] = weight[(channel + c) * taps_ + tap];
    }

    static constexpr int64_t TOKENS = 64;
    float *sums, *values, *d_values;  // before SiLU, after it, and what is handed in or out

    int64_t width() const { return width_; }

    // Tokens first .. first + count of a sequence at u: sums and values.
    void convolve(const float* u, int64_t first, int64_t count) {
        const int64_t before = std::min(first, taps_ - 1), missing = taps_ - 1 - before;
        std::fill_n(inputs_, missing * width_, 0.0f);
        load_rows(u + (first - before) * stride_, stride_, before + count, dim_, before + count,
                  inputs_ + missing * width_);
        for (int64_t at = 0; at < count * width_; at += TILE) {
            Lanes sum = {};
            for (int64_t tap = 0; tap < taps_; ++tap)
                sum += load(inputs_ + at + tap * width_) * load(weight_ + tap * width_ + at % width_);
            store(sum, sums + at);
        }
#pragma omp simd
        for (int64_t i = 0; i < count * width_; ++i) values[i] = sums[i] * sigmoid(sums[i]);
    }

    // From d_values, which are the gradient of `values`, to that of u, in d_values; d_weight [W, C] is added to. Blocks
    // come last to first.
    void backward(int64_t count, int64_t channels, float* d_weight) {
        std::copy_n(d_sums_, (taps_ - 1) * width_, d_sums_ + count * width_);
#pragma omp simd
        for (int64_t i = 0; i < count * width_; ++i) d_sums_[i] = d_values[i] * silu_slope(sums[i], sigmoid(sums[i]));
        for (int64_t at = 0; at < count * width_; at += TILE) {
            Lanes sum = {};
            for (int64_t tap = 0; tap < taps_; ++tap)
                sum += load(d_sums_ + at + (taps_ - 1 - tap) * width_) * load(weight_ + tap * width_ + at % width_);
            store(sum, d_values + at);
        }
        for (int64_t tap = 0; tap < taps_; ++tap)
            for (int64_t c = 0; c < dim_; c += TILE) {
                Lanes sum = {};
                for (int64_t at = c; at < count * width_; at += width_)
                    sum += load(d_sums_ + at) * load(inputs_ + at + tap * width_);
                for (int64_t i = c; i < std::min(c + TILE, dim_); ++i) d_weight[tap * channels + i] += sum[i - c];
            }
    }

   private:
    int64_t size() const { return (taps_ + 2 * (TOKENS + taps_) + 3 * TOKENS) * width_; }

    int64_t taps_, dim_, width_, stride_;
    Scratch scratch_;
    float *weight_, *inputs_, *d_sums_;
};

void forward_task(const ConvolutionSizes& n, int64_t batch, int64_t head, const float* u, const float* weight,
                  const Heads<float>& out) {
    const HeadPlace<float> place(n, out, batch, head);
    Block block(n, weight, place.channel, place.dim);
    for (int64_t first = 0; first < n.tokens; first += Block::TOKENS) {
        const int64_t count = std::min(Block::TOKENS, n.tokens - first), width = block.width();
        block.convolve(u + batch * n.tokens * n.stride + place.channel, first, count);
        for (int64_t t = 0; t < count && place.scale != 0.0f; ++t) {
            float* row = block.values + t * width;
            const float factor = place.scale * l2_factor(row, width);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) row[c] *= factor;
        }
        store_rows(block.values, count, place.dim, place.rows + first * place.stride, place.stride);
    }
}

// The gradient of x from that of scale · x / |x|, in place.
void backward_norm(const float* x, float scale, int64_t width, float* d) {
    const float inverse = l2_factor(x, width), factor = scale * inverse;
    const float pull = factor * inverse * inverse * dot(x, d, width);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) d[c] = factor * d[c] - pull * x[c];
}

// d_weight [W, C] of this request alone; d_u [B, T, C] is contiguous.
void backward_task(const ConvolutionSizes& n, int64_t batch, int64_t head, const float* u, const float* weight,
                   const Heads<const float>& d_out, float* d_u, float* d_weight) {
    const HeadPlace<const float> place(n, d_out, batch, head);
    const int64_t dim = place.dim, channels = n.channels();
    Block block(n, weight, place.channel, dim);
    for (int64_t first = (n.tokens - 1) / Block::TOKENS * Block::TOKENS; first >= 0; first -= Block::TOKENS) {
        const int64_t count = std::min(Block::TOKENS, n.tokens - first), width = block.width();
        block.convolve(u + batch * n.tokens * n.stride + place.channel, first, count);
        load_rows(place.rows + first * place.stride, place.stride, count, dim, count, block.d_values);
        for (int64_t t = 0; t < count && place.scale != 0.0f; ++t)
            backward_norm(block.values + t * width, place.scale, width, block.d_values + t * width);
        block.backward(count, channels, d_weight + place.channel);
        store_rows(block.d_values, count, dim, d_u + (batch * n.tokens + first) * channels + place.channel, channels);
    }
}

}  // namespace

// weight [C, W] is contiguous, and so are q, k and v.
extern "C" void convolve_heads_float32(const ConvolutionSizes* sizes, const float* u, const float* weight,
                                       const Heads<float>* out, int num_threads) {
    share(sizes->batch * sizes->heads(), num_threads, [=](int64_t task) {
        forward_task(*sizes, task / sizes->heads(), task % sizes->heads(), u, weight, *out);
    });
}

// d_weight is [W, C].
extern "C" void convolve_heads_backward_float32(const ConvolutionSizes* sizes, const float* u, const float* weight,
                                                const Heads<const float>* d_out, float* d_u, float* d_weight,
                                                int num_threads) {
    const int64_t size = sizes->channels() * sizes->taps;
    std::vector<float> sums(sizes->batch * size);
    share(sizes->batch * sizes->heads(), num_threads, [&](int64_t task) {
        const int64_t batch = task / sizes->heads();
        backward_task(*sizes, batch, task % sizes->heads(), u, weight, *d_out, d_u, sums.data() + batch * size);
    });
    add_blocks(sums, size, d_weight);
}
