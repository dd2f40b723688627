// All sums of a patch in AVX-512 registers, added up together in the end.

#pragma once

#include "gate_patch.h"
#include "vectors.h"

// One vector from two, each half as long after its halves were added: in blocks of 2 * kHalf lanes the sums of `a`'s halves, then
// those of `b`'s.
template <int kHalf>
DYNACONV_INLINE float16 joined(float16 a, float16 b) {
  if constexpr (kHalf == 8)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (kHalf == 4)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  else if constexpr (kHalf == 2)
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  else
    return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// What a patch adds up: of each position, and of the rows that are its own.
template <typename Vector>
struct PatchSums {
  Vector positions[kPatchRows][kPatchColumns] = {}, dots = {};
};

// What all positions add up to, and the rows that are their own: the first line's in the lower half, the second's in the upper.
struct PatchTotals {
  float16 columns[8];

  DYNACONV_INLINE_MEMBER explicit PatchTotals(const PatchSums<float16>& sums) {
#pragma GCC unroll 7
    for (int p = 0; p < kPatchColumns; ++p) columns[p] = joined<8>(sums.positions[0][p], sums.positions[1][p]);
    columns[7] = joined<8>(sums.dots, float16{});
  }
  DYNACONV_INLINE_MEMBER void add(const PatchSums<float8>& sums) {
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
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
};
