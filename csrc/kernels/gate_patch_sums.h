// What patches of every width of vectors have in common.

#pragma once

#include "gate_patch.h"
#include "vectors.h"

constexpr int kPatchBlock = 16, kPatchTapsPacked = 10;  // channels and weights of a block: see gate_patch.h
constexpr int64_t kPatchBlockWeights = int64_t{kPatchBlock} * kPatchTapsPacked;

// Which of Rows x Columns positions tap `t` of row x of line y of what they read belongs to, row by row; -1: none.
template <int Stride, int Rows, int Columns>
constexpr int position_of(int y, int x, int t) {
  const int down = y - t / 3, right = x - t % 3;
  if (down < 0 || right < 0 || down % Stride || right % Stride) return -1;
  return down / Stride < Rows && right / Stride < Columns ? down / Stride * Columns + right / Stride : -1;
}

// Whether the row counts to these positions alone.
template <int Stride, int Rows, int Columns>
constexpr bool is_own(int y, int x) {
  return y >= 1 && y <= Stride * Rows && x >= 1 && x <= Stride * Columns;
}

// Asks for what the next patch reads at the place of this row, where no patch before it has read that. Past the end of a map
// this asks for memory that may not be there, which a prefetch may.
template <int Stride, int Rows, int Columns>
DYNACONV_INLINE void fetch_next(int y, int x, const void* row, int64_t next) {
  if (y >= Stride * (Rows - 1) + 3 - Stride * Rows && x >= Stride * (Columns - 1) + 3 - Stride * Columns)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + next), 0, 2);
}

// One vector of channels from `c` on; what the rows of their own add up to is returned.
template <int Stride, typename Vector, int Rows, int Columns>
DYNACONV_INLINE Vector add_channels(const float* const* from, int64_t c, const float* weight, Vector (&sums)[Rows][Columns],
                                    int64_t next = 0) {
  // Many rows of their own would wait for each other in one sum.
  constexpr int kParts = Stride > 1 && sizeof(Vector) == 64 ? 4 : 1;
  Vector w[9], own[kParts] = {};
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    w[t] = load<Vector>(weight + t * kPatchBlock);
    hold(w[t]);
  }
#pragma GCC unroll 5
  for (int y = 0; y < Stride * (Rows - 1) + 3; ++y) {
#pragma GCC unroll 15
    for (int x = 0; x < Stride * (Columns - 1) + 3; ++x) {
      Vector value = load<Vector>(from[y * patch_line(Stride) + x] + c);
      hold(value);
      if constexpr (sizeof(Vector) == 64) fetch_next<Stride, Rows, Columns>(y, x, from[y * patch_line(Stride) + x] + c, next);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const int i = position_of<Stride, Rows, Columns>(y, x, t);
        if (i >= 0) sums[i / Columns][i % Columns] += value * w[t];
      }
      if (is_own<Stride, Rows, Columns>(y, x)) own[x % kParts] += value;
    }
  }
  if constexpr (kParts == 4) return (own[0] + own[1]) + (own[2] + own[3]);
  else return own[0];
}

// Channels that fill no vector, from `first` on.
template <int Stride>
DYNACONV_INLINE float add_rest(const float* const* from, int64_t first, int64_t channels, const float* weight, float* sums) {
  constexpr int kLine = patch_line(Stride);
  float own = 0;
  for (int64_t c = first; c < channels; ++c) {
    const float* const w = weight + c / kPatchBlock * kPatchBlock * kPatchTapsPacked + c % kPatchBlock;
    for (int i = 0; i < kPatchRows * kPatchColumns; ++i) {
      const float* const* const at = from + i / kPatchColumns * Stride * kLine + i % kPatchColumns * Stride;
      for (int t = 0; t < 9; ++t) sums[i] += at[t / 3 * kLine + t % 3][c] * w[t * kPatchBlock];
    }
    for (int y = 1; y <= Stride * kPatchRows; ++y)
      for (int x = 1; x <= Stride * kPatchColumns; ++x) own += from[y * kLine + x][c] * w[9 * kPatchBlock];
  }
  return own;
}
