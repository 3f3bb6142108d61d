// Embedding, decoder layers over the cache and final norm for few rows, in one call: Python and its lock stay out of the
// step. Requests may bring different numbers of rows, guessed or known. The contract stands in kernels/cpu/decoder.py; the layers
// are those of models/qwen3_5 and models/qwen3_5_moe, which are the oracle.
//
// Activations are float or double whatever the weights are. Each row is summed in an order that no other row changes.

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "attention.h"
#include "gated_delta_net.h"
#include "matrix.h"
#include "random.h"
#include "rms_norm.h"

namespace {

using namespace tandem;

struct Sizes {
    int64_t hidden, heads, kv_heads, head_dim, rotary_dim;
    int64_t key_heads, value_heads, key_dim, value_dim, taps;
    int64_t intermediate, experts, experts_per_token, expert_size, shared_size;
};

template <typename W, typename F>
struct Layer {
    const F *input_norm, *post_norm, *q_norm, *k_norm, *conv, *a_log, *dt_bias, *delta_norm;
    Matrix<W> in_proj, out_proj, gate_up, down, router, shared_gate_up, shared_down, shared_gate;
    int64_t cache_layer;
};

// What stands before the layers: the embedding of token_ids, and for a draft head fc over [norm of that, norm of hidden].
template <typename W, typename F>
struct Front {
    Matrix<W> embedding, fc;
    const F *embedding_norm, *hidden_norm;
};

struct Batch {
    const int64_t *token_ids, *offsets, *row_ids, *start_lens, *accept_lens, *is_known, *positions, *page_table;
    int64_t requests, rows, table_width;
};

template <typename W, typename F>
struct Memory {
    W* kv;
    F *conv_ring, *state, *ring_k, *ring_u, *ring_alpha;
    W* history;            // [R, history_len, H] hidden states by position, or null
    int64_t* history_ids;  // [R, history_len]
    int64_t num_rows, pages, page_size, conv_ring_len, ring_len, history_len;
};

// Neighbouring tokens of one request, few enough that a prompt is work for more threads than there are key-value heads.
struct Piece {
    int64_t request, first, tokens;
};
constexpr int64_t PIECE_TOKENS = 16;

template <typename W, typename F>
struct Decoder {
    const Team& team;
    const Sizes& n;
    const Batch& batch;
    const Memory<W, F>& memory;
    const F* frequencies;
    const F eps;
    const int64_t N;
    Buffer<F> x;  // [N, H], the residual stream
    Buffer<F> normed, projected, q, mixed, added, wide, narrow_rows, gathered, expert_out, router_logits;
    Buffer<F> history;                    // [requests, taps - 1, C], inputs of one layer's convolution
    std::vector<int64_t> request_of;                 // [N]
    std::vector<Piece> pieces;
    std::vector<int64_t> chosen, slot_of, first_of;  // experts of each row [N, k]; their places; first place [E + 1]
    std::vector<F> shares;                           // [N, k]

    Decoder(const Team& team, const Sizes& n, const Batch& batch, const Memory<W, F>& memory, const F* frequencies,
            F eps)
        : team(team), n(n), batch(batch), memory(memory), frequencies(frequencies), eps(eps), N(batch.rows) {
        const int64_t value_size = n.value_heads * n.value_dim, key_size = n.key_heads * n.key_dim;
        const int64_t mixed_size = std::max(n.heads * n.head_dim, value_size);
        const int64_t in_size = std::max(2 * (n.heads + n.kv_heads) * n.head_dim, 2 * (key_size + value_size + n.value_heads));
        const int64_t k = n.experts_per_token, width = std::max({n.intermediate, n.shared_size, k * n.expert_size});
        x = make_buffer<F>(N * n.hidden), normed = make_buffer<F>(N * n.hidden), added = make_buffer<F>(N * n.hidden);
        projected = make_buffer<F>(N * in_size), q = make_buffer<F>(N * n.heads * n.head_dim), mixed = make_buffer<F>(N * mixed_size);
        wide = make_buffer<F>(N * 2 * width), narrow_rows = make_buffer<F>(N * width);
        gathered = make_buffer<F>(N * k * n.hidden), expert_out = make_buffer<F>(N * k * n.hidden);
        router_logits = make_buffer<F>(N * n.experts);
        history = make_buffer<F>(batch.requests * (n.taps - 1) * (2 * key_size + value_size));
        chosen.resize(N * k), slot_of.resize(N * k), shares.resize(N * k), first_of.resize(n.experts + 1);
        request_of.resize(N);
        for (int64_t b = 0; b < batch.requests; ++b) {
            const int64_t end = batch.offsets[b + 1];
            std::fill(request_of.begin() + batch.offsets[b], request_of.begin() + end, b);
            for (int64_t first = batch.offsets[b]; first < end; first += PIECE_TOKENS)
                pieces.push_back({b, first, std::min(PIECE_TOKENS, end - first)});
        }
    }

    void enter(const Front<W, F>& front, const F* hidden) {
        const int64_t H = n.hidden;
        for (int64_t r = 0; r < N; ++r) front.embedding.read(batch.token_ids[r], x.get() + r * H, H);
        if (front.fc.weights == nullptr) return;
        const auto pairs = make_buffer<F>(N * 2 * H);
        for (int64_t r = 0; r < N; ++r) {
            rms_norm_row(x.get() + r * H, front.embedding_norm, pairs.get() + r * 2 * H, H, eps);
            rms_norm_row(hidden + r * H, front.hidden_norm, pairs.get() + (2 * r + 1) * H, H, eps);
        }
        product(pairs.get(), front.fc, x.get(), 2 * H, H);
    }

    // x += added, unless this is the first layer; normed = norm(x).
    void add_and_norm(const F* scale, F* out, bool adds) {
        const int64_t H = n.hidden;
        team.each(N, [&](int64_t r) {
            F* row = x.get() + r * H;
            if (adds) {
#pragma omp simd
                for (int64_t i = 0; i < H; ++i) row[i] += added[r * H + i];
            }
            rms_norm_row(row, scale, out + r * H, H, eps);
        });
    }

    void product(const F* rows, const Matrix<W>& weight, F* out, int64_t K, int64_t columns, int64_t first = 0) {
        multiply(team, rows, weight, out, N, K, columns, first);
    }

    void rotate(F* head, int64_t position) const {
        const int64_t half = n.rotary_dim / 2;
        for (int64_t i = 0; i < half; ++i) {
            const F angle = F(position) * frequencies[i], c = std::cos(angle), s = std::sin(angle);
            const F first = head[i], second = head[half + i];
            head[i] = first * c - second * s;
            head[half + i] = second * c + first * s;
        }
    }

    // Norm and rotate one head of q.
    void prepare_query(const Layer<W, F>& layer, const F* row, int64_t r, int64_t head) {
        F* out = q.get() + (r * n.heads + head) * n.head_dim;
        rms_norm_row(row + head * 2 * n.head_dim, layer.q_norm, out, n.head_dim, eps);
        rotate(out, batch.positions[r]);
    }

    // Norm and rotate one head of k, and store it with its v: row is all keys of a token, then all values.
    void store_head(const Layer<W, F>& layer, W* kv, const F* row, int64_t r, int64_t head) {
        const int64_t D = n.head_dim, position = batch.positions[r];
        F key[1024];  // the caller has checked head_dim
        rms_norm_row(row + head * D, layer.k_norm, key, D, eps);
        rotate(key, position);
        const F* value = row + (n.kv_heads + head) * D;
        const int64_t page = batch.page_table[request_of[r] * batch.table_width + position / memory.page_size];
        const int64_t slot = page * memory.page_size + position % memory.page_size;
        W* stored_key = kv + (slot * n.kv_heads + head) * D;
        W* stored_value = stored_key + memory.pages * memory.page_size * n.kv_heads * D;
        for (int64_t i = 0; i < D; ++i) {
            narrow(key[i], stored_key[i]);
            narrow(value[i], stored_value[i]);
        }
    }

    W* layer_kv(const Layer<W, F>& layer) const {
        return memory.kv + layer.cache_layer * 2 * memory.pages * memory.page_size * n.kv_heads * n.head_dim;
    }

    // An attention layer's keys and values of all rows, and nothing else of it.
    void store_keys(const Layer<W, F>& layer) {
        const int64_t key_columns = 2 * n.kv_heads * n.head_dim, query_columns = 2 * n.heads * n.head_dim;
        W* kv = layer_kv(layer);
        add_and_norm(layer.input_norm, normed.get(), false);
        product(normed.get(), layer.in_proj, projected.get(), n.hidden, key_columns, query_columns);
        team.each(N * n.kv_heads, [&](int64_t task) {
            const int64_t r = task / n.kv_heads;
            store_head(layer, kv, projected.get() + r * key_columns, r, task % n.kv_heads);
        });
    }

    void attend(const Layer<W, F>& layer) {
        const int64_t D = n.head_dim, all_heads = n.heads + n.kv_heads, stride = 2 * all_heads * D;
        W* kv = layer_kv(layer);
        team.each(N * all_heads, [&](int64_t task) {
            const int64_t r = task / all_heads, head = task % all_heads;
            const F* row = projected.get() + r * stride;
            if (head < n.heads)
                prepare_query(layer, row, r, head);
            else
                store_head(layer, kv, row + 2 * n.heads * D, r, head - n.heads);
        });
        const AttentionSizes sizes{n.heads, n.kv_heads, D, memory.pages, memory.page_size, batch.table_width};
        team.each(pieces.size() * n.kv_heads, [&](int64_t task) {
            const Piece& piece = pieces[task / n.kv_heads];
            attend_head(sizes, q.get(), kv, batch.page_table, batch.positions, piece.request, piece.first, piece.tokens,
                        task % n.kv_heads, mixed.get());
        });
        const int64_t size = n.heads * D;
        team.each(N * n.heads, [&](int64_t task) {
            const int64_t r = task / n.heads, head = task % n.heads;
            const F* gate = projected.get() + r * stride + (2 * head + 1) * D;
            F* out = mixed.get() + r * size + head * D;
#pragma omp simd
            for (int64_t i = 0; i < D; ++i) out[i] *= sigmoid(gate[i]);
        });
    }

    void mix_deltas(const Layer<W, F>& layer) {
        const DeltaNetSizes sizes{n.key_heads, n.value_heads, n.key_dim, n.value_dim, n.taps, memory.conv_ring_len,
                                  memory.ring_len};
        const DeltaNetWeights<F> weights{layer.conv, layer.a_log, layer.dt_bias, layer.delta_norm, eps};
        const int64_t first_row = layer.cache_layer * memory.num_rows, HV = n.value_heads;
        const int64_t channels = 2 * n.key_heads * n.key_dim + HV * n.value_dim;
        const int64_t ring_start = first_row * memory.ring_len;
        const DeltaNetMemory<F> mine{memory.conv_ring + first_row * memory.conv_ring_len * channels,
                                     memory.state + first_row * HV * n.key_dim * n.value_dim,
                                     memory.ring_k + ring_start * n.key_heads * n.key_dim,
                                     memory.ring_u + ring_start * HV * n.value_dim, memory.ring_alpha + ring_start * HV};
        // Heads share channels, and what one of them writes to the ring another may still have to read.
        const int64_t taps = n.taps - 1, ring_mask = memory.conv_ring_len - 1;
        team.each(batch.requests * taps, [&](int64_t task) {
            const int64_t b = task / taps, slot = (batch.start_lens[b] - taps + task % taps) & ring_mask;
            std::copy_n(mine.conv_ring + (batch.row_ids[b] * memory.conv_ring_len + slot) * channels, channels,
                        history.get() + task * channels);
        });
        team.each(batch.requests * HV, [&](int64_t task) {
            const int64_t b = task / HV, first = batch.offsets[b];
            const DeltaNetPlace<F> place{batch.row_ids[b],
                                         batch.start_lens[b],
                                         batch.accept_lens[b],
                                         first,
                                         batch.offsets[b + 1] - first,
                                         history.get() + b * (n.taps - 1) * channels,
                                         batch.is_known[b] != 0};
            verify_head(sizes, weights, mine, projected.get(), place, task % HV, mixed.get());
        });
    }

    // silu(gate) · up of rows [count, 2 · size] -> out [count, size].
    void activate(const F* rows, F* out, int64_t count, int64_t size) const {
        team.each(count, [&](int64_t r) {
            const F *gate = rows + r * 2 * size, *up = gate + size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) out[r * size + i] = gate[i] * sigmoid(gate[i]) * up[i];
        });
    }

    void feed_forward(const Matrix<W>& gate_up, const Matrix<W>& down, int64_t size) {
        product(normed.get(), gate_up, wide.get(), n.hidden, 2 * size);
        activate(wide.get(), narrow_rows.get(), N, size);
        product(narrow_rows.get(), down, added.get(), size, n.hidden);
    }

    // The best experts of one row in order of their ids, with the softmax over their logits. Of equals the first.
    void choose(int64_t r) {
        const int64_t k = n.experts_per_token;
        const F* logits = router_logits.get() + r * n.experts;
        std::vector<int64_t> order(n.experts);
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
            return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
        });
        const F best = logits[order[0]];
        std::sort(order.begin(), order.begin() + k);
        F sum = 0;
        for (int64_t i = 0; i < k; ++i) sum += shares[r * k + i] = std::exp(logits[order[i]] - best);
        for (int64_t i = 0; i < k; ++i) {
            shares[r * k + i] /= sum;
            chosen[r * k + i] = order[i];
        }
    }

    // Places of all (row, choice) side by side, those of one expert together: first_of and slot_of.
    void group_by_expert() {
        std::fill(first_of.begin(), first_of.end(), 0);
        for (const int64_t expert : chosen) ++first_of[expert + 1];
        std::partial_sum(first_of.begin(), first_of.end(), first_of.begin());
        std::vector<int64_t> next(first_of.begin(), first_of.end());
        for (size_t i = 0; i < chosen.size(); ++i) slot_of[i] = next[chosen[i]]++;
    }

    // The rows of one expert.
    void multiply_expert(int64_t e, const F* rows, const Matrix<W>& weights, F* out, int64_t K, int64_t columns) const {
        const int64_t first = first_of[e], count = first_of[e + 1] - first, output = weights.start_of(e, columns);
        if (count > 0) multiply(team, rows + first * K, weights, out + first * columns, count, K, columns, output);
    }

    void run_experts(const Layer<W, F>& layer) {
        const int64_t H = n.hidden, k = n.experts_per_token, I = n.expert_size;
        product(normed.get(), layer.router, router_logits.get(), H, n.experts);
        team.each(N, [&](int64_t r) { choose(r); });
        group_by_expert();
        team.each(N * k, [&](int64_t i) { std::copy_n(normed.get() + i / k * H, H, gathered.get() + slot_of[i] * H); });
        for (int64_t e = 0; e < n.experts; ++e)
            multiply_expert(e, gathered.get(), layer.gate_up, wide.get(), H, 2 * I);
        activate(wide.get(), narrow_rows.get(), N * k, I);
        for (int64_t e = 0; e < n.experts; ++e)
            multiply_expert(e, narrow_rows.get(), layer.down, expert_out.get(), I, H);
        product(normed.get(), layer.shared_gate, router_logits.get(), H, 1);
        feed_forward(layer.shared_gate_up, layer.shared_down, n.shared_size);
        team.each(N, [&](int64_t r) {
            F* row = added.get() + r * H;
            const F gate = sigmoid(router_logits[r]);
            for (int64_t i = 0; i < H; ++i) row[i] *= gate;
            for (int64_t j = r * k; j < (r + 1) * k; ++j) {
                const F* part = expert_out.get() + slot_of[j] * H;
#pragma omp simd
                for (int64_t i = 0; i < H; ++i) row[i] += shares[j] * part[i];
            }
        });
    }

    void run(const Layer<W, F>* layers, int64_t num_layers, const F* final_norm, F* out) {
        for (int64_t index = 0; index < num_layers; ++index) {
            const Layer<W, F>& layer = layers[index];
            const bool is_attention = layer.q_norm != nullptr;
            const int64_t value_size = n.value_heads * n.value_dim;
            const int64_t attention_in = 2 * (n.heads + n.kv_heads) * n.head_dim;
            const int64_t delta_in = 2 * (n.key_heads * n.key_dim + value_size + n.value_heads);
            add_and_norm(layer.input_norm, normed.get(), index > 0);
            product(normed.get(), layer.in_proj, projected.get(), n.hidden, is_attention ? attention_in : delta_in);
            if (is_attention)
                attend(layer);
            else
                mix_deltas(layer);
            product(mixed.get(), layer.out_proj, added.get(), is_attention ? n.heads * n.head_dim : value_size, n.hidden);
            add_and_norm(layer.post_norm, normed.get(), true);
            if (layer.router.weights != nullptr)
                run_experts(layer);
            else
                feed_forward(layer.gate_up, layer.down, n.intermediate);
        }
        add_and_norm(final_norm, out, num_layers > 0);
    }

    // Keep what a draft head will want to know of the guessed rows.
    void record(const F* out) const {
        const int64_t H = n.hidden;
        for (int64_t r = 0; r < N; ++r) {
            if (batch.is_known[request_of[r]] != 0) continue;
            const int64_t row = batch.row_ids[request_of[r]];
            const int64_t slot = row * memory.history_len + batch.positions[r] % memory.history_len;
            memory.history_ids[slot] = batch.token_ids[r];
            for (int64_t i = 0; i < H; ++i) narrow(out[r * H + i], memory.history[slot * H + i]);
        }
    }
};

// The chain of a draft head with one layer. Of the pass's rows it needs keys and values, and its output at the newest row
// of each request that wants a draft; then it runs on its own guesses, one row a request.
template <typename W, typename F>
struct Chain {
    const F* temperatures;        // [B]; 0: the largest logit is the guess
    const int64_t* seeds;         // [B]
    const int64_t *last, *alive;  // [B] index of each request's newest row; [depth] requests that want so many drafts
    Matrix<W> head;               // [V, H]
    int64_t first_ids, tail, vocab;  // guesses are of the tokens below first_ids and those from `tail` on
    int64_t depth;
    int64_t* drafts;  // [B, depth]; what a request does not want is left as it is
};

template <typename W, typename F>
void propose(const Team& team, const Sizes& n, const Front<W, F>& front, const Layer<W, F>* layer, const F* final_norm,
             const F* frequencies, F eps, const Batch& batch, const Memory<W, F>& memory, Decoder<W, F>& pass,
             const Chain<W, F>& chain) {
    const int64_t H = n.hidden;
    pass.store_keys(*layer);
    const int64_t tail_ids = chain.vocab - chain.tail;
    const auto hidden = make_buffer<F>(batch.requests * H);
    const auto logits = make_buffer<F>(batch.requests * chain.first_ids), tail_logits = make_buffer<F>(batch.requests * tail_ids);
    std::vector<int64_t> offsets(batch.requests + 1), positions(batch.requests), newest(batch.requests);
    std::iota(offsets.begin(), offsets.end(), 0);
    for (int64_t b = 0; b < batch.requests; ++b) positions[b] = batch.positions[chain.last[b]] - 1;
    for (int64_t step = 0; step < chain.depth; ++step) {
        const int64_t alive = chain.alive[step];
        for (int64_t b = 0; b < alive; ++b) ++positions[b];
        Batch ahead = batch;
        ahead.token_ids = newest.data(), ahead.offsets = offsets.data(), ahead.positions = positions.data();
        ahead.requests = ahead.rows = alive;
        Decoder<W, F> decoder(team, n, ahead, memory, frequencies, eps);
        if (step == 0)
            for (int64_t b = 0; b < alive; ++b) std::copy_n(pass.x.get() + chain.last[b] * H, H, decoder.x.get() + b * H);
        else
            decoder.enter(front, hidden.get());
        decoder.run(layer, 1, final_norm, hidden.get());
        multiply(team, hidden.get(), chain.head, logits.get(), alive, H, chain.first_ids);
        multiply(team, hidden.get(), chain.head, tail_logits.get(), alive, H, tail_ids, chain.tail);
        team.each(alive, [&](int64_t b) {
            Draw<F> draw{chain.temperatures[b], row_key(chain.seeds[b], positions[b] + 2)};  // the guess's own position
            draw.take(logits.get() + b * chain.first_ids, chain.first_ids, 0);
            draw.take(tail_logits.get() + b * tail_ids, tail_ids, chain.tail);
            newest[b] = chain.drafts[b * chain.depth + step] = draw.token_id;
        });
    }
}

template <typename W, typename F>
void decode(const Sizes& n, const Front<W, F>& front, const Layer<W, F>* layers, int64_t num_layers,
            const F* final_norm, const F* frequencies, F eps, const Batch& batch, const Memory<W, F>& memory,
            const F* hidden, F* out, const Chain<W, F>* chain, int num_threads) {
    const Team team(num_threads);
    Decoder<W, F> decoder(team, n, batch, memory, frequencies, eps);
    decoder.enter(front, hidden);
    if (chain != nullptr)
        return propose(team, n, front, layers, final_norm, frequencies, eps, batch, memory, decoder, *chain);
    decoder.run(layers, num_layers, final_norm, out);
    if (memory.history != nullptr) decoder.record(out);
}

}  // namespace

// hidden [N, H] is read by a draft head only; out [N, H] is the stack's output after the final norm, which a chain (may
// be null) leaves out.
extern "C" void decoder_bfloat16(const Sizes* n, const Front<bf16, float>* front, const Layer<bf16, float>* layers,
                        int64_t num_layers, const float* final_norm, const float* frequencies, double eps,
                        const Batch* batch, const Memory<bf16, float>* memory, const float* hidden, float* out,
                        const Chain<bf16, float>* chain, int num_threads) {
    decode(*n, *front, layers, num_layers, final_norm, frequencies, float(eps), *batch, *memory, hidden, out, chain,
           num_threads);
}

extern "C" void decoder_float32(const Sizes* n, const Front<float, float>* front, const Layer<float, float>* layers,
                        int64_t num_layers, const float* final_norm, const float* frequencies, double eps,
                        const Batch* batch, const Memory<float, float>* memory, const float* hidden, float* out,
                        const Chain<float, float>* chain, int num_threads) {
    decode(*n, *front, layers, num_layers, final_norm, frequencies, float(eps), *batch, *memory, hidden, out, chain,
           num_threads);
}

extern "C" void decoder_float64(const Sizes* n, const Front<double, double>* front, const Layer<double, double>* layers,
                        int64_t num_layers, const double* final_norm, const double* frequencies, double eps,
                        const Batch* batch, const Memory<double, double>* memory, const double* hidden, double* out,
                        const Chain<double, double>* chain, int num_threads) {
    decode(*n, *front, layers, num_layers, final_norm, frequencies, eps, *batch, *memory, hidden, out, chain,
           num_threads);
}
