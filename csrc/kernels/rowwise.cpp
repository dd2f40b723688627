// Row kernels, one template for all instruction sets.

#include "rowwise.h"

#include <cmath>
#include <type_traits>

#include "activations.h"
#include "bfloat16.h"
#include "isa.h"
#include "vectors.h"

namespace {

DYNACONV_INLINE float get(const float* from) { return *from; }
DYNACONV_INLINE float get(const Bfloat16* from) { return widened(*from); }
DYNACONV_INLINE void put(float* to, float value) { *to = value; }
DYNACONV_INLINE void put(Bfloat16* to, float value) { *to = narrowed(value); }

template <typename Vector, typename T>
DYNACONV_INLINE void max_row(const T* const* taps, int taps_count, int64_t channels, T* out) {
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
    for (int t = 0; t < taps_count; ++t) {
      const float v = get(taps[t] + c);
      most = v > most || v != v ? v : most;
    }
    put(out + c, most);
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void average_row(const T* const* taps, int taps_count, int64_t channels, float scale, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sum = {};
    for (int t = 0; t < taps_count; ++t) sum += load<Vector>(taps[t] + c);
    store<Vector>(out + c, Vector(sum * scale));
  }
  for (; c < channels; ++c) {
    float sum = 0;
    for (int t = 0; t < taps_count; ++t) sum += get(taps[t] + c);
    put(out + c, sum * scale);
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void pair_row(Pairing op, const T* a, const T* b, bool single, int64_t channels, int activation, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Vector right = single ? broadcast<Vector>(get(b)) : load<Vector>(b + c);
    const Vector left = load<Vector>(a + c);
    const Vector joined = op == Pairing::kMultiply ? left * right : op == Pairing::kAdd ? left + right : left - right;
    store<Vector>(out + c, activate<Vector>(joined, activation));
  }
  for (; c < channels; ++c) {
    const float left = get(a + c), right = get(single ? b : b + c);
    const float joined = op == Pairing::kMultiply ? left * right : op == Pairing::kAdd ? left + right : left - right;
    put(out + c, activate_scalar(joined, activation));
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void weighted_row(const T* a, const T* b, float weight, int64_t channels, int activation, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes)
    store<Vector>(out + c, activate<Vector>(Vector(load<Vector>(a + c) + load<Vector>(b + c) * weight), activation));
  for (; c < channels; ++c) put(out + c, activate_scalar(get(a + c) + get(b + c) * weight, activation));
}

template <typename Vector, typename From, typename To>
DYNACONV_INLINE void activate_row(const From* in, int64_t channels, int activation, To* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store<Vector>(out + c, activate<Vector>(load<Vector>(in + c), activation));
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>)
    for (; c + 4 <= channels; c += 4) store<float4>(out + c, activate<float4>(load<float4>(in + c), activation));
  for (; c < channels; ++c) put(out + c, activate_scalar(get(in + c), activation));
}

template <typename Vector, typename T>
DYNACONV_INLINE void leaky_row(const T* in, const float* slopes, int64_t channels, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Vector v = load<Vector>(in + c);
    store<Vector>(out + c, v < Vector{} ? Vector(v * load<Vector>(slopes + c)) : v);
  }
  for (; c < channels; ++c) put(out + c, get(in + c) < 0 ? get(in + c) * slopes[c] : get(in + c));
}

template <typename Vector, typename T>
DYNACONV_INLINE void blend_row(const T* const* taps, const float* factors, int count, int64_t channels, T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sum = {};
    for (int t = 0; t < count; ++t) sum += load<Vector>(taps[t] + c) * factors[t];
    store<Vector>(out + c, sum);
  }
  for (; c < channels; ++c) {
    float sum = 0;
    for (int t = 0; t < count; ++t) sum += get(taps[t] + c) * factors[t];
    put(out + c, sum);
  }
}

// Additions wait for each other, so that four rows are summed side by side. A channel's sums join in the same order however
// many vectors are added at once, so that its bits do not depend on how threads share the channels.
template <typename Vector, int Vectors, typename T>
DYNACONV_INLINE void sum_vectors(const T* rows, int64_t count, int64_t stride, float* sums) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector part[4][Vectors] = {};
  int64_t r = 0;
  for (; r + 4 <= count; r += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) part[i][v] += load<Vector>(rows + (r + i) * stride + v * kLanes);
  for (; r < count; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) part[0][v] += load<Vector>(rows + r * stride + v * kLanes);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const Vector all = (part[0][v] + part[1][v]) + (part[2][v] + part[3][v]);
    store<Vector>(sums + v * kLanes, Vector(load<Vector>(sums + v * kLanes) + all));
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE void sum_rows(const T* rows, int64_t count, int64_t stride, int64_t channels, float* sums) {
  constexpr int kLanes = kLanesOf<Vector>, kAtOnce = kLanes == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + kAtOnce * kLanes <= channels; c += kAtOnce * kLanes)
    sum_vectors<Vector, kAtOnce>(rows + c, count, stride, sums + c);
  for (; c + kLanes <= channels; c += kLanes) sum_vectors<Vector, 1>(rows + c, count, stride, sums + c);
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; c + 4 <= channels; c += 4) sum_vectors<float4, 1>(rows + c, count, stride, sums + c);
  }
  for (; c < channels; ++c)
    for (int64_t r = 0; r < count; ++r) sums[c] += get(rows + r * stride + c);
}

template <typename Vector, typename T>
DYNACONV_INLINE void normalize_row(const T* in, int64_t channels, const float* weight, const float* bias, float eps,
                                   T* out) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector sums = {};
  float sum = 0, squares = 0;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) sums += load<Vector>(in + c);
  for (; c < channels; ++c) sum += get(in + c);
  const float mean = (sum + total(sums)) / channels;
  sums = Vector{};
  for (c = 0; c + kLanes <= channels; c += kLanes) {
    const Vector off = load<Vector>(in + c) - mean;
    sums += off * off;
  }
  for (; c < channels; ++c) squares += (get(in + c) - mean) * (get(in + c) - mean);
  const float scale = 1.0f / std::sqrt((squares + total(sums)) / channels + eps);
  for (c = 0; c + kLanes <= channels; c += kLanes)
    store<Vector>(out + c, Vector((load<Vector>(in + c) - mean) * scale * load<Vector>(weight + c) + load<Vector>(bias + c)));
  for (; c < channels; ++c) put(out + c, (get(in + c) - mean) * scale * weight[c] + bias[c]);
}

template <typename T>
DYNACONV_INLINE float4 four(const T* from) {
  return float4{get(from), get(from + 1), get(from + 2), get(from + 3)};
}

// parts[p] += from[p] * weight over `whole` channels; two sums a pixel hide the latency of the multiplications.
template <typename Vector, typename T>
DYNACONV_INLINE void dot_tap(const T* const* from, const float* weight, int64_t whole, Vector (&parts)[2][kGatePixels]) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
    const Vector w0 = load<Vector>(weight + c), w1 = load<Vector>(weight + c + kLanes);
#pragma GCC unroll 4
    for (int p = 0; p < kGatePixels; ++p) {
      parts[0][p] += load<Vector>(from[p] + c) * w0;
      parts[1][p] += load<Vector>(from[p] + c + kLanes) * w1;
    }
  }
  if (c < whole) {
    const Vector w = load<Vector>(weight + c);
#pragma GCC unroll 4
    for (int p = 0; p < kGatePixels; ++p) parts[0][p] += load<Vector>(from[p] + c) * w;
  }
}

template <typename Vector, typename T>
DYNACONV_INLINE float dot_rows(const T* const* taps, int taps_count, int64_t channels, const float* weight, int center,
                               const float* extra, int pixels, float* sums) {
  constexpr int kLanes = kLanesOf<Vector>;
  const int64_t whole = channels / kLanes * kLanes;
  Vector parts[2][kGatePixels] = {};
  for (int t = 0; t < taps_count; ++t)
    dot_tap<Vector, T>(taps + t * kGatePixels, weight + t * channels, whole, parts);
  for (int p = 0; p < kGatePixels; ++p) sums[p] = total(Vector(parts[0][p] + parts[1][p]));
  float all = 0;
  if (extra) {
    Vector more[2][kGatePixels] = {};
    dot_tap<Vector, T>(taps + center * kGatePixels, extra, whole, more);
    for (int p = 0; p < pixels; ++p) all += total(Vector(more[0][p] + more[1][p]));
  }
  int64_t c = whole;
  // What is left of the channels, four at a time.
  for (; c + 4 <= channels; c += 4) {
    float4 rest[kGatePixels] = {}, last = {};
    for (int t = 0; t < taps_count; ++t) {
      const float4 w = load<float4>(weight + t * channels + c);
      for (int p = 0; p < kGatePixels; ++p) rest[p] += four(taps[t * kGatePixels + p] + c) * w;
    }
    for (int p = 0; p < kGatePixels; ++p) sums[p] += total(rest[p]);
    if (!extra) continue;
    for (int p = 0; p < pixels; ++p) last += four(taps[center * kGatePixels + p] + c) * load<float4>(extra + c);
    all += total(last);
  }
  for (; c < channels; ++c) {
    for (int t = 0; t < taps_count; ++t)
      for (int p = 0; p < kGatePixels; ++p)
        sums[p] += get(taps[t * kGatePixels + p] + c) * weight[t * channels + c];
    if (extra)
      for (int p = 0; p < pixels; ++p) all += get(taps[center * kGatePixels + p] + c) * extra[c];
  }
  return all;
}

template <typename T>
DYNACONV_INLINE void interleave_rows(const float* planes, int64_t plane, int64_t count, int64_t channels, T* rows,
                                     int64_t stride) {
  if (channels == 3 && stride == 3) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < 3; ++c) put(rows + p * 3 + c, planes[c * plane + p]);
    return;
  }
  for (int64_t from = 0; from < channels; from += 16) {
    const int64_t to = from + 16 < channels ? from + 16 : channels;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = from; c < to; ++c) put(rows + p * stride + c, planes[c * plane + p]);
  }
}

#ifdef DYNACONV_X86
// How 32 pixels of three planes become three vectors: the first two planes, then the third between them.
struct Weave {
  int16_t pair[3][32], third[3][32];
};
constexpr Weave weave() {
  Weave made{};
  for (int v = 0; v < 3; ++v)
    for (int j = 0; j < 32; ++j) {
      const int pixel = (32 * v + j) / 3, channel = (32 * v + j) % 3;
      made.pair[v][j] = static_cast<int16_t>(channel == 1 ? 32 + pixel : pixel);
      made.third[v][j] = static_cast<int16_t>(channel == 2 ? 32 + pixel : j);
    }
  return made;
}
alignas(64) constexpr Weave kWeave = weave();

DYNACONV_BF16_INLINE void interleave_rows(const float* planes, int64_t plane, int64_t count, int64_t channels,
                                          Bfloat16* rows, int64_t stride) {
  int64_t p = 0;
  for (; channels == 3 && stride == 3 && p + 32 <= count; p += 32) {
    __m512i colours[3];
    for (int c = 0; c < 3; ++c) {
      const float* from = planes + c * plane + p;
      colours[c] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    }
    for (int v = 0; v < 3; ++v) {
      const __m512i two = _mm512_permutex2var_epi16(colours[0], _mm512_load_si512(kWeave.pair[v]), colours[1]);
      const __m512i all = _mm512_permutex2var_epi16(two, _mm512_load_si512(kWeave.third[v]), colours[2]);
      _mm512_storeu_si512(rows + p * 3 + v * 32, all);
    }
  }
  interleave_rows<Bfloat16>(planes + p, plane, count - p, channels, rows + p * stride, stride);
}
#endif

template <typename T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}

#define DYNACONV_ROWS(NAME, TARGET, VECTOR, T)                                                                         \
  TARGET void max_##NAME(const void* const* taps, int count, int64_t channels, void* out) {                            \
    max_row<VECTOR>(reinterpret_cast<const T* const*>(taps), count, channels, static_cast<T*>(out));                   \
  }                                                                                                                    \
  TARGET void average_##NAME(const void* const* taps, int count, int64_t channels, float scale, void* out) {           \
    average_row<VECTOR>(reinterpret_cast<const T* const*>(taps), count, channels, scale, static_cast<T*>(out));        \
  }                                                                                                                    \
  TARGET void pair_##NAME(Pairing op, const void* a, const void* b, bool single, int64_t channels, int activation,     \
                          void* out) {                                                                                 \
    pair_row<VECTOR>(op, in<T>(a), in<T>(b), single, channels, activation, static_cast<T*>(out));                      \
  }                                                                                                                    \
  TARGET void weighted_##NAME(const void* a, const void* b, float weight, int64_t channels, int activation,            \
                              void* out) {                                                                             \
    weighted_row<VECTOR>(in<T>(a), in<T>(b), weight, channels, activation, static_cast<T*>(out));                      \
  }                                                                                                                    \
  TARGET void activate_##NAME(const void* from, int64_t channels, int activation, void* out) {                         \
    activate_row<VECTOR>(in<T>(from), channels, activation, static_cast<T*>(out));                                     \
  }                                                                                                                    \
  TARGET void leaky_##NAME(const void* from, const float* slopes, int64_t channels, void* out) {                       \
    leaky_row<VECTOR>(in<T>(from), slopes, channels, static_cast<T*>(out));                                            \
  }                                                                                                                    \
  TARGET void blend_##NAME(const void* const* taps, const float* factors, int count, int64_t channels, void* out) {    \
    blend_row<VECTOR>(reinterpret_cast<const T* const*>(taps), factors, count, channels, static_cast<T*>(out));        \
  }                                                                                                                    \
  TARGET void from_float_##NAME(const float* from, int64_t channels, int activation, void* out) {                      \
    activate_row<VECTOR>(from, channels, activation, static_cast<T*>(out));                                            \
  }                                                                                                                    \
  TARGET void to_float_##NAME(const void* from, int64_t channels, int activation, float* out) {                        \
    activate_row<VECTOR>(in<T>(from), channels, activation, out);                                                      \
  }                                                                                                                    \
  TARGET void sum_##NAME(const void* rows, int64_t count, int64_t stride, int64_t channels, float* sums) {             \
    sum_rows<VECTOR>(in<T>(rows), count, stride, channels, sums);                                                      \
  }                                                                                                                    \
  TARGET void normalize_##NAME(const void* from, int64_t channels, const float* weight, const float* bias, float eps,  \
                               void* out) {                                                                            \
    normalize_row<VECTOR>(in<T>(from), channels, weight, bias, eps, static_cast<T*>(out));                             \
  }                                                                                                                    \
  TARGET float dots_##NAME(const void* const* taps, int count, int64_t channels, const float* weight, int center,      \
                           const float* extra, int pixels, float* sums) {                                              \
    return dot_rows<VECTOR>(reinterpret_cast<const T* const*>(taps), count, channels, weight, center, extra, pixels,   \
                            sums);                                                                                     \
  }                                                                                                                    \
  TARGET void interleave_##NAME(const float* planes, int64_t plane, int64_t count, int64_t channels, void* rows,       \
                                int64_t stride) {                                                                      \
    interleave_rows(planes, plane, count, channels, static_cast<T*>(rows), stride);                                    \
  }                                                                                                                    \
  constexpr RowKernels kRows_##NAME = {max_##NAME,      average_##NAME,    pair_##NAME,    weighted_##NAME,             \
                                       activate_##NAME, leaky_##NAME,      blend_##NAME,    from_float_##NAME,          \
                                       to_float_##NAME, sum_##NAME,        normalize_##NAME, dots_##NAME,              \
                                       interleave_##NAME};

DYNACONV_ROWS(plain, , float4, float)
#ifdef DYNACONV_X86
DYNACONV_ROWS(avx2, DYNACONV_TARGET_AVX2, float8, float)
DYNACONV_ROWS(avx512, DYNACONV_TARGET_AVX512, float16, float)
DYNACONV_ROWS(bfloat16, DYNACONV_TARGET_AVX512_BF16, float16, Bfloat16)
#endif

}  // namespace

const RowKernels& row_kernels(int dtype) {
#ifdef DYNACONV_X86
  if (dtype == kBfloat16) return kRows_bfloat16;
  if (best_isa_level() == Isa::kAvx512) return kRows_avx512;
  if (best_isa_level() == Isa::kAvx2) return kRows_avx2;
#endif
  (void)dtype;
  return kRows_plain;
}
