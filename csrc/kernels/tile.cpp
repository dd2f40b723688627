// Micro-kernels and their dispatch. The template is written with compiler vectors of the instruction set's width, so
// that the same source serves AVX-512, AVX2 and everything else.

#include "tile.h"


#include "isa.h"
#include "vectors.h"

namespace {

// `Rows` x 2 vectors of accumulators stay in registers; rows and columns of the tile are walked in such pieces.
template <typename Vector, int Rows>
DYNACONV_INLINE void tile_piece(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                                const float* bias, float* block, int row, int column) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  Vector sums[Rows][2];
  const Vector start0 = load<Vector>(bias + column);
  const Vector start1 = load<Vector>(bias + column + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    sums[r][0] = start0;
    sums[r][1] = start1;
  }
  const float* w = weight + column;
  for (int t = 0; t < taps_count; ++t) {
    const float* from[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) from[r] = taps[t * kRows + row + r];
    for (int64_t k = 0; k < channels; ++k, w += kColumns) {
      const Vector w0 = load<Vector>(w);
      const Vector w1 = load<Vector>(w + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float value = from[r][k];
        sums[r][0] += w0 * value;
        sums[r][1] += w1 * value;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store<Vector>(block + (row + r) * kColumns + column, sums[r][0]);
    store<Vector>(block + (row + r) * kColumns + column + kLanes, sums[r][1]);
  }
}

template <typename Vector, int Rows>
DYNACONV_INLINE void whole_tile(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                                const float* bias, float* block) {
  constexpr int kStep = 2 * sizeof(Vector) / sizeof(float);
  static_assert(kRows % Rows == 0 && kColumns % kStep == 0, "pieces must cover the tile");
  for (int column = 0; column < kColumns; column += kStep)
    for (int row = 0; row < kRows; row += Rows)
      tile_piece<Vector, Rows>(taps, taps_count, channels, weight, bias, block, row, column);
}

template <typename Vector>
DYNACONV_INLINE void depthwise_pixel(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                                     const float* bias, float* out) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sum = load<Vector>(bias + c);
    for (int t = 0; t < taps_count; ++t)
      sum += load<Vector>(weight + t * channels + c) * load<Vector>(taps[t * kRows] + c);
    store<Vector>(out + c, sum);
  }
  for (; c < channels; ++c) {
    float sum = bias[c];
    for (int t = 0; t < taps_count; ++t) sum += weight[t * channels + c] * taps[t * kRows][c];
    out[c] = sum;
  }
}

template <typename Vector>
DYNACONV_INLINE void plane_row(const float* from, const int64_t* offsets, const float* weight, int taps_count,
                               float bias, int64_t count, float* out) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  for (int64_t i = 0; i < count; i += kLanes) {
    Vector sum = Vector{} + bias;
    for (int t = 0; t < taps_count; ++t) sum += load<Vector>(from + offsets[t] + i) * weight[t];
    store<Vector>(out + i, sum);
  }
}

template <typename Vector>
DYNACONV_INLINE float dot(const float* a, const float* b, int64_t count, float start) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    sums += load<Vector>(a + i) * load<Vector>(b + i);
  for (; i < count; ++i) start += a[i] * b[i];
  for (int lane = 0; lane < kLanes; ++lane) start += sums[lane];
  return start;
}

template <typename Vector>
DYNACONV_INLINE void mask_row(const float* x, const float* taps, int64_t height, int64_t width, int64_t channels,
                              int64_t stride, int64_t oy, int64_t out_width, float offset, float* z) {
  for (int64_t ox = 0; ox < out_width; ++ox) {
    // The taps of one kernel row are contiguous in memory, and so are their weights: up to three long products.
    const int64_t left = ox * stride - 1 < 0 ? 0 : ox * stride - 1;
    const int64_t right = ox * stride + 2 > width ? width : ox * stride + 2;
    const int64_t skip = left - (ox * stride - 1);
    float sum = offset;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t y = oy * stride - 1 + i;
      if (y < 0 || y >= height) continue;
      sum = dot<Vector>(x + (y * width + left) * channels, taps + (3 * i + skip) * channels, (right - left) * channels, sum);
    }
    z[ox] = sum;
  }
}

template <typename Vector>
DYNACONV_INLINE float mean_dot(const float* x, int64_t count, int64_t channels, const float* weight) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  double total = 0;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector sums = {};
    for (int64_t p = 0; p < count; ++p) sums += load<Vector>(x + p * channels + c);
    for (int lane = 0; lane < kLanes; ++lane) total += double(sums[lane]) * weight[c + lane];
  }
  for (; c < channels; ++c) {
    float sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += x[p * channels + c];
    total += double(sum) * weight[c];
  }
  return static_cast<float>(total / double(count));
}

// `Fixed` experts are known to the compiler, so that their shares stay in registers; 0 takes any number.
template <typename Vector, int Fixed>
DYNACONV_INLINE void mix_columns(const float* experts, int count, const float* shares, const float* scale,
                                 int taps_count, int64_t channels, float* mixed, int column) {
  const int n = Fixed ? Fixed : count;
  for (int t = 0; t < taps_count; ++t) {
    Vector own[Fixed ? Fixed : 1];
    if constexpr (Fixed > 0) {
#pragma GCC unroll 16
      for (int e = 0; e < Fixed; ++e) own[e] = load<Vector>(shares + e * kColumns + column) * scale[t];
    }
    const float* from = experts + int64_t{t} * channels * n * kColumns + column;
    float* to = mixed + int64_t{t} * channels * kColumns + column;
    for (int64_t k = 0; k < channels; ++k, from += n * kColumns, to += kColumns) {
      Vector sum = {};
      if constexpr (Fixed > 0) {
#pragma GCC unroll 16
        for (int e = 0; e < Fixed; ++e) sum += own[e] * load<Vector>(from + e * kColumns);
      } else {
        for (int e = 0; e < n; ++e)
          sum += load<Vector>(shares + e * kColumns + column) * scale[t] * load<Vector>(from + e * kColumns);
      }
      store<Vector>(to, sum);
    }
  }
}

template <typename Vector>
DYNACONV_INLINE void mix_panel(const float* experts, int count, const float* shares, const float* scale,
                               int taps_count, int64_t channels, float* mixed) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  for (int column = 0; column < kColumns; column += kLanes) {
    switch (count) {
      case 1: mix_columns<Vector, 1>(experts, count, shares, scale, taps_count, channels, mixed, column); break;
      case 4: mix_columns<Vector, 4>(experts, count, shares, scale, taps_count, channels, mixed, column); break;
      case 6: mix_columns<Vector, 6>(experts, count, shares, scale, taps_count, channels, mixed, column); break;
      case 8: mix_columns<Vector, 8>(experts, count, shares, scale, taps_count, channels, mixed, column); break;
      default: mix_columns<Vector, 0>(experts, count, shares, scale, taps_count, channels, mixed, column); break;
    }
  }
}

#define DYNACONV_KERNELS(NAME, TARGET, VECTOR, ROWS)                                                                  \
  TARGET void tile_##NAME(const float* const* taps, int taps_count, int64_t channels, const float* weight,           \
                          const float* bias, float* block) {                                                         \
    whole_tile<VECTOR, ROWS>(taps, taps_count, channels, weight, bias, block);                                       \
  }                                                                                                                  \
  TARGET void depthwise_##NAME(const float* const* taps, int taps_count, int64_t channels, const float* weight,      \
                               const float* bias, float* out) {                                                      \
    depthwise_pixel<VECTOR>(taps, taps_count, channels, weight, bias, out);                                          \
  }                                                                                                                  \
  TARGET void mask_row_##NAME(const float* x, const float* taps, int64_t height, int64_t width, int64_t channels,    \
                              int64_t stride, int64_t oy, int64_t out_width, float offset, float* z) {               \
    mask_row<VECTOR>(x, taps, height, width, channels, stride, oy, out_width, offset, z);                            \
  }                                                                                                                  \
  TARGET float mean_##NAME(const float* x, int64_t count, int64_t channels, const float* weight) {                   \
    return mean_dot<VECTOR>(x, count, channels, weight);                                                             \
  }                                                                                                                  \
  TARGET void mix_##NAME(const float* experts, int count, const float* shares, const float* scale, int taps_count,   \
                         int64_t channels, float* mixed) {                                                           \
    mix_panel<VECTOR>(experts, count, shares, scale, taps_count, channels, mixed);                                   \
  }                                                                                                                  \
  TARGET void plane_##NAME(const float* from, const int64_t* offsets, const float* weight, int taps_count,           \
                           float bias, int64_t count, float* out) {                                                  \
    plane_row<VECTOR>(from, offsets, weight, taps_count, bias, count, out);                                          \
  }

DYNACONV_KERNELS(plain, , float4, 4)
#ifdef DYNACONV_X86
DYNACONV_KERNELS(avx2, DYNACONV_TARGET_AVX2, float8, 6)
DYNACONV_KERNELS(avx512, DYNACONV_TARGET_AVX512, float16, 12)
#endif

struct Kernels {
  TileFunction tile;
  DepthwiseFunction depthwise;
  MaskRowFunction mask_row;
  MeanFunction mean;
  MixFunction mix;
  PlaneFunction plane;
};

// The one table that says which kernel runs on which processor.
Kernels choose() {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512)
    return {tile_avx512, depthwise_avx512, mask_row_avx512, mean_avx512, mix_avx512, plane_avx512};
  if (best_isa_level() == Isa::kAvx2)
    return {tile_avx2, depthwise_avx2, mask_row_avx2, mean_avx2, mix_avx2, plane_avx2};
#endif
  return {tile_plain, depthwise_plain, mask_row_plain, mean_plain, mix_plain, plane_plain};
}

const Kernels& best() {
  static const Kernels kernels = choose();
  return kernels;
}

}  // namespace

TileFunction best_tile() { return best().tile; }
DepthwiseFunction best_depthwise() { return best().depthwise; }
MaskRowFunction best_mask_row() { return best().mask_row; }
MeanFunction best_mean() { return best().mean; }
MixFunction best_mix() { return best().mix; }
PlaneFunction best_plane() { return best().plane; }
