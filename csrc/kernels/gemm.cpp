// Micro-kernels of the indirect GEMM. One template: the vector width and the rows that fit the registers differ.

#include "gemm.h"

#include <array>

#include "activations.h"
#include "gemm_bfloat16.h"
#include "isa.h"
#include "next_rows.h"
#include "vectors.h"

namespace {

template <typename Vector>
DYNACONV_INLINE Vector clamped(Vector v, Vector low, Vector high) {
  return at_most(at_least(v, low), high);
}

// The switch lies outside of the loop: what is left inside is straight code.
template <typename Vector>
DYNACONV_INLINE void activate_block(float* values, int count, int activation) {
#define DYNACONV_CASE(ACTIVATION)                                                       \
  case ACTIVATION:                                                                      \
    for (int i = 0; i < count; i += kLanesOf<Vector>)                                   \
      store<Vector>(values + i, activate<Vector>(load<Vector>(values + i), ACTIVATION)); \
    break;
  switch (activation) {
    DYNACONV_CASE(kRelu) DYNACONV_CASE(kRelu6) DYNACONV_CASE(kSilu) DYNACONV_CASE(kHardswish)
    DYNACONV_CASE(kSigmoid) DYNACONV_CASE(kHardsigmoid) DYNACONV_CASE(kGelu) DYNACONV_CASE(kTanh)
    DYNACONV_CASE(kElu) DYNACONV_CASE(kMish) DYNACONV_CASE(kGeluTanh)
    case kNone: break;
    default:
      // What is left is leaky.
      for (int i = 0; i < count; i += kLanesOf<Vector>)
        store<Vector>(values + i, leaky<Vector>(load<Vector>(values + i), slope_of(activation)));
  }
#undef DYNACONV_CASE
}

// The general end of a tile: sums wait in `block`, rows `step` apart (a multiple of the vector's length), and any
// activation, residual and number of columns is served.
template <typename Vector>
DYNACONV_INLINE void finish(const TileCall& call, float* block, int step, int rows, int row, int column, int width) {
  constexpr int kLanes = kLanesOf<Vector>;
  activate_block<Vector>(block, rows * step, call.activation);
  if (call.residual) {
    for (int r = 0; r < rows; ++r) {
      const float* add = static_cast<const float*>(call.residual[row + r]) + call.column + column;
      for (int c = 0; c < width; ++c) block[r * step + c] += add[c];
    }
  }
  activate_block<Vector>(block, rows * step, call.final_activation);
  for (int r = 0; r < rows; ++r) {
    float* out = static_cast<float*>(call.out[row + r]) + call.column + column;
    const float* values = block + r * step;
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) store<Vector>(out + c, load<Vector>(values + c));
    for (; c < width; ++c) out[c] = values[c];
  }
}

using Finish = void (*)(const TileCall& call, float* block, int step, int rows, int row, int column, int width);

DYNACONV_INLINE void fetch(const float* weight, const int64_t (&ahead)[2]) {
  __builtin_prefetch(beyond(weight, ahead[0]), 0, 2);
  __builtin_prefetch(beyond(weight, 64 + ahead[1]), 0, 2);
}

// The end of a tile of whole vectors whose activations are clamps, straight from the registers. `Floor`: see only_a_floor.
template <typename Vector, int Rows, int Columns, bool Floor>
DYNACONV_INLINE void finish_clamped(const TileCall& call, const Vector (&sums)[Rows][Columns], int row, int column) {
  constexpr int kLanes = kLanesOf<Vector>;
  const Bounds first = clamp_bounds(call.activation), last = clamp_bounds(call.final_activation);
  const Vector low = broadcast<Vector>(first.low), high = broadcast<Vector>(first.high);
  const Vector last_low = broadcast<Vector>(last.low), last_high = broadcast<Vector>(last.high);
  // Copies, since a store could change the originals.
  void* const* const outs = call.out + row;
  const int64_t at = call.column + column;
  if (!call.residual) {
    // The bounds of one activation lie within those of the other.
    const Vector inner_low = at_least(low, last_low), inner_high = at_most(high, last_high);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      float* const out = static_cast<float*>(outs[r]) + at;
#pragma GCC unroll 4
      for (int c = 0; c < Columns; ++c) {
        const Vector value = at_least(sums[r][c], inner_low);
        store<Vector>(out + c * kLanes, Floor ? value : at_most(value, inner_high));
      }
    }
    return;
  }
  const void* const* const adds = call.residual + row;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* const out = static_cast<float*>(outs[r]) + at;
    const float* const add = static_cast<const float*>(adds[r]) + at;
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) {
      const Vector value = Floor ? sums[r][c] : clamped<Vector>(sums[r][c], low, high);
      const Vector joined = at_least(Vector(value + load<Vector>(add + c * kLanes)), last_low);
      store<Vector>(out + c * kLanes, Floor ? joined : at_most(joined, last_high));
    }
  }
}

// The end of a piece, whatever it is.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void finish_piece(const TileCall& call, const Vector (&sums)[Rows][Columns], int row, int column, Finish end) {
  constexpr int kLanes = kLanesOf<Vector>;
  const int width = call.columns - column < Columns * kLanes ? call.columns - column : Columns * kLanes;
  if (width == Columns * kLanes && is_clamp(call.activation) && is_clamp(call.final_activation)) {
    if (only_a_floor(call)) return finish_clamped<Vector, Rows, Columns, true>(call, sums, row, column);
    return finish_clamped<Vector, Rows, Columns, false>(call, sums, row, column);
  }
  float block[Rows * 2 * kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store<Vector>(block + (r * 2 + c) * kLanes, sums[r][c]);
  if constexpr (Columns == 1)
    for (int r = 0; r < Rows; ++r) store<Vector>(block + (r * 2 + 1) * kLanes, Vector{});
  end(call, block, 2 * kLanes, Rows, row, column, width);
}

constexpr int kDeep = 4;

// kDeep channels at once: with one vector of columns a row's pointer, which no register has room for, is loaded as often as
// its factors are.
template <typename Vector, int Rows>
DYNACONV_INLINE void deep(const float* const (&from)[Rows], int64_t k, const float* weight, const int64_t (&ahead)[2],
                          Vector (&sums)[Rows][1]) {
  Vector w[kDeep];
#pragma GCC unroll 4
  for (int i = 0; i < kDeep; ++i) {
    if (ahead[0] | ahead[1]) fetch(weight + i * kPanel, ahead);
    w[i] = load<Vector>(weight + i * kPanel);
    hold(w[i]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const float* at = from[r] + k;
    hold(at);
#pragma GCC unroll 4
    for (int i = 0; i < kDeep; ++i) sums[r][0] += w[i] * at[i];
  }
}

// One channel of every row times its weights.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void add_channel(const float* const (&from)[Rows], int64_t k, const float* weight,
                                 Vector (&sums)[Rows][Columns]) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector w[Columns];
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) w[c] = load<Vector>(weight + c * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const float value = from[r][k];
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sums[r][c] += w[c] * value;
  }
}

// One channel of rows that lie `step` apart. Pointers to all rows do not fit the registers, and GCC keeps what does not in
// vectors, for which the next tile would wait: one pointer walks from row to row.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void add_even_channel(const float* from, int64_t step, const float* weight, Vector (&sums)[Rows][Columns]) {
  constexpr int kLanes = kLanesOf<Vector>;
  Vector w[Columns];
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) w[c] = load<Vector>(weight + c * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r, from += step) {
    hold(from);
    const float value = *from;
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sums[r][c] += w[c] * value;
  }
}

template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void blended(const Blend& blend, int row, int column, Vector (&sums)[Rows][Columns]) {
  constexpr int kLanes = kLanesOf<Vector>;
  const float* from[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    const float* const scale = blend.scale[row + r] + blend.column + column;
    from[r] = static_cast<const float*>(blend.taps[row + r]);
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c)
      sums[r][c] = sums[r][c] * load<Vector>(scale + c * kLanes) + load<Vector>(blend.bias + column + c * kLanes);
  }
  const float* weight = blend.weight + column;
  for (int64_t k = 0; k < blend.channels; ++k, weight += kPanel) add_channel<Vector, Rows, Columns>(from, k, weight, sums);
}

// The same where all rows have one scale, and one pointer walks over what is added.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void blended_evenly(const Blend& blend, int row, int column, Vector (&sums)[Rows][Columns]) {
  constexpr int kLanes = kLanesOf<Vector>;
  const float* const scale = blend.scale[0] + blend.column + column;
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) {
    const Vector factor = load<Vector>(scale + c * kLanes), bias = load<Vector>(blend.bias + column + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sums[r][c] = sums[r][c] * factor + bias;
  }
  const int64_t step = blend.row_step;
  const float* from = static_cast<const float*>(blend.taps[0]) + row * step;
  const float* weight = blend.weight + column;
  for (const float* const end = from + blend.channels; from != end; ++from, weight += kPanel)
    add_even_channel<Vector, Rows, Columns>(from, step, weight, sums);
}

// `Rows` x `Columns` vectors of sums stay in registers.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void piece(const TileCall& call, int row, int column, Finish end) {
  constexpr int64_t kBurst = kBurstBytes / sizeof(float);
  NextRowsFetch next(call, sizeof(float));
  Vector sums[Rows][Columns];
  start_sums<Vector, Rows, Columns>(call.bias + column, sums);
  const float* weight = static_cast<const float*>(call.weight) + column;
  for (int t = 0; t < call.taps_count; ++t) {
    const float* from[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
      from[r] = static_cast<const float*>(call.taps[t * kMaxRows + row + r]) + call.tap_offset;
    for (int64_t start = 0; start < call.channels; start += kBurst) {
      next.burst(t, start * int64_t{sizeof(float)});
      const int64_t end = start + kBurst < call.channels ? start + kBurst : call.channels;
      int64_t k = start;
      if constexpr (Columns == 1) {
        for (; k + kDeep <= end; k += kDeep, weight += kDeep * kPanel) deep<Vector, Rows>(from, k, weight, call.ahead, sums);
      }
      for (; k < end; ++k, weight += kPanel) {
        fetch(weight, call.ahead);
        add_channel<Vector, Rows, Columns>(from, k, weight, sums);
      }
    }
  }
  if (call.blend) blended<Vector, Rows, Columns>(*call.blend, row, column, sums);
  finish_piece<Vector, Rows, Columns>(call, sums, row, column, end);
}

// The bounds of both activations of a tile, each of which is a clamp.
template <typename Vector>
struct Clamps {
  Vector low, high, last_low, last_high;

  explicit Clamps(const TileCall& call) {
    const Bounds first = clamp_bounds(call.activation), last = clamp_bounds(call.final_activation);
    low = broadcast<Vector>(first.low), high = broadcast<Vector>(first.high);
    last_low = broadcast<Vector>(last.low), last_high = broadcast<Vector>(last.high);
  }
};

template <typename Vector>
DYNACONV_INLINE void write(const TileCall& call, const Clamps<Vector>& clamps, Vector sum, int row, int64_t column) {
  sum = clamped<Vector>(sum, clamps.low, clamps.high);
  if (call.residual) sum += load<Vector>(static_cast<const float*>(call.residual[row]) + column);
  store<Vector>(static_cast<float*>(call.out[row]) + column, clamped<Vector>(sum, clamps.last_low, clamps.last_high));
}

// One vector and a half of columns: both sums of a row take the same factor.
template <typename Vector, typename Half, int Rows>
DYNACONV_INLINE void piece_and_half(const TileCall& call, int row, int column, Finish end) {
  constexpr int kLanes = kLanesOf<Vector>, kHalf = kLanesOf<Half>;
  Vector sums[Rows];
  Half halves[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    sums[r] = load<Vector>(call.bias + column);
    halves[r] = load<Half>(call.bias + column + kLanes);
  }
  const float* weight = static_cast<const float*>(call.weight) + column;
  for (int t = 0; t < call.taps_count; ++t) {
    const float* from[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
      from[r] = static_cast<const float*>(call.taps[t * kMaxRows + row + r]) + call.tap_offset;
    for (int64_t k = 0; k < call.channels; ++k, weight += kPanel) {
      fetch(weight, call.ahead);
      const Vector w = load<Vector>(weight);
      const Half h = load<Half>(weight + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float value = from[r][k];
        sums[r] += w * value;
        halves[r] += h * value;
      }
    }
  }
  const int width = call.columns - column;
  if (width == kLanes + kHalf && is_clamp(call.activation) && is_clamp(call.final_activation)) {
    const Clamps<Vector> wide(call);
    const Clamps<Half> narrow(call);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      write<Vector>(call, wide, sums[r], row + r, call.column + column);
      write<Half>(call, narrow, halves[r], row + r, call.column + column + kLanes);
    }
    return;
  }
  float block[Rows * 2 * kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store<Vector>(block + r * 2 * kLanes, sums[r]);
    store<Half>(block + r * 2 * kLanes + kLanes, halves[r]);
    store<Half>(block + r * 2 * kLanes + kLanes + kHalf, Half{});
  }
  end(call, block, 2 * kLanes, Rows, row, column, width);
}

// What a piece of even rows does beside its products: nothing, or some of what comes later is fetched meanwhile; blends fetch, too.
enum class Even { kPlain, kFetches, kBlends };

// A piece of even rows. What it does is a constant, since short tiles would feel the question.
template <typename Vector, int Rows, int Columns, Even Way>
DYNACONV_INLINE void even_piece(const TileCall& call, int row, int column, Finish finish) {
  constexpr bool Fetches = Way != Even::kPlain;
  Vector sums[Rows][Columns];
  start_sums<Vector, Rows, Columns>(call.bias + column, sums);
  const int64_t step = call.row_step, ahead[2] = {call.ahead[0], call.ahead[1]};
  const int64_t stretch = Fetches ? kBurstBytes / int64_t{sizeof(float)} : call.channels;
  NextRowsFetch next(call, sizeof(float));
  const float* weight = static_cast<const float*>(call.weight) + column;
  for (int t = 0; t < call.taps_count; ++t) {
    const float* from = static_cast<const float*>(call.taps[t * kMaxRows]) + call.tap_offset + row * step;
    for (int64_t start = 0; start < call.channels; start += stretch) {
      if constexpr (Fetches) next.burst(t, start * int64_t{sizeof(float)});
      const float* const end = from + (Fetches && call.channels - start < stretch ? call.channels - start : stretch);
      for (; from != end; ++from, weight += kPanel) {
        // Fewer columns leave no time for it.
        if constexpr (Columns == 2) fetch(weight, ahead);
        add_even_channel<Vector, Rows, Columns>(from, step, weight, sums);
      }
    }
  }
  if constexpr (Way == Even::kBlends) blended_evenly<Vector, Rows, Columns>(*call.blend, row, column, sums);
  finish_piece<Vector, Rows, Columns>(call, sums, row, column, finish);
}

template <typename Vector, int Most, int Rows, int Columns, Even Way>
DYNACONV_INLINE void all_even_rows(const TileCall& call, int column, Finish end) {
  constexpr int kWhole = Rows / Most * Most;
  for (int first = 0, end_row = (call.more + 1) * Rows; first < end_row; first += Rows) {
    for (int row = 0; row < kWhole; row += Most) even_piece<Vector, Most, Columns, Way>(call, first + row, column, end);
    if constexpr (Rows > kWhole) even_piece<Vector, Rows - kWhole, Columns, Way>(call, first + kWhole, column, end);
  }
}

// By number of vectors, the first for half of one.
using EvenPieces = std::array<void (*)(const TileCall& call, int column), 3>;

// Two vectors of columns at once, one, or half of one at the end of a panel: one and a half would keep the units that multiply
// waiting for each other.
template <int Lanes>
DYNACONV_INLINE void even_tile(const TileCall& call, const EvenPieces& pieces) {
  for (int column = 0; column < call.columns;) {
    const int left = call.columns - column;
    const int vectors = left > Lanes + Lanes / 2 ? 2 : left > Lanes / 2 ? 1 : 0;
    pieces[vectors](call, column);
    column += vectors ? vectors * Lanes : Lanes / 2;
  }
}

template <typename Vector, int Most, int Rows, int Columns>
DYNACONV_INLINE void all_rows(const TileCall& call, int column, Finish end) {
  constexpr int kWhole = Rows / Most * Most;
  for (int row = 0; row < kWhole; row += Most) piece<Vector, Most, Columns>(call, row, column, end);
  if constexpr (Rows > kWhole) piece<Vector, Rows - kWhole, Columns>(call, kWhole, column, end);
}

// Rows in pieces of at most `Most`, columns in pieces of two vectors, one and a half, one, or half of one at the end of a
// panel.
template <typename Vector, typename Half, int Most, int Rows>
DYNACONV_INLINE void tile(const TileCall& call, Finish end) {
  constexpr int kLanes = sizeof(Vector) / sizeof(float);
  constexpr bool kAndHalf = Rows <= Most && sizeof(Vector) == 2 * sizeof(Half);
  for (int column = 0; column < call.columns;) {
    const int left = call.columns - column;
    if (left > kLanes + kLanes / 2 || (call.blend && left > kLanes)) {
      all_rows<Vector, Most, Rows, 2>(call, column, end);
      column += 2 * kLanes;
    } else if (kAndHalf && left > kLanes) {
      if constexpr (kAndHalf) piece_and_half<Vector, Half, Rows>(call, 0, column, end);
      return;
    } else if (left > kLanes / 2) {
      all_rows<Vector, Most, Rows, 1>(call, column, end);
      column += kLanes;
    } else {
      all_rows<Half, Most, Rows, 1>(call, column, end);
      column += kLanes / 2;
    }
  }
}

#define DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, ROWS)                                   \
  TARGET void tile_##NAME##_##ROWS(const TileCall& call) {                                      \
    if (is_even(call)) {                                                                        \
      const bool fetches = call.next.taps || call.next.later;                                   \
      return even_tile<kLanesOf<VECTOR>>(call, call.blend ? kEven_##NAME<ROWS, Even::kBlends>                    \
                                               : fetches  ? kEven_##NAME<ROWS, Even::kFetches>                   \
                                                          : kEven_##NAME<ROWS, Even::kPlain>);                   \
    }                                                                                           \
    tile<VECTOR, HALF, MOST, ROWS>(call, finish_##NAME);                                        \
  }

#define DYNACONV_TILES(NAME, TARGET, VECTOR, HALF, MOST) \
  TARGET __attribute__((noinline)) void finish_##NAME(const TileCall& call, float* block, int step, int rows, int row, \
                                                      int column, int width) {                                       \
    finish<VECTOR>(call, block, step, rows, row, column, width);                                                     \
  }                                                                                                                  \
  template <typename Vector, int Rows, int Columns, Even Way>                                                        \
  TARGET __attribute__((noinline)) void even_##NAME(const TileCall& call, int column) {                              \
    all_even_rows<Vector, MOST, Rows, Columns, Way>(call, column, finish_##NAME);                                    \
  }                                                                                                                  \
  template <int Rows, Even Way>                                                                                      \
  constexpr EvenPieces kEven_##NAME = {even_##NAME<HALF, Rows, 1, Way>, even_##NAME<VECTOR, Rows, 1, Way>,           \
                                       even_##NAME<VECTOR, Rows, 2, Way>};                                           \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 1) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 2)                      \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 3) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 4)                      \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 5) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 6)                      \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 7) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 8)                      \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 9) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 10)                     \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 11) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 12)                    \
  DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 13) DYNACONV_TILE(NAME, TARGET, VECTOR, HALF, MOST, 14)                    \
  constexpr std::array<GemmTile, kMaxRows> kTiles_##NAME = {                                                     \
      tile_##NAME##_1, tile_##NAME##_2,  tile_##NAME##_3,  tile_##NAME##_4,  tile_##NAME##_5,  tile_##NAME##_6,  \
      tile_##NAME##_7, tile_##NAME##_8,  tile_##NAME##_9,  tile_##NAME##_10, tile_##NAME##_11, tile_##NAME##_12, \
      tile_##NAME##_13, tile_##NAME##_14};

DYNACONV_TILES(plain, , float4, float4, 4)
#ifdef DYNACONV_X86
DYNACONV_TILES(avx2, DYNACONV_TARGET_AVX2, float8, float4, 6)
DYNACONV_TILES(avx512, DYNACONV_TARGET_AVX512, float16, float8, 14)
#endif

}  // namespace

GemmTile gemm_tile(int dtype, int rows, int columns) {
  (void)columns;
  if (rows < 1 || rows > kMaxRows) return nullptr;
  if (dtype == kBfloat16) return gemm_tile_bfloat16(rows);
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return kTiles_avx512[rows - 1];
  if (best_isa_level() == Isa::kAvx2) return kTiles_avx2[rows - 1];
#endif
  return kTiles_plain[rows - 1];
}
