#include "pixel_sums.h"

#include <cstring>

#include "activations.h"
#include "isa.h"
#include "vectors.h"

namespace {

template <typename Vector>
DYNACONV_INLINE Vector joined(const Join& join, int64_t c) {
  Vector sum = load<Vector>(join.bias + c);
  for (int64_t p = 0; p < join.parts; ++p) sum += load<Vector>(join.sums + p * join.part + c);
  if (join.scale) sum = sum * load<Vector>(join.scale + c) + load<Vector>(join.add + c);
  return activate<Vector>(sum, join.activation);
}

template <typename Vector>
DYNACONV_INLINE void join_channels(const Join& join, const float* residual, float* out) {
  constexpr int64_t kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= join.channels; c += kLanes) {
    Vector sum = joined<Vector>(join, c);
    if (residual) sum += load<Vector>(residual + c);
    store<Vector>(out + c, activate<Vector>(sum, join.final_activation));
  }
  if (c == join.channels) return;
  const int64_t width = join.channels - c;
  float block[kLanes] = {};
  if (residual) std::memcpy(block, residual + c, width * sizeof(float));
  const Vector sum = joined<Vector>(join, c) + load<Vector>(block);
  store<Vector>(block, activate<Vector>(sum, join.final_activation));
  std::memcpy(out + c, block, width * sizeof(float));
}

void join_plain(const Join& join, const float* residual, float* out) { join_channels<float4>(join, residual, out); }
#ifdef DYNACONV_X86
DYNACONV_TARGET_AVX2 void join_avx2(const Join& join, const float* residual, float* out) {
  join_channels<float8>(join, residual, out);
}
DYNACONV_TARGET_AVX512 void join_avx512(const Join& join, const float* residual, float* out) {
  join_channels<float16>(join, residual, out);
}
#endif

// Additions wait for each other, so that several pixels are summed side by side.
template <typename Vector, int Vectors>
DYNACONV_INLINE void add_vectors(const float* pixel, int64_t count, int64_t step, float* sums) {
  constexpr int64_t kLanes = kLanesOf<Vector>;
  constexpr int kBeside = 4;
  Vector part[kBeside][Vectors] = {};
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) part[0][v] = load<Vector>(sums + v * kLanes);
  int64_t i = 0;
  for (; i + kBeside <= count; i += kBeside)
#pragma GCC unroll 4
    for (int b = 0; b < kBeside; ++b, pixel += step)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) part[b][v] += load<Vector>(pixel + v * kLanes);
  for (; i < count; ++i, pixel += step)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) part[0][v] += load<Vector>(pixel + v * kLanes);
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v)
    store<Vector>(sums + v * kLanes, Vector((part[0][v] + part[1][v]) + (part[2][v] + part[3][v])));
}

template <typename Vector>
DYNACONV_INLINE void add_channels(const float* from, int64_t count, int64_t step, int64_t channels, float* sums) {
  constexpr int64_t kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) add_vectors<Vector, 2>(from + c, count, step, sums + c);
  for (; c + kLanes <= channels; c += kLanes) add_vectors<Vector, 1>(from + c, count, step, sums + c);
  for (; c + 4 <= channels; c += 4) add_vectors<float4, 1>(from + c, count, step, sums + c);
  for (; c < channels; ++c)
    for (int64_t i = 0; i < count; ++i) sums[c] += from[i * step + c];
}

void add_pixels_plain(const float* from, int64_t count, int64_t step, int64_t channels, float* sums) {
  add_channels<float4>(from, count, step, channels, sums);
}
#ifdef DYNACONV_X86
DYNACONV_TARGET_AVX2 void add_pixels_avx2(const float* from, int64_t count, int64_t step, int64_t channels, float* sums) {
  add_channels<float8>(from, count, step, channels, sums);
}
DYNACONV_TARGET_AVX512 void add_pixels_avx512(const float* from, int64_t count, int64_t step, int64_t channels, float* sums) {
  add_channels<float16>(from, count, step, channels, sums);
}
#endif

}  // namespace

void join_pixel(const Join& join, const float* residual, float* out) {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return join_avx512(join, residual, out);
  if (best_isa_level() == Isa::kAvx2) return join_avx2(join, residual, out);
#endif
  join_plain(join, residual, out);
}

void add_pixels(const float* from, int64_t count, int64_t step, int64_t channels, float* sums) {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return add_pixels_avx512(from, count, step, channels, sums);
  if (best_isa_level() == Isa::kAvx2) return add_pixels_avx2(from, count, step, channels, sums);
#endif
  add_pixels_plain(from, count, step, channels, sums);
}
