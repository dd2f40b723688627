// The transforms of F(2x2, 3x3), a vector of channels at a time.

#include "winograd.h"

#include "activations.h"
#include "bfloat16.h"
#include "gemm.h"
#include "isa.h"
#include "vectors.h"

namespace {

// B^T d B with B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1].
template <typename Vector>
DYNACONV_INLINE void transform_input(const Vector (&d)[4][4], Vector (&v)[4][4]) {
  Vector half[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    half[0][j] = d[0][j] - d[2][j];
    half[1][j] = d[1][j] + d[2][j];
    half[2][j] = d[2][j] - d[1][j];
    half[3][j] = d[1][j] - d[3][j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i][0] = half[i][0] - half[i][2];
    v[i][1] = half[i][1] + half[i][2];
    v[i][2] = half[i][2] - half[i][1];
    v[i][3] = half[i][1] - half[i][3];
  }
}

DYNACONV_INLINE float as_float(float value) { return value; }
DYNACONV_INLINE float as_float(Bfloat16 value) { return widened(value); }
DYNACONV_INLINE void put(float value, float* to) { *to = value; }
DYNACONV_INLINE void put(float value, Bfloat16* to) { *to = narrowed(value); }

// Points in the rows and columns of G that hold halves.
template <typename Vector>
DYNACONV_INLINE void halve(Vector (&v)[4][4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const bool row = i == 1 || i == 2, column = j == 1 || j == 2;
      if (row || column) v[i][j] *= row && column ? 0.25f : 0.5f;
    }
  }
}

template <typename Vector, typename T, bool Halved>
DYNACONV_INLINE void input(const void* const* patch, int64_t channels, T* transformed, int64_t step) {
  constexpr int kLanes = kLanesOf<Vector>;
  const auto* const* rows = reinterpret_cast<const T* const*>(patch);
  Vector d[4][4], v[4][4];
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) d[p / 4][p % 4] = load<Vector>(rows[p] + c);
    transform_input<Vector>(d, v);
    if constexpr (Halved) halve<Vector>(v);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) store<Vector>(transformed + p * step + c, v[p / 4][p % 4]);
  }
  for (; c < channels; ++c) {
    for (int p = 0; p < 16; ++p) d[p / 4][p % 4] = broadcast<Vector>(as_float(rows[p][c]));
    transform_input<Vector>(d, v);
    if constexpr (Halved) halve<Vector>(v);
    for (int p = 0; p < 16; ++p) put(v[p / 4][p % 4][0], transformed + p * step + c);
  }
}

// A^T m A + bias with A^T = [1 1 1 0; 0 1 -1 -1], for a vector of channels.
template <typename Vector>
DYNACONV_INLINE void transform_output(const float* products, int64_t step, const float* bias, Vector (&sums)[4]) {
  Vector half[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector m1 = load<Vector>(products + (4 + j) * step), m2 = load<Vector>(products + (8 + j) * step);
    half[0][j] = load<Vector>(products + j * step) + m1 + m2;
    half[1][j] = m1 - m2 - load<Vector>(products + (12 + j) * step);
  }
  const Vector start = load<Vector>(bias);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    sums[2 * i] = half[i][0] + half[i][1] + half[i][2] + start;
    sums[2 * i + 1] = half[i][1] - half[i][2] - half[i][3] + start;
  }
}

template <typename Vector>
DYNACONV_INLINE void output(const float* products, int64_t step, const float* bias, float* sums) {
  for (int c = 0; c < kPanel; c += kLanesOf<Vector>) {
    Vector values[4];
    transform_output<Vector>(products + c, step, bias + c, values);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store<Vector>(sums + q * kPanel + c, values[q]);
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void finish_panel(const float* products, int64_t step, const float* bias, int activation, int final_activation,
                                  const void* const* residual, void* const* out) {
  const Bounds first = clamp_bounds(activation), last = clamp_bounds(final_activation);
  const Vector low = broadcast<Vector>(first.low), high = broadcast<Vector>(first.high);
  const Vector last_low = broadcast<Vector>(last.low), last_high = broadcast<Vector>(last.high);
  for (int c = 0; c < kPanel; c += kLanesOf<Vector>) {
    Vector values[4];
    transform_output<Vector>(products + c, step, bias + c, values);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      if (!out[q]) continue;
      Vector v = at_most(at_least(values[q], low), high);
      if (residual) v += load<Vector>(static_cast<const T*>(residual[q]) + c);
      store<Vector>(static_cast<T*>(out[q]) + c, at_most(at_least(v, last_low), last_high));
    }
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void finish(const float* sums, int columns, int activation, int final_activation, const T* residual, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Vector v = activate<Vector>(load<Vector>(sums + c), activation);
    if (residual) v += load<Vector>(residual + c);
    store<Vector>(out + c, activate<Vector>(v, final_activation));
  }
  for (; c < columns; ++c) {
    float v = activate_scalar(sums[c], activation);
    if (residual) v += as_float(residual[c]);
    put(activate_scalar(v, final_activation), out + c);
  }
}

#define DYNACONV_WINOGRAD(NAME, TARGET, VECTOR, T)                                                                  \
  TARGET void input_##NAME(const void* const* patch, int64_t channels, void* transformed, int64_t step) {          \
    input<VECTOR, T, false>(patch, channels, static_cast<T*>(transformed), step);                                  \
  }                                                                                                                 \
  TARGET void input_halved_##NAME(const void* const* patch, int64_t channels, void* transformed, int64_t step) {   \
    input<VECTOR, T, true>(patch, channels, static_cast<T*>(transformed), step);                                   \
  }                                                                                                                 \
  TARGET void output_##NAME(const float* products, int64_t step, const float* bias, float* sums) {                 \
    output<VECTOR>(products, step, bias, sums);                                                                    \
  }                                                                                                                 \
  TARGET void finish_##NAME(const float* sums, int columns, int activation, int final_activation,                  \
                            const void* residual, void* out) {                                                     \
    finish<VECTOR>(sums, columns, activation, final_activation, static_cast<const T*>(residual),                   \
                   static_cast<T*>(out));                                                                          \
  }                                                                                                                 \
  TARGET void finish_panel_##NAME(const float* products, int64_t step, const float* bias, int activation,          \
                                  int final_activation, const void* const* residual, void* const* out) {           \
    finish_panel<VECTOR, T>(products, step, bias, activation, final_activation, residual, out);                    \
  }                                                                                                                 \
  constexpr WinogradKernels kWinograd_##NAME = {input_##NAME, input_halved_##NAME, output_##NAME, finish_##NAME,   \
                                               finish_panel_##NAME};

DYNACONV_WINOGRAD(plain, , float4, float)
#ifdef DYNACONV_X86
DYNACONV_WINOGRAD(avx2, DYNACONV_TARGET_AVX2, float8, float)
DYNACONV_WINOGRAD(avx512, DYNACONV_TARGET_AVX512, float16, float)
DYNACONV_WINOGRAD(bfloat16, DYNACONV_TARGET_AVX512_BF16, float16, Bfloat16)
#endif

}  // namespace

const WinogradKernels& winograd_kernels(int dtype) {
#ifdef DYNACONV_X86
  if (dtype == kBfloat16) return kWinograd_bfloat16;
  if (best_isa_level() == Isa::kAvx512) return kWinograd_avx512;
  if (best_isa_level() == Isa::kAvx2) return kWinograd_avx2;
#endif
  (void)dtype;
  return kWinograd_plain;
}
