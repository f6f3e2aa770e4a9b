// A step of the Llama family on a CPU: all layers in one call, for a few tokens.
//
// Such a step reads all weights once, and little else: so they are read as fast as memory gives them, from oneDNN's
// layout, which prompts need. Numbers are rounded where transformers rounds them.

#include <omp.h>

#include "native_attention.h"
#include "native_products.h"

struct Layer {
    const QUERY* input_norm;
    Linear qkv, output;
    const QUERY* mlp_norm;
    Linear gate_up, down;
    int64_t window;  // 0 is all keys
};

struct Model {
    const Layer* layers;
    int64_t num_layers, hidden, intermediate, kv_heads;
    const QUERY* norm;
    float eps;
    float scaling;  // of scores
};

// Rows are tokens. The pool is [layers, 2, kv_heads, positions, HEAD_DIM]. table [rows, table_width] are the pages of
// each token's sequence, and used [rows] the keys that it attends to, of which the last one is its own.
struct Step {
    const QUERY* embeddings;  // [rows, hidden]
    const QUERY* cosines;  // [rows, HEAD_DIM], both halves equal
    const QUERY* sines;
    QUERY* out;
    int64_t rows;
    STORED* pool;
    int64_t positions;
    const int32_t* table;
    int64_t table_width;
    const int32_t* used;
    int64_t threads;
};

template <class Number>
static void normalize(const float* residual, const QUERY* weight, float eps, int64_t hidden, int64_t rows, Number* out) {
    for (int64_t row = 0; row < rows; row++, residual += hidden, out += hidden) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t at = 0; at < hidden; at++) squares += residual[at] * residual[at];
        const float factor = 1 / std::sqrt(squares / hidden + eps);
#pragma omp simd
        for (int64_t at = 0; at < hidden; at++)
            narrow(rounded(widen(weight[at]) * rounded(residual[at] * factor)), out + at);
    }
}

static void rotate(float* head, const QUERY* cosines, const QUERY* sines) {
    constexpr int half = HEAD_DIM / 2;
    for (int at = 0; at < half; at++) {
        const float first = head[at], second = head[at + half], cosine = widen(cosines[at]), sine = widen(sines[at]);
        head[at] = rounded(rounded(first * cosine) - rounded(second * sine));
        head[at + half] = rounded(rounded(second * cosine) + rounded(first * sine));
    }
}

static inline float silu(float x) {
    const float power = exp_negative(-std::fabs(x));
    return (x < 0 ? x * power : x) / (1 + power);
}

extern "C" void small_step(const Model* given, const Step* of) {
    const Model model = *given;
    const Step step = *of;
    const int64_t rows = step.rows, hidden = model.hidden, kv_heads = model.kv_heads, heads = kv_heads * GROUP;
    const int64_t width = (heads + 2 * kv_heads) * HEAD_DIM, head_stride = step.positions * HEAD_DIM;
    const int64_t most = *std::max_element(step.used, step.used + rows);
    const auto residual = array<float>(rows * hidden), qkv = array<float>(rows * width);
    const auto attended = array<Input>(rows * heads * HEAD_DIM), activated = array<Input>(rows * model.intermediate);
    for (int64_t at = 0; at < rows * hidden; at++) residual[at] = widen(step.embeddings[at]);
    const auto add = [&](int64_t row, int64_t output, float sum) {
        float& number = residual[row * hidden + output];
        number = rounded(number + rounded(sum));
    };
#pragma omp parallel num_threads(step.threads)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const auto normed = array<Input>(rows * hidden);  // each thread computes it for itself: no barrier behind it
        const auto gates = array<float>(rows * LANES * (model.intermediate / LANES / threads + 1));
        const auto scores = array<float>(GROUP * most);
        const auto share = [&](int64_t outputs, int64_t of) { return outputs / LANES * of / threads * LANES; };
        for (int64_t index = 0; index < model.num_layers; index++) {
            const Layer& layer = model.layers[index];
            STORED* keys = step.pool + 2 * index * kv_heads * head_stride;
            STORED* values = keys + kv_heads * head_stride;
            normalize(residual.get(), layer.input_norm, model.eps, hidden, rows, normed.get());
            multiply(
                layer.qkv, normed.get(), share(width, thread), share(width, thread + 1), rows,
                [&](int64_t row, int64_t output, float sum) { qkv[row * width + output] = rounded(sum); }
            );
            const auto pages = [&](int64_t row, int64_t kv_head) {
                const int64_t count = step.used[row], window = layer.window;
                const int64_t first = window && count > window ? count - window : 0;
                return Pages{
                    keys + kv_head * head_stride, values + kv_head * head_stride, step.table + row * step.table_width,
                    count, first
                };
            };
#pragma omp barrier
#pragma omp for collapse(2) schedule(static)
            for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
                for (int64_t row = 0; row < rows; row++) {
                    const Pages stored = pages(row, kv_head);
                    float* key = qkv.get() + row * width + (heads + kv_head) * HEAD_DIM;
                    const float* value = key + kv_heads * HEAD_DIM;
                    rotate(key, step.cosines + row * HEAD_DIM, step.sines + row * HEAD_DIM);
                    const int64_t slot = stored.slot(stored.count - 1);
                    for (int at = 0; at < HEAD_DIM; at++) {
                        narrow(key[at], stored.keys + slot + at);
                        narrow(value[at], stored.values + slot + at);
                    }
                }
            }
            // The keys of all are there: a token attends to those of its sequence's earlier ones in this step.
#pragma omp for collapse(2) schedule(static)
            for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
                for (int64_t row = 0; row < rows; row++) {
                    const Pages stored = pages(row, kv_head);
                    float* query = qkv.get() + row * width + kv_head * GROUP * HEAD_DIM;
                    const QUERY* cosines = step.cosines + row * HEAD_DIM;
                    const QUERY* sines = step.sines + row * HEAD_DIM;
                    float queries[GROUP][HEAD_DIM], results[GROUP][HEAD_DIM];
                    for (int member = 0; member < GROUP; member++) {
                        rotate(query + member * HEAD_DIM, cosines, sines);
                        for (int at = 0; at < HEAD_DIM; at++)
                            queries[member][at] = query[member * HEAD_DIM + at] * model.scaling;
                    }
                    attend(queries, stored, nullptr, 1.0f, scores.get(), most, results);
                    Input* result = attended.get() + (row * heads + kv_head * GROUP) * HEAD_DIM;
                    for (int member = 0; member < GROUP; member++, result += HEAD_DIM)
                        for (int at = 0; at < HEAD_DIM; at++) narrow(rounded(results[member][at]), result + at);
                }
            }
            multiply(layer.output, attended.get(), share(hidden, thread), share(hidden, thread + 1), rows, add);
#pragma omp barrier
            normalize(residual.get(), layer.mlp_norm, model.eps, hidden, rows, normed.get());
            const int64_t begin = share(model.intermediate, thread), end = share(model.intermediate, thread + 1);
            multiply(
                layer.gate_up, normed.get(), begin, end, rows,
                [&](int64_t row, int64_t output, float sum) {
                    gates[row * (end - begin) + output - begin] = rounded(silu(rounded(sum)));
                }
            );
            multiply(
                layer.gate_up, normed.get(), model.intermediate + begin, model.intermediate + end, rows,
                [&](int64_t row, int64_t output, float sum) {
                    const int64_t at = output - model.intermediate;
                    const float gate = gates[row * (end - begin) + at - begin];
                    narrow(rounded(gate * rounded(sum)), activated.get() + row * model.intermediate + at);
                }
            );
#pragma omp barrier
            multiply(layer.down, activated.get(), share(hidden, thread), share(hidden, thread + 1), rows, add);
#pragma omp barrier
        }
    }
    normalize(residual.get(), model.norm, model.eps, hidden, rows, step.out);
}
