// Both directions of the gated delta rule over whole sequences: see delta_rule.h.

#include "delta_rule.h"

#include <algorithm>

#include "rows.h"

namespace {

using namespace tandem;

// y [rows, width], row t scaled by factor[t].
void scale_rows(const float* x, const float* factor, int64_t rows, int64_t width, float* y) {
    for (int64_t t = 0; t < rows; ++t)
#pragma omp simd
        for (int64_t c = t * width; c < (t + 1) * width; ++c) y[c] = factor[t] * x[c];
}

// state = state_decay · state + (w K)t u
void advance(const DeltaRuleSizes& n, const KeyChunk& keys, const ValueChunk& chunk, int64_t rows, float* weighted,
             float* state) {
    const int64_t width = pad(n.key_dim);
    scale_rows(keys.k, chunk.weight, rows, width, weighted);
    for (int64_t i = 0; i < n.state_size(); ++i) state[i] *= chunk.state_decay;
    product<Into::add>(transposed(weighted, width), chunk.u, width, pad(n.value_dim), rows, state);
}

// states [B, HV, chunks, pad(DK), pad(DV)]: those before every chunk, for the way back; or null. memory [B, HV, DK, DV]:
// the state before the sequence, and then the one after it; null: zero before it.
void forward_task(const DeltaRuleSizes& n, const DeltaRuleTensors<const float>& in, int64_t task, float* out,
                  float* states, float* memory) {
    const int64_t batch = task / n.key_heads, key_head = task % n.key_heads, group = n.group(), size = n.state_size();
    const int64_t DK = n.key_dim, DV = n.value_dim, HV = n.value_heads, width = pad(DV);
    Scratch scratch(KeyChunk::size(n) + ValueChunk::size(n) + group * size + CHUNK * pad(n.key_dim));
    KeyChunk keys(n, scratch);
    ValueChunk chunk(n, scratch);
    float *running = scratch.take(group * size), *weighted = scratch.take(CHUNK * pad(n.key_dim));
    std::fill_n(running, group * size, 0.0f);
    float* kept = memory == nullptr ? nullptr : memory + (batch * HV + key_head * group) * DK * DV;
    for (int64_t g = 0; kept != nullptr && g < group; ++g)
        load_rows(kept + g * DK * DV, DV, DK, DV, pad(DK), running + g * size);
    for (int64_t index = 0; index < n.num_chunks(); ++index) {
        const ChunkPlace place(n, batch, index);
        keys.load(n, in, place, key_head);
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = key_head * group + g, rows = place.rows;
            float* state = running + g * size;
            if (states != nullptr)
                std::copy_n(state, size, states + ((batch * HV + head) * n.num_chunks() + index) * size);
            chunk.load(n, in, place, head, keys, state);
            for (int64_t t = 0; t < rows; t += TILE_ROWS)
                product_rows<Into::add>(plain(chunk.p + t * rows, rows), chunk.u, width, t + TILE_ROWS, width,
                                        chunk.q_state + t * width, width);
            store_rows(chunk.q_state, place.count, DV, out + place.at(n, HV, head) * DV, HV * DV);
            advance(n, keys, chunk, rows, weighted, state);
        }
    }
    for (int64_t g = 0; kept != nullptr && g < group; ++g)
        store_rows(running + g * size, DK, DV, kept + g * DK * DV, DV);
}

// Gradients of a chunk, named as what they are of: q, k, QKt and KKt, which the value heads add to; of the value head
// at hand its outputs (`out`), beta x (`x`) and G (`total`); scaled_out and scaled_x are those of QS and KS. The others
// are room: for w K, for pairs of tokens, for ut, for a state transposed, and for what k reads of a state.
struct Gradients {
    float *q, *k, *qk, *kk, *out, *x, *scaled_out, *scaled_x, *weighted, *pairs, *ut, *state_t, *seen;
    double total[CHUNK];

    Gradients(const DeltaRuleSizes& n, Scratch& scratch) {
        for (float** part : {&q, &k, &weighted, &seen}) *part = scratch.take(CHUNK * pad(n.key_dim));
        for (float** part : {&qk, &kk, &pairs}) *part = scratch.take(CHUNK * CHUNK);
        for (float** part : {&out, &x, &scaled_out, &scaled_x, &ut}) *part = scratch.take(CHUNK * pad(n.value_dim));
        state_t = scratch.take(n.state_size());
    }
    static int64_t size(const DeltaRuleSizes& n) {
        return 4 * CHUNK * pad(n.key_dim) + 3 * CHUNK * CHUNK + 5 * CHUNK * pad(n.value_dim) + n.state_size();
    }
};

// From the gradient of the outputs and of the state after the chunk to that of u and with it of beta x, v and beta.
void backward_values(const DeltaRuleSizes& n, const ChunkPlace& place, int64_t head, const KeyChunk& keys,
                     const ValueChunk& chunk, const float* d_state, Gradients& d,
                     const DeltaRuleTensors<float>& grads) {
    const int64_t rows = place.rows, DV = n.value_dim, width = pad(DV), key_width = pad(n.key_dim), HV = n.value_heads;
    scale_rows(keys.k, chunk.weight, rows, key_width, d.weighted);
    product<Into::set>(plain(d.weighted, key_width), d_state, rows, width, key_width, d.x);
    for (int64_t t = 0; t < rows; t += TILE_ROWS)
        product_rows<Into::add>(transposed(chunk.p + t * rows + t, rows), d.out + t * width, width, rows - t, width,
                                d.x + t * width, width);
    chunk.solve_transposed(rows, width, d.x);
    const int64_t at = place.at(n, HV, head);
    for (int64_t t = 0; t < place.count; ++t) {
        grads.beta[at + t * HV] = dot(d.x + t * width, chunk.x + t * width, width);
        float* d_v = grads.v + (at + t * HV) * DV;
#pragma omp simd
        for (int64_t c = 0; c < DV; ++c) d_v[c] = chunk.beta[t] * d.x[t * width + c];
    }
}

// Gradients of P and A, from which those of QKt, KKt, beta and the decays follow.
void backward_pairs(const DeltaRuleSizes& n, const ChunkPlace& place, int64_t head, const KeyChunk& keys,
                    const ValueChunk& chunk, Gradients& d, const DeltaRuleTensors<float>& grads) {
    const int64_t rows = place.rows, width = pad(n.value_dim);
    transpose(chunk.u, rows, width, d.ut);
    for (int64_t first = 0; first < rows; first += TILE_ROWS) {
        const int64_t seen = pad(first + TILE_ROWS);
        float *of_p = d.pairs, *of_a = d.pairs + TILE_ROWS * rows;
        product_rows<Into::set>(plain(d.out + first * width, width), d.ut, rows, width, seen, of_p, rows);
        product_rows<Into::set>(plain(d.x + first * width, width), d.ut, rows, width, seen, of_a, rows);
        for (int64_t t = first; t < first + TILE_ROWS; ++t, of_p += rows, of_a += rows) {
            const float *decay = chunk.decay + t * rows, *kk = keys.kk + t * rows, *p = chunk.p + t * rows;
            const float beta = chunk.beta[t];
            float *d_qk = d.qk + t * rows, *d_kk = d.kk + t * rows, d_beta = 0;
            double sum = 0;
#pragma omp simd reduction(+ : sum, d_beta)
            for (int64_t j = 0; j < seen; ++j) {
                const float mixed = j < t ? -of_a[j] * decay[j] : 0.0f;
                const double change = double(of_p[j]) * p[j] + double(beta) * mixed * kk[j];
                d_qk[j] += of_p[j] * decay[j];
                d_kk[j] += beta * mixed;
                d_beta += mixed * kk[j];
                sum += change;
                d.total[j] -= change;
            }
            d.total[t] += sum;
            if (t < place.count) grads.beta[place.at(n, n.value_heads, head) + t * n.value_heads] += d_beta;
        }
    }
}

// What q, k and the decays have read of the state and given to it; the state's gradient becomes that before the chunk.
void backward_state(const DeltaRuleSizes& n, int64_t rows, const KeyChunk& keys, const ValueChunk& chunk,
                    const float* state, float* d_state, Gradients& d) {
    const int64_t width = pad(n.value_dim), key_width = pad(n.key_dim);
    transpose(d_state, key_width, width, d.state_t);
    product<Into::set>(plain(chunk.u, width), d.state_t, rows, key_width, width, d.seen);
    double kept = double(chunk.state_decay) * dot(state, d_state, n.state_size());
    for (int64_t t = 0; t < rows; ++t) {
        const double given = double(chunk.weight[t]) * dot(d.seen + t * key_width, keys.k + t * key_width, key_width);
        kept += given;
        d.total[t] += double(dot(d.out + t * width, chunk.q_state + t * width, width)) - given -
                      double(chunk.beta[t]) * dot(d.x + t * width, chunk.k_state + t * width, width);
#pragma omp simd
        for (int64_t c = t * key_width; c < (t + 1) * key_width; ++c) d.k[c] += chunk.weight[t] * d.seen[c];
#pragma omp simd
        for (int64_t c = t * width; c < (t + 1) * width; ++c) {
            d.scaled_out[c] = chunk.scale[t] * d.out[c];
            d.scaled_x[c] = -chunk.scale[t] * chunk.beta[t] * d.x[c];
        }
    }
    d.total[rows - 1] += kept;
    transpose(state, key_width, width, d.state_t);
    product<Into::add>(plain(d.scaled_out, width), d.state_t, rows, key_width, width, d.q);
    product<Into::add>(plain(d.scaled_x, width), d.state_t, rows, key_width, width, d.k);
    for (int64_t i = 0; i < n.state_size(); ++i) d_state[i] *= chunk.state_decay;
    product<Into::add>(transposed(keys.q, key_width), d.scaled_out, key_width, width, rows, d_state);
    product<Into::add>(transposed(keys.k, key_width), d.scaled_x, key_width, width, rows, d_state);
}

// q, k from the gradients of QKt and KKt, which all value heads have added to.
void backward_keys(const DeltaRuleSizes& n, const ChunkPlace& place, int64_t head, const KeyChunk& keys, Gradients& d,
                   const DeltaRuleTensors<float>& grads) {
    const int64_t rows = place.rows, DK = n.key_dim, width = pad(DK), stride = n.key_heads * DK;
    for (int64_t t = 0; t < rows; t += TILE_ROWS) {
        const int64_t corner = t * rows + t, left = rows - t;
        float *d_q = d.q + t * width, *d_k = d.k + t * width;
        product_rows<Into::add>(plain(d.qk + t * rows, rows), keys.k, width, t + TILE_ROWS, width, d_q, width);
        product_rows<Into::add>(transposed(d.qk + corner, rows), keys.q + t * width, width, left, width, d_k, width);
        product_rows<Into::add>(plain(d.kk + t * rows, rows), keys.k, width, t + TILE_ROWS, width, d_k, width);
        product_rows<Into::add>(transposed(d.kk + corner, rows), keys.k + t * width, width, left, width, d_k, width);
    }
    const int64_t at = place.at(n, n.key_heads, head) * DK;
    store_rows(d.q, place.count, DK, grads.q + at, stride);
    store_rows(d.k, place.count, DK, grads.k + at, stride);
}

void backward_task(const DeltaRuleSizes& n, const DeltaRuleTensors<const float>& in, int64_t task, const float* states,
                   const float* d_out, const DeltaRuleTensors<float>& grads) {
    const int64_t batch = task / n.key_heads, key_head = task % n.key_heads, group = n.group(), size = n.state_size();
    const int64_t DV = n.value_dim, HV = n.value_heads, key_size = CHUNK * pad(n.key_dim);
    Scratch scratch(KeyChunk::size(n) + ValueChunk::size(n) + Gradients::size(n) + group * size);
    KeyChunk keys(n, scratch);
    ValueChunk chunk(n, scratch);
    Gradients d(n, scratch);
    float* d_states = scratch.take(group * size);
    std::fill_n(d_states, group * size, 0.0f);
    for (int64_t index = n.num_chunks() - 1; index >= 0; --index) {
        const ChunkPlace place(n, batch, index);
        keys.load(n, in, place, key_head);
        for (float* part : {d.q, d.k}) std::fill_n(part, key_size, 0.0f);
        for (float* part : {d.qk, d.kk}) std::fill_n(part, CHUNK * CHUNK, 0.0f);
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = key_head * group + g, at = place.at(n, HV, head);
            const float* state = states + ((batch * HV + head) * n.num_chunks() + index) * size;
            chunk.load(n, in, place, head, keys, state);
            load_rows(d_out + at * DV, HV * DV, place.count, DV, place.rows, d.out);
            std::fill_n(d.total, CHUNK, 0.0);
            backward_values(n, place, head, keys, chunk, d_states + g * size, d, grads);
            backward_pairs(n, place, head, keys, chunk, d, grads);
            backward_state(n, place.rows, keys, chunk, state, d_states + g * size, d);
            double sum = 0;
            for (int64_t t = place.rows - 1; t >= 0; --t) {
                sum += d.total[t];
                if (t < place.count) grads.log_alpha[at + t * HV] = float(sum);
            }
        }
        backward_keys(n, place, key_head, keys, d, grads);
    }
}

}  // namespace

// All tensors are contiguous. out [B, T, HV, DV]; states and memory may be null.
extern "C" void delta_rule_float32(const DeltaRuleSizes* sizes, const DeltaRuleTensors<const float>* in, float* out,
                                   float* states, float* memory, int num_threads) {
    share(sizes->batch * sizes->key_heads, num_threads,
          [=](int64_t task) { forward_task(*sizes, *in, task, out, states, memory); });
}

extern "C" void delta_rule_backward_float32(const DeltaRuleSizes* sizes, const DeltaRuleTensors<const float>* in,
                                            const float* states, const float* d_out,
                                            const DeltaRuleTensors<float>* grads, int num_threads) {
    share(sizes->batch * sizes->key_heads, num_threads,
          [=](int64_t task) { backward_task(*sizes, *in, task, states, d_out, *grads); });
}
