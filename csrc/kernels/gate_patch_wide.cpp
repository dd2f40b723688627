// Patches of gate logits with AVX-512: all positions at once.

#include "gate_patch_sums.h"
#include "gate_patch_totals.h"
#include "isa.h"

#ifdef DYNACONV_X86

namespace {

// Whole vectors of channels from `c` on; returns the next channel.
template <int Stride, typename Vector>
DYNACONV_INLINE int64_t add_vectors(const float* const* from, int64_t c, int64_t channels, const float* weight, PatchSums<Vector>& sums,
                                    int64_t next) {
  for (; c + kLanesOf<Vector> <= channels; c += kLanesOf<Vector>) {
    const float* const w = weight + c / kPatchBlock * kPatchBlockWeights;
    sums.dots += add_channels<Stride>(from, c, w, sums.positions, next) * load<Vector>(w + 9 * kPatchBlock);
  }
  return c;
}

template <int Stride>
DYNACONV_INLINE float patch(const float* const* from, int64_t channels, const float* weight, float* out, int64_t next) {
  PatchSums<float16> sums;
  int64_t c = add_vectors<Stride>(from, 0, channels, weight, sums, next);
  PatchTotals totals(sums);
  if (c + kLanesOf<float8> <= channels) {
    PatchSums<float8> halves;
    c = add_vectors<Stride>(from, c, channels, weight, halves, next);
    totals.add(halves);
  }
  const float own = totals.finish(out);
  return c == channels ? own : own + add_rest<Stride>(from, c, channels, weight, out);
}

template <int Stride>
DYNACONV_TARGET_AVX512 float patch_avx512(const void* const* from, int64_t channels, const void* weight, float* sums, int64_t next) {
  return patch<Stride>(reinterpret_cast<const float* const*>(from), channels, static_cast<const float*>(weight), sums, next);
}

}  // namespace

GatePatch gate_patch_avx512(int stride) { return stride == 1 ? patch_avx512<1> : patch_avx512<2>; }

#endif
