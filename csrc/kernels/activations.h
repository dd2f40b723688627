// Activation functions on vectors; what is not a number stays that. Numbers as in csrc/plan/plan.h, enum Activation.

#pragma once

#include "../plan/plan.h"
#include "vectors.h"

#if defined(DYNACONV_X86) && defined(__GNUC__) && !defined(__clang__)
#define DYNACONV_ONE_INSTRUCTION 1
#include <immintrin.h>
#endif

// Both return `v` when it is not a number. GCC makes a comparison and a choice of the second form where one instruction
// does, hence the first.
#ifdef DYNACONV_ONE_INSTRUCTION
DYNACONV_INLINE float4 at_least(float4 v, float4 low) { return __builtin_ia32_maxps(low, v); }
DYNACONV_INLINE float4 at_most(float4 v, float4 high) { return __builtin_ia32_minps(high, v); }
DYNACONV_INLINE float8 at_least(float8 v, float8 low) { return __builtin_ia32_maxps256(low, v); }
DYNACONV_INLINE float8 at_most(float8 v, float8 high) { return __builtin_ia32_minps256(high, v); }
DYNACONV_INLINE float16 at_least(float16 v, float16 low) {
  return __builtin_ia32_maxps512_mask(low, v, low, -1, 4);
}
DYNACONV_INLINE float16 at_most(float16 v, float16 high) {
  return __builtin_ia32_minps512_mask(high, v, high, -1, 4);
}
#else
template <typename Vector>
DYNACONV_INLINE Vector at_least(Vector v, Vector low) {
  return low > v ? low : v;
}

template <typename Vector>
DYNACONV_INLINE Vector at_most(Vector v, Vector high) {
  return high < v ? high : v;
}
#endif

// e^v, relative error below 3e-7 for v in [-87, 88]; beyond, the value at the nearer end.
template <typename Vector>
DYNACONV_INLINE Vector exponential(Vector v) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));
  v = at_most(at_least(v, broadcast<Vector>(-87.0f)), broadcast<Vector>(88.0f));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const Vector shifted = v * 1.44269504f + 12582912.0f;
  const Vector count = shifted - 12582912.0f;
  const Vector rest = (v - count * 0.693359375f) + count * 2.12194440e-4f;
  Vector sum = rest * 1.98756915e-4f + 1.39819995e-3f;
  sum = sum * rest + 8.33345192e-3f;
  sum = sum * rest + 4.16657962e-2f;
  sum = sum * rest + 1.66666657e-1f;
  sum = sum * rest + 0.5f;
  sum = sum * (rest * rest) + (rest + 1.0f);
  // Bits that wrap around, where v is NaN.
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  return sum * (Vector)power;
}

template <typename Vector>
DYNACONV_INLINE Vector sigmoid(Vector v) {
  return 1.0f / (1.0f + exponential<Vector>(-v));
}

// The error function as a quotient of polynomials; it is 1 to the last bit beyond 4.
template <typename Vector>
DYNACONV_INLINE Vector error_function(Vector v) {
  v = at_most(at_least(v, broadcast<Vector>(-4.0f)), broadcast<Vector>(4.0f));
  const Vector square = v * v;
  Vector above = square * -2.72614225801306e-10f + 2.77068142495902e-08f;
  above = above * square - 2.10102402082508e-06f;
  above = above * square - 5.69250639462346e-05f;
  above = above * square - 7.34990630326855e-04f;
  above = above * square - 2.95459980854025e-03f;
  above = above * square - 1.60960333262415e-02f;
  Vector below = square * -1.45660718464996e-05f - 2.13374055278905e-04f;
  below = below * square - 1.68282697438203e-03f;
  below = below * square - 7.37332916720468e-03f;
  below = below * square - 1.42647390514189e-02f;
  return v * above / below;
}

template <typename Vector>
DYNACONV_INLINE Vector leaky(Vector v, float slope) {
  return v < Vector{} ? v * slope : v;
}

// v tanh(log(1 + e^v)), where the hyperbolic tangent is a quotient of sums of e^v.
template <typename Vector>
DYNACONV_INLINE Vector mish(Vector v) {
  const Vector power = exponential<Vector>(at_most(v, broadcast<Vector>(20.0f))), above = power * (power + 2.0f);
  return v * (above / (above + 2.0f));
}

template <typename Vector>
DYNACONV_INLINE Vector activate(Vector v, int activation) {
  const Vector zero = {};
  const Vector six = broadcast<Vector>(6.0f);
  switch (kind_of(activation)) {
    case kRelu: return at_least(v, zero);
    case kRelu6: return at_most(at_least(v, zero), six);
    case kSilu: return v * sigmoid(v);
    case kHardswish: return v * at_most(at_least(Vector(v + 3.0f), zero), six) * (1.0f / 6.0f);
    case kSigmoid: return sigmoid(v);
    case kHardsigmoid: return at_most(at_least(Vector(v + 3.0f), zero), six) * (1.0f / 6.0f);
    case kGelu: return 0.5f * v * (1.0f + error_function<Vector>(v * 0.70710678f));
    case kLeakyRelu: return leaky(v, slope_of(activation));
    case kTanh: return 2.0f * sigmoid<Vector>(v + v) - 1.0f;
    case kElu: return v < zero ? exponential<Vector>(v) - 1.0f : v;
    case kMish: return mish(v);
    // 0.5 (1 + tanh(z)) is the sigmoid of 2 z.
    case kGeluTanh: return v * sigmoid<Vector>(1.59576912f * (v + 0.044715f * v * v * v));
    default: return v;
  }
}

// None, ReLU and ReLU6 are one clamp between two bounds, which needs no branch on the activation inside a loop.
DYNACONV_INLINE bool is_clamp(int activation) { return activation <= kRelu6; }

struct Bounds {
  float low, high;
};

DYNACONV_INLINE Bounds clamp_bounds(int activation) {
  const float endless = __builtin_inff();
  return {activation == kNone ? -endless : 0.0f, activation == kRelu6 ? 6.0f : endless};
}

// One value, computed as a lane of a vector would be.
DYNACONV_INLINE float activate_scalar(float value, int activation) {
  return activate<float4>(broadcast<float4>(value), activation)[0];
}
