// Numbers of the kernels in C++: half precisions as they are stored, and the exponential function. All sums are in
// float32.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

struct bfloat16 {
    uint16_t bits;
};

struct float8 {  // e4m3fn
    uint8_t bits;
};

template <class Number>
static std::unique_ptr<Number[]> array(int64_t count) {  // not set
    return std::unique_ptr<Number[]>(new Number[count]);
}

template <class Vector>
static inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline float from_bits(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t to_bits(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float widen(float number) { return number; }

static inline float widen(bfloat16 number) { return from_bits(static_cast<uint32_t>(number.bits) << 16); }

static inline float widen(float8 number) {
    const uint32_t magnitude = number.bits & 0x7f, sign = static_cast<uint32_t>(number.bits & 0x80) << 24;
    const float number_ = from_bits(magnitude << 20) * 0x1p120f;  // the exponent's bias is 7, in float32 127
    return from_bits(to_bits(magnitude == 0x7f ? NAN : number_) | sign);
}

static inline void narrow(float number, float* out) { *out = number; }

static inline void narrow(float number, bfloat16* out) {  // to the nearest, of two the even one
    const uint32_t bits = to_bits(number);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp of a number that is not above 0, to a unit in the last place of float32 or two: unlike the library's, the
// compiler makes vectors of it. NaN stays NaN.
static inline float exp_negative(float x) {
    const float least = -87.0f;
    x = x < least ? least : x;
    const float whole = std::rint(x * 1.44269504f);
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.98756915e-4f;
    power = power * rest + 1.39819995e-3f;
    power = power * rest + 8.33345190e-3f;
    power = power * rest + 4.16657962e-2f;
    power = power * rest + 1.66666655e-1f;
    power = power * rest + 5.00000012e-1f;
    power = power * rest * rest + rest + 1.0f;
    return power * from_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}
