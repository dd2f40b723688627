// Micro-kernels of the indirect GEMM in bfloat16: two channels a lane (vdpbf16ps), sums in float32.

#include "isa.h"

#ifdef DYNACONV_X86
#define DYNACONV_INLINE_TARGET DYNACONV_TARGET_AVX512_BF16
#endif

#include "gemm_bfloat16.h"

#include "activations.h"
#include "bfloat16.h"
#include "next_rows.h"

#ifdef DYNACONV_X86

namespace {

template <typename Vector>
struct PairsOf;
template <>
struct PairsOf<float16> {
  using Type = word16;
};
template <>
struct PairsOf<float8> {
  using Type = word8;
};
template <typename Vector>
using Pairs = typename PairsOf<Vector>::Type;

// One pair of channels of every row times one row of weights.
template <typename Vector, int Rows, int Columns, bool Odd>
DYNACONV_BF16_INLINE void multiply_pair(const char* const* from, int64_t at, const char* weight, Vector (*sums)[Columns]) {
  Pairs<Vector> w[Columns];
#pragma GCC unroll 2
  for (int c = 0; c < Columns; ++c) __builtin_memcpy(&w[c], weight + c * sizeof(Vector), sizeof(Vector));
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    uint32_t pair = 0;
    // An odd last channel comes alone: what lies behind it may be anything, also not a number.
    __builtin_memcpy(&pair, from[r] + at, Odd ? 2 : 4);
    const Pairs<Vector> value = Pairs<Vector>{} + pair;
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) sums[r][c] = dot_pairs(sums[r][c], value, w[c]);
  }
}

template <typename Vector>
DYNACONV_BF16_INLINE Vector clamped(Vector v, Vector low, Vector high) {
  return at_most(at_least(v, low), high);
}

template <typename Vector, int Columns>
DYNACONV_BF16_INLINE void store_row(Bfloat16* to, const Vector* values) {
  if constexpr (Columns == 2) _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]));
  else store<Vector>(to, values[0]);
}

// Any activation, residual, number of columns and type of result; sums wait in `block`, [rows][kPanel].
DYNACONV_TARGET_AVX512_BF16 void finish(const TileCall& call, const float* block, int rows, int column, int width) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < width; c += 16) {
      const __mmask16 lanes = first_lanes(width - c < 16 ? width - c : 16);
      const int64_t at = call.column + column + c;
      float16 value = activate<float16>(load<float16>(block + r * kPanel + c), call.activation);
      if (call.residual && call.float_out)
        value += (float16)_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(call.residual[r]) + at);
      else if (call.residual)
        value += load(static_cast<const Bfloat16*>(call.residual[r]) + at, lanes);
      value = activate<float16>(value, call.final_activation);
      if (call.float_out) _mm512_mask_storeu_ps(static_cast<float*>(call.out[r]) + at, lanes, (__m512)value);
      else store(static_cast<Bfloat16*>(call.out[r]) + at, value, lanes);
    }
  }
}

// Whole vectors, activations that are clamps, bfloat16 results: straight from the registers. `Floor`: see only_a_floor.
template <typename Vector, int Rows, int Columns, bool Floor>
DYNACONV_BF16_INLINE void finish_clamped(const TileCall& call, Vector (*sums)[Columns], int column) {
  const Bounds first = clamp_bounds(call.activation), last = clamp_bounds(call.final_activation);
  const Vector low = broadcast<Vector>(first.low), high = broadcast<Vector>(first.high);
  const Vector last_low = broadcast<Vector>(last.low), last_high = broadcast<Vector>(last.high);
  // The bounds of one activation lie within those of the other.
  const Vector inner_low = at_least(low, last_low), inner_high = at_most(high, last_high);
  const int64_t at = call.column + column;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (!call.residual) {
#pragma GCC unroll 2
      for (int c = 0; c < Columns; ++c) {
        sums[r][c] = at_least(sums[r][c], inner_low);
        if (!Floor) sums[r][c] = at_most(sums[r][c], inner_high);
      }
    } else {
      const Bfloat16* add = static_cast<const Bfloat16*>(call.residual[r]) + at;
#pragma GCC unroll 2
      for (int c = 0; c < Columns; ++c) {
        const Vector value = Floor ? sums[r][c] : clamped<Vector>(sums[r][c], low, high);
        sums[r][c] = at_least(Vector(value + load<Vector>(add + c * kLanesOf<Vector>)), last_low);
        if (!Floor) sums[r][c] = at_most(sums[r][c], last_high);
      }
    }
    store_row<Vector, Columns>(static_cast<Bfloat16*>(call.out[r]) + at, sums[r]);
  }
}

// Likewise float32 results without a residual, as Winograd's products are.
template <typename Vector, int Rows, int Columns>
DYNACONV_BF16_INLINE void finish_floats(const TileCall& call, Vector (*sums)[Columns], int column) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* out = static_cast<float*>(call.out[r]) + call.column + column;
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) store<Vector>(out + c * kLanesOf<Vector>, sums[r][c]);
  }
}

// `Rows` x `Columns` vectors of sums stay in registers.
template <typename Vector, int Rows, int Columns>
DYNACONV_BF16_INLINE void piece(const TileCall& call, int column) {
  constexpr int kLanes = kLanesOf<Vector>;
  constexpr int64_t kWeightBytes = kPanel * 4;
  NextRowsFetch next(call, sizeof(Bfloat16));
  Vector sums[Rows][Columns];
  start_sums<Vector, Rows, Columns>(call.bias + column, sums);
  const char* weight = static_cast<const char*>(call.weight) + column * 4;
  const int64_t whole = call.channels / 2 * 4;
  // One register instead of two, and none to spare: what GCC moves into vectors costs the products.
  const int64_t* ahead = call.ahead;
  for (int t = 0; t < call.taps_count; ++t) {
    const char* from[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) from[r] = static_cast<const char*>(call.taps[t * kMaxRows + r]) + call.tap_offset * 2;
    for (int64_t start = 0; start < whole; start += kBurstBytes) {
      next.burst(t, start);
      const int64_t end = start + kBurstBytes < whole ? start + kBurstBytes : whole;
      for (int64_t at = start; at < end; at += 4, weight += kWeightBytes) {
        hold(ahead);
        __builtin_prefetch(beyond(weight, ahead[0]), 0, 2);
        __builtin_prefetch(beyond(weight, 64 + ahead[1]), 0, 2);
        multiply_pair<Vector, Rows, Columns, false>(from, at, weight, sums);
      }
    }
    if (call.channels % 2) {
      multiply_pair<Vector, Rows, Columns, true>(from, whole, weight, sums);
      weight += kWeightBytes;
    }
  }
  const int width = call.columns - column < Columns * kLanes ? call.columns - column : Columns * kLanes;
  if (width == Columns * kLanes && !call.float_out && is_clamp(call.activation) && is_clamp(call.final_activation)) {
    if (only_a_floor(call)) return finish_clamped<Vector, Rows, Columns, true>(call, sums, column);
    return finish_clamped<Vector, Rows, Columns, false>(call, sums, column);
  }
  if (width == Columns * kLanes && call.float_out && !call.residual && call.activation + call.final_activation == kNone)
    return finish_floats<Vector, Rows, Columns>(call, sums, column);
  float block[Rows * kPanel];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < Columns; ++c) store<Vector>(block + r * kPanel + c * kLanes, sums[r][c]);
  // What finishes the block reads 16 columns.
  if constexpr (kLanes < 16)
    for (int r = 0; r < Rows; ++r) store<Vector>(block + r * kPanel + kLanes, Vector{});
  finish(call, block, Rows, column, width);
}

// Columns in pieces of two vectors, one, or half of one at the end of a panel.
template <int Rows>
DYNACONV_TARGET_AVX512_BF16 void tile(const TileCall& call) {
  for (int column = 0; column < call.columns;) {
    const int left = call.columns - column;
    if (left > 24) {
      piece<float16, Rows, 2>(call, column);
      column += 32;
    } else if (left > 8) {
      piece<float16, Rows, 1>(call, column);
      column += 16;
    } else {
      piece<float8, Rows, 1>(call, column);
      column += 8;
    }
  }
}

constexpr GemmTile kTiles[kMaxRows] = {tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>,  tile<6>,  tile<7>,
                                       tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};

}  // namespace

GemmTile gemm_tile_bfloat16(int rows) { return has_bfloat16() ? kTiles[rows - 1] : nullptr; }

#else

GemmTile gemm_tile_bfloat16(int) { return nullptr; }

#endif
