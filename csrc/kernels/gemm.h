// The indirect GEMM: rows are output pixels, every kernel tap of a row is a pointer to contiguous input channels.

#pragma once

#include <cstdint>

constexpr int kMaxRows = 14;  // rows of the largest tile
constexpr int kPanel = 32;    // output channels of a packed weight panel

// For r < rows and c < columns, with sum over taps t and channels k of taps[t * kMaxRows + r][k] * weight[t * channels + k][c]:
// out[r][c] = final_activation(activation(bias[c] + sum) + residual[r][c]).
struct TileCall {
  const void* const* taps;      // [taps_count][kMaxRows]
  int taps_count;
  int64_t channels;             // elements at every tap
  int64_t tap_offset;           // elements to skip at every tap (groups)
  const void* weight;           // [taps_count * channels][kPanel]
  const float* bias;            // [kPanel]
  void* const* out;             // a pointer for each row, at column 0 of the tensor
  const void* const* residual;  // likewise, or null
  int64_t column;               // where the panel starts in out and residual, elements
  int columns;                  // valid columns, 1 .. kPanel
  int activation, final_activation;
};
using GemmTile = void (*)(const TileCall&);

// The kernel for exactly `rows` (1 .. kMaxRows) rows. dtype as in plan.h; null where the processor cannot run it.
GemmTile gemm_tile(int dtype, int rows, int columns);
