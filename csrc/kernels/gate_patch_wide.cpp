// Patches of gate logits with AVX-512: all positions at once, and all their sums added up together.

#include "../plan/plan.h"
#include "bfloat16.h"
#include "gate_patch_sums.h"
#include "isa.h"

#ifdef DYNACONV_X86

namespace {

constexpr int kPositions = kPatchRows * kPatchColumns;
constexpr int64_t kBlockWeights = int64_t{kPatchBlock} * kPatchTapsPacked;

// One vector from two, each half as long after its halves were added: in blocks of 2 * kHalf lanes the sums of `a`'s halves, then
// those of `b`'s.
#define DYNACONV_PICK(...) (__builtin_shufflevector(a, b, __VA_ARGS__))
template <int kHalf>
DYNACONV_INLINE float16 joined(float16 a, float16 b) {
  if constexpr (kHalf == 8)
    return DYNACONV_PICK(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           DYNACONV_PICK(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (kHalf == 4)
    return DYNACONV_PICK(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           DYNACONV_PICK(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  else if constexpr (kHalf == 2)
    return DYNACONV_PICK(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           DYNACONV_PICK(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  else
    return DYNACONV_PICK(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           DYNACONV_PICK(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

template <typename Vector>
struct Sums {
  Vector positions[kPatchRows][kPatchColumns] = {}, dots = {};
};

// What all positions add up to, and the rows that are their own: the first line's in the lower half, the second's in the upper.
struct Totals {
  float16 columns[8];

  DYNACONV_INLINE_MEMBER explicit Totals(const Sums<float16>& sums) {
#pragma GCC unroll 7
    for (int p = 0; p < kPatchColumns; ++p) columns[p] = joined<8>(sums.positions[0][p], sums.positions[1][p]);
    columns[7] = joined<8>(sums.dots, float16{});
  }
  DYNACONV_INLINE_MEMBER void add(const Sums<float8>& sums) {
#pragma GCC unroll 7
    for (int p = 0; p < kPatchColumns; ++p) columns[p] += concatenated(sums.positions[0][p], sums.positions[1][p]);
    columns[7] += concatenated(sums.dots, float8{});
  }
  DYNACONV_INLINE_MEMBER float finish(float* out) const {
    float16 v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = joined<4>(columns[i], columns[i + 4]);
    const float16 all = joined<1>(joined<2>(v[0], v[2]), joined<2>(v[1], v[3]));
    // Seven numbers of every eight.
    float lanes[16];
    store<float16>(lanes, all);
    __builtin_memcpy(out, lanes, kPatchColumns * sizeof(float));
    __builtin_memcpy(out + kPatchColumns, lanes + 8, kPatchColumns * sizeof(float));
    return lanes[kPatchColumns];
  }

 private:
  DYNACONV_INLINE_MEMBER static float16 concatenated(float8 a, float8 b) {
    return DYNACONV_PICK(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
};

// Whole vectors of channels from `c` on; returns the next channel.
template <int Stride, typename Vector>
DYNACONV_INLINE int64_t add_vectors(const float* const* from, int64_t c, int64_t channels, const float* weight, Sums<Vector>& sums,
                                    int64_t next) {
  for (; c + kLanesOf<Vector> <= channels; c += kLanesOf<Vector>) {
    const float* const w = weight + c / kPatchBlock * kBlockWeights;
    sums.dots += add_channels<Stride>(from, c, w, sums.positions, next) * load<Vector>(w + 9 * kPatchBlock);
  }
  return c;
}

template <int Stride>
DYNACONV_INLINE float patch(const float* const* from, int64_t channels, const float* weight, float* out, int64_t next) {
  Sums<float16> sums;
  int64_t c = add_vectors<Stride>(from, 0, channels, weight, sums, next);
  Totals totals(sums);
  if (c + kLanesOf<float8> <= channels) {
    Sums<float8> halves;
    c = add_vectors<Stride>(from, c, channels, weight, halves, next);
    totals.add(halves);
  }
  const float own = totals.finish(out);
  return c == channels ? own : own + add_rest<Stride>(from, c, channels, weight, out);
}

// Pairs of channels as they lie in memory; of the last ones those below `count`, and zeros.
template <bool Whole>
DYNACONV_INLINE word16 load_pairs(const Bfloat16* from, int64_t count) {
  word16 pairs = {};
  if constexpr (Whole) {
    __builtin_memcpy(&pairs, from, sizeof(pairs));
    return pairs;
  } else {
#ifdef DYNACONV_ONE_INSTRUCTION
    typedef short Shorts __attribute__((vector_size(64)));
    return (word16)__builtin_ia32_loaddquhi512_mask(reinterpret_cast<const short*>(from), Shorts{}, (1u << count) - 1);
#else
    __builtin_memcpy(&pairs, from, count * sizeof(Bfloat16));
    return pairs;
#endif
  }
}

// Weights that no register is left for: read at every use.
struct Stored {
  const float* at;
  DYNACONV_INLINE_MEMBER float16 operator[](int t) const { return load<float16>(at + t * 2 * kPatchBlock); }
};

// 32 channels, or the last `count`. A bfloat16 is the upper half of a float: every second channel is there after a shift,
// the others once the lower halves are gone. Both at once, since a row's line may have left the cache before a second walk.
template <int Stride, bool Whole>
DYNACONV_INLINE void add_pairs(const Bfloat16* const* from, int64_t c, int64_t count, const float* weight, Sums<float16>& sums,
                               int64_t next) {
  constexpr int kParts = Stride > 1 ? 2 : 1;
  float16 w[9], own[2][kParts] = {};
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    w[t] = load<float16>(weight + t * 2 * kPatchBlock);
    hold(w[t]);
  }
  Stored odd{weight + kPatchBlock};
#pragma GCC unroll 5
  for (int y = 0; y < Stride * (kPatchRows - 1) + 3; ++y) {
#pragma GCC unroll 15
    for (int x = 0; x < Stride * (kPatchColumns - 1) + 3; ++x) {
      const Bfloat16* const row = from[y * patch_line(Stride) + x] + c;
      const word16 pairs = load_pairs<Whole>(row, count);
      fetch_next<Stride, kPatchRows, kPatchColumns>(y, x, row, next);
      float16 value = (float16)(pairs << 16);
      hold(value);
      add_products<Stride>(y, x, value, w, sums.positions);
      if (is_own<Stride, kPatchRows, kPatchColumns>(y, x)) own[0][x % kParts] += value;
      value = (float16)(pairs & 0xffff0000u);
      hold(value);
      hold(odd.at);
      add_products<Stride>(y, x, value, odd, sums.positions);
      if (is_own<Stride, kPatchRows, kPatchColumns>(y, x)) own[1][x % kParts] += value;
    }
  }
  for (int i = 0; i < 2; ++i) {
    const float16 linear = load<float16>(weight + (18 + i) * kPatchBlock);
    for (int part = 0; part < kParts; ++part) sums.dots += own[i][part] * linear;
  }
}

template <int Stride>
DYNACONV_INLINE float patch(const Bfloat16* const* from, int64_t channels, const float* weight, float* out, int64_t next) {
  constexpr int64_t kPairs = 2 * kPatchBlock;
  Sums<float16> sums;
  int64_t c = 0;
  for (; c + kPairs <= channels; c += kPairs, weight += 2 * kBlockWeights) add_pairs<Stride, true>(from, c, kPairs, weight, sums, next);
  if (c < channels) add_pairs<Stride, false>(from, c, channels - c, weight, sums, next);
  return Totals(sums).finish(out);
}

#define DYNACONV_WIDE_PATCH(NAME, STRIDE, TARGET, T)                                                                        \
  TARGET float patch_##NAME##_##STRIDE(const void* const* from, int64_t channels, const float* weight, float* sums, int64_t next) { \
    return patch<STRIDE>(reinterpret_cast<const T* const*>(from), channels, weight, sums, next);                                  \
  }

DYNACONV_WIDE_PATCH(float32, 1, DYNACONV_TARGET_AVX512, float)
DYNACONV_WIDE_PATCH(float32, 2, DYNACONV_TARGET_AVX512, float)
DYNACONV_WIDE_PATCH(bfloat16, 1, DYNACONV_TARGET_AVX512, Bfloat16)
DYNACONV_WIDE_PATCH(bfloat16, 2, DYNACONV_TARGET_AVX512, Bfloat16)

}  // namespace

GatePatch wide_gate_patch(int dtype, int stride) {
  if (dtype == kBfloat16) return stride == 1 ? patch_bfloat16_1 : patch_bfloat16_2;
  return stride == 1 ? patch_float32_1 : patch_float32_2;
}

#endif
