#include "gate_patch.h"

#include "isa.h"
#include "vectors.h"

namespace {

constexpr int kLine = kPatchColumns + 2;

// One step of channels of `Rows` x `Columns` positions; what their own rows add up to is returned.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE Vector add_channels(const float* const* from, int64_t c, const Vector (&w)[9], Vector (&sums)[Rows][Columns]) {
  Vector own = {};
#pragma GCC unroll 4
  for (int y = 0; y < Rows + 2; ++y) {
#pragma GCC unroll 9
    for (int x = 0; x < Columns + 2; ++x) {
      Vector value = load<Vector>(from[y * kLine + x] + c);
      hold(value);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const int r = y - t / 3, p = x - t % 3;
        if (r >= 0 && r < Rows && p >= 0 && p < Columns) sums[r][p] += value * w[t];
      }
      if (y >= 1 && y <= Rows && x >= 1 && x <= Columns) own += value;
    }
  }
  return own;
}

template <typename Vector, int Rows, int Columns>
struct Sums {
  Vector positions[Rows][Columns] = {}, dots = {};

  // Whole vectors of channels from `c` on; returns the next channel.
  DYNACONV_INLINE_MEMBER int64_t add(const float* const* from, int64_t c, int64_t channels, const float* weight, const float* linear) {
    for (; c + kLanesOf<Vector> <= channels; c += kLanesOf<Vector>) {
      Vector w[9];
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        w[t] = load<Vector>(weight + t * channels + c);
        hold(w[t]);
      }
      const Vector own = add_channels<Vector, Rows, Columns>(from, c, w, positions);
      if (linear) dots += own * load<Vector>(linear + c);
    }
    return c;
  }
  DYNACONV_INLINE_MEMBER float finish(float* out) const {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 7
      for (int p = 0; p < Columns; ++p) out[r * kPatchColumns + p] = total(positions[r][p]);
    return total(dots);
  }
};

// Rows x Columns positions; returns the first channel that fills no vector any more.
template <typename Vector, typename Half, int Rows, int Columns>
DYNACONV_INLINE int64_t piece(const float* const* from, int64_t channels, const float* weight, const float* linear, float* out,
                              float& all) {
  Sums<Vector, Rows, Columns> sums;
  const int64_t whole = sums.add(from, 0, channels, weight, linear);
  if constexpr (sizeof(Half) == sizeof(Vector)) {
    all += sums.finish(out);
    return whole;
  } else {
    Sums<Half, Rows, Columns> halves;
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 7
      for (int p = 0; p < Columns; ++p) halves.positions[r][p] = folded(sums.positions[r][p]);
    halves.dots = folded(sums.dots);
    const int64_t end = halves.add(from, whole, channels, weight, linear);
    all += halves.finish(out);
    return end;
  }
}

// Channels that are left when no vector is filled any more.
DYNACONV_INLINE void rest(const float* const* from, int64_t first, int64_t channels, const float* weight, const float* linear,
                          float* out, float& all) {
  for (int64_t c = first; c < channels; ++c)
    for (int r = 0; r < kPatchRows; ++r)
      for (int p = 0; p < kPatchColumns; ++p) {
        for (int t = 0; t < 9; ++t) out[r * kPatchColumns + p] += from[(r + t / 3) * kLine + p + t % 3][c] * weight[t * channels + c];
        if (linear) all += from[(r + 1) * kLine + p + 1][c] * linear[c];
      }
}

// A patch in pieces whose sums fit the registers: Rows lines of Columns positions, and of what is left of a line.
template <typename Vector, typename Half, int Rows, int Columns>
DYNACONV_INLINE float pieces(const float* const* from, int64_t channels, const float* weight, const float* linear, float* sums) {
  constexpr int kLeft = kPatchColumns - Columns;
  float all = 0;
  int64_t done = 0;
  for (int r = 0; r < kPatchRows; r += Rows) {
    const float* const* const at = from + r * kLine;
    float* const out = sums + r * kPatchColumns;
    done = piece<Vector, Half, Rows, Columns>(at, channels, weight, linear, out, all);
    if constexpr (kLeft > 0) piece<Vector, Half, Rows, kLeft>(at + Columns, channels, weight, linear, out + Columns, all);
  }
  rest(from, done, channels, weight, linear, sums, all);
  return all;
}

#define DYNACONV_PATCH(NAME, TARGET, VECTOR, HALF, ROWS, COLUMNS)                                                       \
  TARGET float patch_##NAME(const float* const* from, int64_t channels, const float* weight, const float* linear, float* sums) { \
    return pieces<VECTOR, HALF, ROWS, COLUMNS>(from, channels, weight, linear, sums);                                   \
  }

DYNACONV_PATCH(plain, , float4, float4, 1, 4)
#ifdef DYNACONV_X86
DYNACONV_PATCH(avx2, DYNACONV_TARGET_AVX2, float8, float4, 1, 4)
DYNACONV_PATCH(avx512, DYNACONV_TARGET_AVX512, float16, float8, 2, 7)
#endif

}  // namespace

float gate_patch(const float* const* from, int64_t channels, const float* weight, const float* linear, float* sums) {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return patch_avx512(from, channels, weight, linear, sums);
  if (best_isa_level() == Isa::kAvx2) return patch_avx2(from, channels, weight, linear, sums);
#endif
  return patch_plain(from, channels, weight, linear, sums);
}
