// Row kernels, one template for all instruction sets.

#include "rowwise.h"

#include <cmath>

#include "activations.h"
#include "isa.h"
#include "vectors.h"

namespace {

template <typename Vector>
DYNACONV_INLINE float total(Vector v) {
  float sum = 0;
  for (int lane = 0; lane < kLanesOf<Vector>; ++lane) sum += v[lane];
  return sum;
}

template <typename Vector>
DYNACONV_INLINE void max_row(const float* const* taps, int taps_count, int64_t channels, float* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  const float least = -__builtin_inff();
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector most = broadcast<Vector>(least);
    for (int t = 0; t < taps_count; ++t) {
      const Vector v = load<Vector>(taps[t] + c);
      most = v != v ? v : at_least(most, v);
    }
    store<Vector>(out + c, most);
  }
  for (; c < channels; ++c) {
    float most = least;
    for (int t = 0; t < taps_count; ++t) most = taps[t][c] > most || taps[t][c] != taps[t][c] ? taps[t][c] : most;
    out[c] = most;
  }
}

template <typename Vector>
DYNACONV_INLINE void average_row(const float* const* taps, int taps_count, int64_t channels, float scale, float* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sum = {};
    for (int t = 0; t < taps_count; ++t) sum += load<Vector>(taps[t] + c);
    store<Vector>(out + c, Vector(sum * scale));
  }
  for (; c < channels; ++c) {
    float sum = 0;
    for (int t = 0; t < taps_count; ++t) sum += taps[t][c];
    out[c] = sum * scale;
  }
}

template <typename Vector>
DYNACONV_INLINE void pair_row(Pairing op, const float* a, const float* b, bool single, int64_t channels,
                              int activation, float* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Vector right = single ? broadcast<Vector>(b[0]) : load<Vector>(b + c);
    const Vector left = load<Vector>(a + c);
    const Vector joined = op == Pairing::kAdd ? left + right : left * right;
    store<Vector>(out + c, activate<Vector>(joined, activation));
  }
  for (; c < channels; ++c) {
    const float right = single ? b[0] : b[c];
    out[c] = activate_scalar(op == Pairing::kAdd ? a[c] + right : a[c] * right, activation);
  }
}

template <typename Vector>
DYNACONV_INLINE void activate_row(const float* in, int64_t channels, int activation, float* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store<Vector>(out + c, activate<Vector>(load<Vector>(in + c), activation));
  for (; c < channels; ++c) out[c] = activate_scalar(in[c], activation);
}

template <typename Vector>
DYNACONV_INLINE void sum_rows(const float* rows, int64_t count, int64_t stride, int64_t channels, float* sums) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
    Vector part[4] = {};
    for (int64_t r = 0; r < count; ++r)
      for (int i = 0; i < 4; ++i) part[i] += load<Vector>(rows + r * stride + c + i * kLanes);
    for (int i = 0; i < 4; ++i)
      store<Vector>(sums + c + i * kLanes, Vector(load<Vector>(sums + c + i * kLanes) + part[i]));
  }
  for (; c + kLanes <= channels; c += kLanes) {
    Vector part = {};
    for (int64_t r = 0; r < count; ++r) part += load<Vector>(rows + r * stride + c);
    store<Vector>(sums + c, Vector(load<Vector>(sums + c) + part));
  }
  for (; c < channels; ++c)
    for (int64_t r = 0; r < count; ++r) sums[c] += rows[r * stride + c];
}

template <typename Vector>
DYNACONV_INLINE void normalize_row(const float* in, int64_t channels, const float* weight, const float* bias, float eps,
                                   float* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector sums = {};
  float sum = 0, squares = 0;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) sums += load<Vector>(in + c);
  for (; c < channels; ++c) sum += in[c];
  const float mean = (sum + total(sums)) / channels;
  sums = Vector{};
  for (c = 0; c + kLanes <= channels; c += kLanes) {
    const Vector off = load<Vector>(in + c) - mean;
    sums += off * off;
  }
  for (; c < channels; ++c) squares += (in[c] - mean) * (in[c] - mean);
  const float scale = 1.0f / std::sqrt((squares + total(sums)) / channels + eps);
  for (c = 0; c + kLanes <= channels; c += kLanes)
    store<Vector>(out + c, Vector((load<Vector>(in + c) - mean) * scale * load<Vector>(weight + c) + load<Vector>(bias + c)));
  for (; c < channels; ++c) out[c] = (in[c] - mean) * scale * weight[c] + bias[c];
}

template <typename Vector>
DYNACONV_INLINE float dot_rows(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                               int center, const float* extra, int pixels, float* sums) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector parts[kGatePixels] = {};
  Vector more[kGatePixels] = {};
  const int64_t whole = channels / kLanes * kLanes;
  for (int t = 0; t < taps_count; ++t) {
    const float* const* from = taps + t * kGatePixels;
    const float* own = weight + t * channels;
    if (t == center && extra) {
      for (int64_t c = 0; c < whole; c += kLanes) {
        const Vector w = load<Vector>(own + c), e = load<Vector>(extra + c);
#pragma GCC unroll 4
        for (int p = 0; p < kGatePixels; ++p) {
          const Vector v = load<Vector>(from[p] + c);
          parts[p] += v * w;
          more[p] += v * e;
        }
      }
    } else {
      for (int64_t c = 0; c < whole; c += kLanes) {
        const Vector w = load<Vector>(own + c);
#pragma GCC unroll 4
        for (int p = 0; p < kGatePixels; ++p) parts[p] += load<Vector>(from[p] + c) * w;
      }
    }
  }
  float all = 0;
  for (int p = 0; p < kGatePixels; ++p) {
    sums[p] = total(parts[p]);
    if (p < pixels) all += total(more[p]);
  }
  for (int64_t c = whole; c < channels; ++c) {
    for (int t = 0; t < taps_count; ++t)
      for (int p = 0; p < kGatePixels; ++p) sums[p] += taps[t * kGatePixels + p][c] * weight[t * channels + c];
    if (extra)
      for (int p = 0; p < pixels; ++p) all += taps[center * kGatePixels + p][c] * extra[c];
  }
  return all;
}

DYNACONV_INLINE void interleave_rows(const float* planes, int64_t plane, int64_t count, int64_t channels, float* rows,
                                     int64_t stride) {
  for (int64_t from = 0; from < channels; from += 16) {
    const int64_t to = from + 16 < channels ? from + 16 : channels;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = from; c < to; ++c) rows[p * stride + c] = planes[c * plane + p];
  }
}

template <typename T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}

#define DYNACONV_ROWS(NAME, TARGET, VECTOR)                                                                            \
  TARGET void max_##NAME(const void* const* taps, int count, int64_t channels, void* out) {                           \
    max_row<VECTOR>(reinterpret_cast<const float* const*>(taps), count, channels, static_cast<float*>(out));          \
  }                                                                                                                    \
  TARGET void average_##NAME(const void* const* taps, int count, int64_t channels, float scale, void* out) {          \
    average_row<VECTOR>(reinterpret_cast<const float* const*>(taps), count, channels, scale, static_cast<float*>(out)); \
  }                                                                                                                    \
  TARGET void pair_##NAME(Pairing op, const void* a, const void* b, bool single, int64_t channels, int activation,    \
                          void* out) {                                                                                 \
    pair_row<VECTOR>(op, in<float>(a), in<float>(b), single, channels, activation, static_cast<float*>(out));         \
  }                                                                                                                    \
  TARGET void activate_##NAME(const void* from, int64_t channels, int activation, void* out) {                        \
    activate_row<VECTOR>(in<float>(from), channels, activation, static_cast<float*>(out));                            \
  }                                                                                                                    \
  TARGET void sum_##NAME(const void* rows, int64_t count, int64_t stride, int64_t channels, float* sums) {            \
    sum_rows<VECTOR>(in<float>(rows), count, stride, channels, sums);                                                 \
  }                                                                                                                    \
  TARGET void normalize_##NAME(const void* from, int64_t channels, const float* weight, const float* bias, float eps, \
                               void* out) {                                                                            \
    normalize_row<VECTOR>(in<float>(from), channels, weight, bias, eps, static_cast<float*>(out));                    \
  }                                                                                                                    \
  TARGET float dots_##NAME(const void* const* taps, int count, int64_t channels, const void* weight, int center,      \
                           const void* extra, int pixels, float* sums) {                                               \
    return dot_rows<VECTOR>(reinterpret_cast<const float* const*>(taps), count, channels, in<float>(weight), center,  \
                            in<float>(extra), pixels, sums);                                                           \
  }                                                                                                                    \
  TARGET void interleave_##NAME(const float* planes, int64_t plane, int64_t count, int64_t channels, void* rows,      \
                                int64_t stride) {                                                                      \
    interleave_rows(planes, plane, count, channels, static_cast<float*>(rows), stride);                               \
  }                                                                                                                    \
  constexpr RowKernels kRows_##NAME = {max_##NAME, average_##NAME,   pair_##NAME, activate_##NAME,                    \
                                       sum_##NAME, normalize_##NAME, dots_##NAME, interleave_##NAME};

DYNACONV_ROWS(plain, , float4)
#ifdef DYNACONV_X86
DYNACONV_ROWS(avx2, DYNACONV_TARGET_AVX2, float8)
DYNACONV_ROWS(avx512, DYNACONV_TARGET_AVX512, float16)
#endif

}  // namespace

const RowKernels& row_kernels(int dtype) {
  (void)dtype;
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return kRows_avx512;
  if (best_isa_level() == Isa::kAvx2) return kRows_avx2;
#endif
  return kRows_plain;
}
