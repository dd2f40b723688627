#include "plane_taps.h"

#include "isa.h"
#include "vectors.h"

namespace {

// The compiler makes vectors of the inner positions, of both strides.
template <int Stride>
DYNACONV_INLINE void slide(const float* __restrict line, int64_t width, const float* taps, int64_t count, float* __restrict sums) {
  const float left = taps[0], middle = taps[1], right = taps[2];
  const bool cut = Stride * (count - 1) + 1 >= width;  // nothing lies right of the last position
  const int64_t inner = count - cut;
  sums[0] += middle * line[0] + (inner > 0 ? right * line[1] : 0.0f);
  for (int64_t x = 1; x < inner; ++x)
    sums[x] += left * line[Stride * x - 1] + middle * line[Stride * x] + right * line[Stride * x + 1];
  if (cut && count > 1) sums[count - 1] += left * line[Stride * (count - 1) - 1] + middle * line[Stride * (count - 1)];
}

template <typename Vector>
DYNACONV_INLINE float sum_of(const float* line, int64_t count) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector parts = {};
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) parts += load<Vector>(line + x);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += parts[lane];
  for (; x < count; ++x) sum += line[x];
  return sum;
}

struct Kernels {
  void (*slide[2])(const float* line, int64_t width, const float* taps, int64_t count, float* sums);
  float (*sum)(const float* line, int64_t count);
};

#define DYNACONV_PLANES(NAME, TARGET, VECTOR)                                                                              \
  template <int Stride>                                                                                                    \
  TARGET void slide_##NAME(const float* line, int64_t width, const float* taps, int64_t count, float* sums) {              \
    slide<Stride>(line, width, taps, count, sums);                                                                         \
  }                                                                                                                        \
  TARGET float sum_##NAME(const float* line, int64_t count) { return sum_of<VECTOR>(line, count); }                        \
  constexpr Kernels kPlanes_##NAME = {{slide_##NAME<1>, slide_##NAME<2>}, sum_##NAME};

DYNACONV_PLANES(plain, , float4)
#ifdef DYNACONV_X86
DYNACONV_PLANES(avx2, DYNACONV_TARGET_AVX2, float8)
DYNACONV_PLANES(avx512, DYNACONV_TARGET_AVX512, float16)
#endif

const Kernels& kernels() {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return kPlanes_avx512;
  if (best_isa_level() == Isa::kAvx2) return kPlanes_avx2;
#endif
  return kPlanes_plain;
}

}  // namespace

void slide_taps(const float* line, int64_t width, int64_t stride, const float* taps, int64_t count, float* sums) {
  kernels().slide[stride - 1](line, width, taps, count, sums);
}

float line_sum(const float* line, int64_t count) { return kernels().sum(line, count); }
