// Patches of gate logits in bfloat16: pairs of channels as they lie in memory, two products in one instruction (vdpbf16ps).

#include "bfloat16.h"
#include "gate_patch_sums.h"
#include "gate_patch_totals.h"
#include "isa.h"

#ifdef DYNACONV_X86

namespace {

constexpr int64_t kPairs = 2 * kPatchBlock;  // channels of a block

// The channels of a block; of the last one those below `count`, and zeros.
template <bool Whole>
DYNACONV_BF16_INLINE word16 load_pairs(const Bfloat16* from, int64_t count) {
  if constexpr (!Whole) return (word16)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), from);
  word16 pairs;
  __builtin_memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}

template <int Stride, bool Whole>
DYNACONV_BF16_INLINE void add_block(const Bfloat16* const* from, int64_t c, int64_t count, const Bfloat16* weight,
                                    PatchSums<float16>& sums, int64_t next) {
  // Many rows of their own would wait for each other in one sum.
  constexpr int kParts = Stride > 1 ? 4 : 2;
  word16 w[kPatchTapsPacked];
  float16 own[kParts] = {};
#pragma GCC unroll 10
  for (int t = 0; t < kPatchTapsPacked; ++t) w[t] = load_pairs<true>(weight + t * kPairs, kPairs);
#pragma GCC unroll 5
  for (int y = 0; y < Stride * (kPatchRows - 1) + 3; ++y) {
#pragma GCC unroll 15
    for (int x = 0; x < Stride * (kPatchColumns - 1) + 3; ++x) {
      const Bfloat16* const row = from[y * patch_line(Stride) + x] + c;
      const word16 pairs = load_pairs<Whole>(row, count);
      fetch_next<Stride, kPatchRows, kPatchColumns>(y, x, row, next);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const int i = position_of<Stride, kPatchRows, kPatchColumns>(y, x, t);
        if (i < 0) continue;
        float16& sum = sums.positions[i / kPatchColumns][i % kPatchColumns];
        sum = dot_pairs(sum, pairs, w[t]);
      }
      if (is_own<Stride, kPatchRows, kPatchColumns>(y, x)) own[x % kParts] = dot_pairs(own[x % kParts], pairs, w[9]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) sums.dots += own[i];
}

template <int Stride>
DYNACONV_TARGET_AVX512_BF16 float patch(const void* const* rows, int64_t channels, const void* weights, float* out, int64_t next) {
  const auto* const* const from = reinterpret_cast<const Bfloat16* const*>(rows);
  const auto* weight = static_cast<const Bfloat16*>(weights);
  PatchSums<float16> sums;
  int64_t c = 0;
  for (; c + kPairs <= channels; c += kPairs, weight += kPairs * kPatchTapsPacked)
    add_block<Stride, true>(from, c, kPairs, weight, sums, next);
  if (c < channels) add_block<Stride, false>(from, c, channels - c, weight, sums, next);
  return PatchTotals(sums).finish(out);
}

}  // namespace

GatePatch gate_patch_bfloat16(int stride) { return stride == 1 ? patch<1> : patch<2>; }

#endif
