#include "gate_patch.h"

#include "../plan/plan.h"
#include "gate_patch_sums.h"
#include "isa.h"

namespace {

constexpr int64_t kBlockWeights = int64_t{kPatchBlock} * kPatchTapsPacked;

template <int Stride, typename Vector, int Rows, int Columns>
struct Sums {
  Vector positions[Rows][Columns] = {}, dots = {};

  // Whole vectors of channels from `c` on; returns the next channel.
  DYNACONV_INLINE_MEMBER int64_t add(const float* const* from, int64_t c, int64_t channels, const float* weight) {
    for (; c + kLanesOf<Vector> <= channels; c += kLanesOf<Vector>) {
      const float* const w = weight + c / kPatchBlock * kBlockWeights + c % kPatchBlock;
      dots += add_channels<Stride>(from, c, w, positions) * load<Vector>(w + 9 * kPatchBlock);
    }
    return c;
  }
};

// Rows x Columns positions; returns the first channel that fills no vector any more.
template <int Stride, typename Vector, int Rows, int Columns>
DYNACONV_INLINE int64_t piece(const float* const* from, int64_t channels, const float* weight, float* out, float& all) {
  Sums<Stride, Vector, Rows, Columns> sums;
  Sums<Stride, float4, Rows, Columns> quarters;
  const int64_t end = quarters.add(from, sums.add(from, 0, channels, weight), channels, weight);
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Columns; ++p) out[r * kPatchColumns + p] = total(sums.positions[r][p]) + total(quarters.positions[r][p]);
  all += total(sums.dots) + total(quarters.dots);
  return end;
}

// A patch in pieces whose sums fit sixteen registers: four positions of a line, and the other three.
template <int Stride, typename Vector>
DYNACONV_INLINE float pieces(const float* const* from, int64_t channels, const float* weight, float* sums) {
  float all = 0;
  int64_t done = 0;
  for (int r = 0; r < kPatchRows; ++r) {
    const float* const* const at = from + Stride * r * patch_line(Stride);
    float* const out = sums + r * kPatchColumns;
    done = piece<Stride, Vector, 1, 4>(at, channels, weight, out, all);
    piece<Stride, Vector, 1, 3>(at + Stride * 4, channels, weight, out + 4, all);
  }
  return all + add_rest<Stride>(from, done, channels, weight, sums);
}

#define DYNACONV_PATCH(NAME, STRIDE, TARGET, VECTOR)                                                              \
  TARGET float patch_##NAME##_##STRIDE(const void* const* from, int64_t channels, const float* weight, float* sums, int64_t) { \
    return pieces<STRIDE, VECTOR>(reinterpret_cast<const float* const*>(from), channels, weight, sums);           \
  }

DYNACONV_PATCH(plain, 1, , float4)
DYNACONV_PATCH(plain, 2, , float4)
#ifdef DYNACONV_X86
DYNACONV_PATCH(avx2, 1, DYNACONV_TARGET_AVX2, float8)
DYNACONV_PATCH(avx2, 2, DYNACONV_TARGET_AVX2, float8)
#endif

}  // namespace

int64_t patch_weight_floats(int dtype, int64_t channels) {
  const int64_t block = dtype == kBfloat16 ? 2 * kPatchBlock : kPatchBlock;
  return (channels + block - 1) / block * block * kPatchTapsPacked;
}

void pack_patch_weights(int dtype, int64_t channels, const float* weight, bool squeeze, float* packed) {
  const int64_t parts = dtype == kBfloat16 ? 2 : 1, block = parts * kPatchBlock;
  for (int64_t i = 0; i < patch_weight_floats(dtype, channels); ++i) packed[i] = 0;
  for (int64_t t = 0; t < 9 + squeeze; ++t)
    for (int64_t c = 0; c < channels; ++c)
      packed[((c / block * kPatchTapsPacked + t) * parts + c % parts) * kPatchBlock + c % block / parts] = weight[t * channels + c];
}

GatePatch gate_patch(int dtype, int stride) {
#ifdef DYNACONV_X86
  if (dtype == kBfloat16 || best_isa_level() == Isa::kAvx512) return wide_gate_patch(dtype, stride);
  if (best_isa_level() == Isa::kAvx2) return stride == 1 ? patch_avx2_1 : patch_avx2_2;
#endif
  (void)dtype;
  return stride == 1 ? patch_plain_1 : patch_plain_2;
}
