#include "gate_patch.h"

#include <cstring>

#include "../plan/plan.h"
#include "bfloat16.h"
#include "gate_patch_sums.h"
#include "isa.h"

namespace {

template <int Stride, typename Vector, int Rows, int Columns>
struct Sums {
  Vector positions[Rows][Columns] = {}, dots = {};

  // Whole vectors of channels from `c` on; returns the next channel.
  DYNACONV_INLINE_MEMBER int64_t add(const float* const* from, int64_t c, int64_t channels, const float* weight) {
    for (; c + kLanesOf<Vector> <= channels; c += kLanesOf<Vector>) {
      const float* const w = weight + c / kPatchBlock * kPatchBlockWeights + c % kPatchBlock;
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

template <int Stride>
float patch_plain(const void* const* from, int64_t channels, const void* weight, float* sums, int64_t) {
  return pieces<Stride, float4>(reinterpret_cast<const float* const*>(from), channels, static_cast<const float*>(weight), sums);
}
#ifdef DYNACONV_X86
template <int Stride>
DYNACONV_TARGET_AVX2 float patch_avx2(const void* const* from, int64_t channels, const void* weight, float* sums, int64_t) {
  return pieces<Stride, float8>(reinterpret_cast<const float* const*>(from), channels, static_cast<const float*>(weight), sums);
}
#endif

void put(float* to, float value) { *to = value; }
void put(Bfloat16* to, float value) { *to = narrowed(value); }

template <typename T>
void pack(int64_t channels, const float* weight, int64_t taps, T* packed) {
  constexpr int64_t kBlock = 64 / sizeof(T);
  std::memset(packed, 0, (channels + kBlock - 1) / kBlock * kBlock * kPatchTapsPacked * sizeof(T));
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < channels; ++c)
      put(packed + (c / kBlock * kPatchTapsPacked + t) * kBlock + c % kBlock, weight[t * channels + c]);
}

}  // namespace

int64_t patch_weight_bytes(int dtype, int64_t channels) {
  const int64_t block = dtype == kBfloat16 ? 32 : 16;
  return (channels + block - 1) / block * 64 * kPatchTapsPacked;
}

void pack_patch_weights(int dtype, int64_t channels, const float* weight, bool squeeze, void* packed) {
  if (dtype == kBfloat16) pack(channels, weight, 9 + squeeze, static_cast<Bfloat16*>(packed));
  else pack(channels, weight, 9 + squeeze, static_cast<float*>(packed));
}

GatePatch gate_patch(int dtype, int stride) {
#ifdef DYNACONV_X86
  if (dtype == kBfloat16) return gate_patch_bfloat16(stride);
  if (best_isa_level() == Isa::kAvx512) return gate_patch_avx512(stride);
  if (best_isa_level() == Isa::kAvx2) return stride == 1 ? patch_avx2<1> : patch_avx2<2>;
#endif
  (void)dtype;
  return stride == 1 ? patch_plain<1> : patch_plain<2>;
}
