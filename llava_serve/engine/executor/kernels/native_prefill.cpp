// Attention of several tokens of one sequence on a CPU: `prefill_attention` in twins.py.
//
// The compiler's command line gives QUERY and STORED (types of native_numbers.h), HEAD_DIM and GROUP (query heads per
// kv head).

#include "native_products.h"

constexpr int TOKENS = 16;  // whose scores are computed together
constexpr int PARTS = (HEAD_DIM + BLOCK - 1) / BLOCK;  // blocks of a head's numbers

static inline QUERY as_query(QUERY number, float) { return number; }

static inline QUERY as_query(float8 number, float scale) {
    QUERY narrowed;
    narrow(widen(number) * scale, &narrowed);
    return narrowed;
}

// Keys as weights of scores: outputs are keys, inputs the numbers of a head. `count` is padded to whole blocks by 0.
static void pack_keys(const STORED* keys, int64_t count, float scale, QUERY* out) {
    for (int64_t block = 0; block < count; block += BLOCK, out += BLOCK * HEAD_DIM) {
        const int there = std::min<int64_t>(BLOCK, count - block);
        if (there < BLOCK) std::memset(out, 0, BLOCK * HEAD_DIM * sizeof(QUERY));
        for (int key = 0; key < there; key++, keys += HEAD_DIM)
            for (int at = 0; at < HEAD_DIM; at += DEPTH)
                for (int one = 0; one < DEPTH; one++)
                    out[at * BLOCK + key * DEPTH + one] = as_query(keys[at + one], scale);
    }
}

// Values as weights of results: outputs are the numbers of a head, inputs the keys, `padded` in number.
static void pack_values(const STORED* values, int64_t count, int64_t padded, float scale, QUERY* out) {
    for (int64_t key = 0; key < padded; key++, values += HEAD_DIM)
        for (int begin = 0; begin < HEAD_DIM; begin += BLOCK) {
            QUERY* part = out + begin * padded + key / DEPTH * DEPTH * BLOCK + key % DEPTH;
            const int width = std::min(BLOCK, HEAD_DIM - begin);
            for (int at = 0; at < width; at++) part[at * DEPTH] = key < count ? as_query(values[begin + at], scale) : QUERY{};
        }
}

// query [tokens, heads, HEAD_DIM] with strides; keys and values [kv_heads, count, HEAD_DIM], kv heads kv_head_stride
// numbers apart; out [tokens, heads, HEAD_DIM]. The tokens are the last of the keys; without `causal`, each attends to
// all. slopes [heads] and scales [2, kv_heads] may be null; a window of 0 is all keys.
extern "C" void prefill_attention(
    const QUERY* query, int64_t by_token, int64_t by_head, const STORED* keys, const STORED* values,
    int64_t kv_head_stride, const float* slopes, const float* scales, QUERY* out, int64_t tokens, int64_t count,
    int64_t kv_heads, float scaling, int64_t window, int causal, int threads
) {
    const int64_t heads = kv_heads * GROUP, skipped = window ? std::max<int64_t>(0, count - tokens + 1 - window) : 0;
    keys += skipped * HEAD_DIM, values += skipped * HEAD_DIM, count -= skipped;
    const int64_t padded = (count + BLOCK - 1) / BLOCK * BLOCK, start = count - tokens;
    const int64_t parts = std::min((threads + kv_heads - 1) / kv_heads, (tokens + TOKENS - 1) / TOKENS);
#pragma omp parallel num_threads(threads)
    {
        const auto packed_keys = array<QUERY>(padded * HEAD_DIM), packed_values = array<QUERY>(padded * PARTS * BLOCK);
        const auto scores = array<float>(TOKENS * padded);
        const auto shares = array<Input>(TOKENS * padded), inputs = array<Input>(TOKENS * HEAD_DIM);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            for (int64_t part = 0; part < parts; part++) {
                const int64_t head_of_pool = kv_head * kv_head_stride;
                pack_keys(keys + head_of_pool, count, scales ? scales[kv_head] : 1, packed_keys.get());
                const float of_values = scales ? scales[kv_heads + kv_head] : 1;
                pack_values(values + head_of_pool, count, padded, of_values, packed_values.get());
                for (int64_t head = kv_head * GROUP; head < (kv_head + 1) * GROUP; head++) {
                    for (int64_t token = part * TOKENS; token < tokens; token += parts * TOKENS) {
                        const int64_t rows = std::min<int64_t>(TOKENS, tokens - token), last = start + token + rows;
                        const int64_t end = ((causal ? last : count) + LANES - 1) / LANES * LANES;
                        for (int64_t row = 0; row < rows; row++)
                            for (int at = 0; at < HEAD_DIM; at++) {
                                const float number = widen(query[(token + row) * by_token + head * by_head + at]);
                                narrow(number, inputs.get() + row * HEAD_DIM + at);
                            }
                        multiply(
                            {packed_keys.get(), nullptr, HEAD_DIM, BLOCK}, inputs.get(), 0, end, rows,
                            [&](int64_t row, int64_t key, float sum) { scores[row * padded + key] = sum * scaling; }
                        );
                        float totals[TOKENS];
                        for (int64_t row = 0; row < rows; row++) {
                            float* own = scores.get() + row * padded;
                            const int64_t position = start + token + row, to = causal ? position + 1 : count;
                            const int64_t from = window ? std::max<int64_t>(0, position + 1 - window) : 0;
                            float highest = -INFINITY, sum = 0;
                            if (slopes)
                                for (int64_t at = from; at < to; at++) own[at] += slopes[head] * (at - position);
#pragma omp simd reduction(max : highest)
                            for (int64_t at = from; at < to; at++) highest = own[at] > highest ? own[at] : highest;
                            Input* share = shares.get() + row * end;
                            for (int64_t at = 0; at < from; at++) narrow(0.0f, share + at);
#pragma omp simd reduction(+ : sum)
                            for (int64_t at = from; at < to; at++) {
                                own[at] = exp_negative(own[at] - highest);
                                sum += own[at];
                            }
#pragma omp simd
                            for (int64_t at = from; at < to; at++) narrow(own[at], share + at);
                            for (int64_t at = to; at < end; at++) narrow(0.0f, share + at);
                            totals[row] = 1 / sum;
                        }
                        for (int64_t first = 0; first < HEAD_DIM; first += BLOCK)
                            multiply(
                                {packed_values.get() + first * padded, nullptr, end, BLOCK}, shares.get(), 0,
                                std::min<int64_t>(BLOCK, HEAD_DIM - first), rows,
                                [&](int64_t row, int64_t at, float sum) {
                                    QUERY* result = out + ((token + row) * heads + head) * HEAD_DIM + first;
                                    narrow(sum * totals[row], result + at);
                                }
                            );
                    }
                }
            }
        }
    }
}
