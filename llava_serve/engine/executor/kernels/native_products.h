// Products of a few rows with weights in blocks, as oneDNN has them.
//
// Blocks of outputs follow one another; a block has, for each input or, in bfloat16, for each pair of inputs, the
// weights of its outputs side by side. The compiler's command line gives QUERY: float or bfloat16.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>

#include "native_numbers.h"

constexpr int LANES = 16, ROWS = 4;  // ROWS: those whose sums are in registers together
constexpr int BLOCK = 64;  // most outputs of a block
constexpr int DEPTH = sizeof(QUERY) == 2 ? 2 : 1;  // inputs whose weights lie side by side
constexpr int FETCH = 4096 / sizeof(QUERY);  // weights that are fetched before: a processor stops where a page ends

typedef float Floats __attribute__((vector_size(4 * LANES)));

#ifdef __AVX512BF16__
typedef QUERY Input;  // of products
#else
typedef float Input;
#endif

struct Linear {  // bias may be null
    const QUERY* weight;
    const QUERY* bias;
    int64_t inputs;
    int64_t block;  // outputs of a block: a multiple of LANES
};

static inline float rounded(float number) {
    QUERY narrowed;
    narrow(number, &narrowed);
    return widen(narrowed);
}

// One weight of each output times one input of each row, or in bfloat16 a pair of both.
template <int WIDTH, int COUNT>
static inline void add_products(
    const float* weights, const float* inputs, int64_t depth, Floats (&sums)[COUNT][WIDTH]
) {
    for (int lane = 0; lane < WIDTH; lane++) {
        const Floats wide = load<Floats>(weights + LANES * lane);
        for (int row = 0; row < COUNT; row++) sums[row][lane] += wide * inputs[row * depth];
    }
}

template <int WIDTH, int COUNT>
static inline void add_products(
    const bfloat16* weights, const float* inputs, int64_t depth, Floats (&sums)[COUNT][WIDTH]
) {
    for (int lane = 0; lane < WIDTH; lane++) {
        typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
        const Words pairs = load<Words>(weights + 2 * LANES * lane);
        const Floats first = (Floats)(pairs << 16), second = (Floats)(pairs & 0xffff0000);
        for (int row = 0; row < COUNT; row++)
            sums[row][lane] += first * inputs[row * depth] + second * inputs[row * depth + 1];
    }
}

#ifdef __AVX512BF16__
template <int WIDTH, int COUNT>
static inline void add_products(
    const bfloat16* weights, const bfloat16* inputs, int64_t depth, Floats (&sums)[COUNT][WIDTH]
) {
    for (int lane = 0; lane < WIDTH; lane++) {
        const __m512bh pairs = load<__m512bh>(weights + 2 * LANES * lane);
        for (int row = 0; row < COUNT; row++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(load<int32_t>(inputs + row * depth));
            sums[row][lane] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][lane], pairs, both);
        }
    }
}
#endif

// Writes sums [COUNT, WIDTH * LANES] of outputs from `begin`, of COUNT rows of inputs.
template <int COUNT, int WIDTH>
static void sum_some(const Linear& linear, const Input* inputs, int64_t begin, bool fetch, float* out) {
    Floats sums[COUNT][WIDTH] = {};  // in registers, until all is summed
    const int64_t first = begin % linear.block, step = linear.block * DEPTH;
    const QUERY* weights = linear.weight + (begin - first) * linear.inputs + first * DEPTH;
    for (int64_t at = 0; at < linear.inputs; at += DEPTH, weights += step) {
        if (fetch)
            for (int lane = 0; lane < WIDTH; lane++) __builtin_prefetch(weights + FETCH + lane * LANES * DEPTH);
        add_products<WIDTH, COUNT>(weights, inputs + at, linear.inputs, sums);
    }
    std::memcpy(out, sums, sizeof sums);
}

template <int COUNT>
static void sum_rows(
    const Linear& linear, const Input* inputs, int64_t begin, int64_t width, bool fetch, float* out
) {
    switch (width / LANES) {
        case 4: return sum_some<COUNT, 4>(linear, inputs, begin, fetch, out);
        case 3: return sum_some<COUNT, 3>(linear, inputs, begin, fetch, out);
        case 2: return sum_some<COUNT, 2>(linear, inputs, begin, fetch, out);
        case 1: return sum_some<COUNT, 1>(linear, inputs, begin, fetch, out);
    }
}

// Calls use(row, output, sum) for outputs [begin, end) of all rows. Both are multiples of LANES.
template <class Use>
static void multiply(const Linear& linear, const Input* inputs, int64_t begin, int64_t end, int64_t rows, Use use) {
    float sums[ROWS * BLOCK];
    for (int64_t width; begin < end; begin += width) {
        width = std::min(end, (begin / linear.block + 1) * linear.block) - begin;
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t count = std::min<int64_t>(ROWS, rows - row);
            const Input* own = inputs + row * linear.inputs;
            switch (count) {
                case 4: sum_rows<4>(linear, own, begin, width, row == 0, sums); break;
                case 3: sum_rows<3>(linear, own, begin, width, row == 0, sums); break;
                case 2: sum_rows<2>(linear, own, begin, width, row == 0, sums); break;
                case 1: sum_rows<1>(linear, own, begin, width, row == 0, sums); break;
            }
            for (int64_t one = 0; one < count; one++)
                for (int64_t at = 0; at < width; at++) {
                    const float bias = linear.bias ? widen(linear.bias[begin + at]) : 0;
                    use(row + one, begin + at, sums[one * width + at] + bias);
                }
        }
    }
}
