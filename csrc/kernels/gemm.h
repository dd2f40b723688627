// The indirect GEMM: rows are output pixels, every kernel tap of a row is a pointer to contiguous input channels.

#pragma once

#include <cstdint>

#include "../plan/plan.h"

constexpr int kMaxRows = 14;  // rows of the largest tile
constexpr int kPanel = 32;    // output channels of a packed weight panel
inline constexpr float kNoBias[kPanel] = {};

// The rows of the next tile, which come into the cache while this one multiplies. A tile reads and writes a few lines of many
// rows, and the processor foresees none of them.
struct NextRows {
  const void* const* taps;      // [taps_count][kMaxRows] as in TileCall; null: these are near
  void* const* out;             // [kMaxRows]; null: near
  const void* const* residual;  // [kMaxRows]; null: there is none, it is near, or the result takes its place
  int64_t column;               // of the next tile, elements
  int rows;                     // of the next tile
  const char* later;            // what a later step reads: kLaterBytes of it for every 64 bytes of a tap's channels, or null
};
constexpr int64_t kLaterBytes = 1024;

// What becomes of the sums of a tile before its activation: sums[r][c] * scale[r][c] + bias[c] + the sum over channels k of
// taps[r][k] * weight[k][c].
struct Blend {
  const float* const* scale;  // [kMaxRows]
  int64_t column;             // where the tile's columns begin in `scale`
  const void* const* taps;    // [kMaxRows]
  int64_t row_step;           // elements from each of `taps` to the next where all rows have one scale; 0: they lie anywhere
  int64_t channels;
  const float* weight;        // [channels][kPanel]
  const float* bias;          // [kPanel]
};

// For r < rows and c < columns, with sum over taps t and channels k of taps[t * kMaxRows + r][k] * weight[t * channels + k][c]:
// out[r][c] = final_activation(activation(bias[c] + sum) + residual[r][c]).
// bfloat16: sums, bias and activations are float32, and pairs of channels lie together in the weights.
struct TileCall {
  const void* const* taps;      // [taps_count][kMaxRows]
  int taps_count;
  int64_t channels;             // elements at every tap
  int64_t tap_offset;           // elements to skip at every tap (groups)
  int64_t row_step;             // float32: elements from each row to the next at every tap, 0 where rows lie anywhere
  int more;                     // tiles of as many rows that follow evenly, their `out` and `residual` too; see is_even()
  const void* weight;           // [taps_count * channels][kPanel]; bfloat16: see panel_elements()
  const float* bias;            // [kPanel]
  void* const* out;             // a pointer for each row, at column 0 of the tensor
  const void* const* residual;  // likewise, or null
  int64_t column;               // where the panel starts in out and residual, elements
  int columns;                  // valid columns, 1 .. kPanel
  int activation, final_activation;
  bool float_out;               // of a bfloat16 tile: out and residual are float32
  int64_t ahead[2];             // bytes from the weights in use to those that are fetched meanwhile, for either line
  NextRows next;
  const Blend* blend;           // float32: null where the sums stay as they are
};

// Weights of the steps after this one, in the order in which a thread will read them. Its tiles bring them into its L2 cache:
// a router reads many weights and multiplies little, so that it would wait for them.
class Upcoming {
 public:
  void add(const void* from, int64_t bytes) {
    if (count_ == kMost || bytes <= 0) return;
    const auto* const start = static_cast<const char*>(from);
    parts_[count_++] = {start, start + bytes};
  }
  bool empty() {
    while (first_ < count_ && parts_[first_].at >= parts_[first_].end) ++first_;
    return first_ == count_;
  }
  // The share of a tile that has its taps and channels.
  void give(TileCall& call, int64_t element) {
    call.next.later = empty() ? nullptr : parts_[first_].at;
    if (call.next.later) parts_[first_].at += call.taps_count * ((call.channels * element + 63) / 64) * kLaterBytes;
  }

 private:
  struct Part {
    const char *at, *end;
  };
  static constexpr int kMost = 12;
  Part parts_[kMost];
  int first_ = 0, count_ = 0;
};

// Whether a tile goes the faster way of even rows: no results are fetched meanwhile.
inline bool is_even(const TileCall& call) { return call.row_step && !call.next.out && (!call.blend || call.blend->row_step); }

// The step of rows of one tap that were listed in order and lie at least `step` elements apart: `step` where all lie just so far
// apart, else 0.
inline int64_t even_step(const void* const* taps, int64_t rows, int64_t step) {
  const int64_t bytes = static_cast<const char*>(taps[rows - 1]) - static_cast<const char*>(taps[0]);
  return bytes == (rows - 1) * step * int64_t{sizeof(float)} ? step : 0;
}

// Of activations that are clamps: nothing has a ceiling, and nothing happens before a residual is added. That is what most
// convolutions want, and every operation that a tile does without lets the next one start earlier.
inline bool only_a_floor(const TileCall& call) {
  return call.activation != kRelu6 && call.final_activation != kRelu6 && (!call.residual || call.activation == kNone);
}

// Weights that no cache holds are fetched while the tiles before them run: those of the next panel in the last tiles of a
// panel, the ones right ahead where every panel serves one tile only.
inline void fetch_ahead(TileCall& call, int64_t tile, int64_t tiles, int64_t panel_bytes) {
  constexpr int64_t kStream = 4096;
  if (tiles == 1) {
    call.ahead[0] = call.ahead[1] = kStream;
  } else if (tiles == 2) {
    call.ahead[0] = call.ahead[1] = tile == 1 ? panel_bytes : 0;
  } else {
    call.ahead[0] = tile == tiles - 2 ? panel_bytes : 0;
    call.ahead[1] = tile == tiles - 1 ? panel_bytes : 0;
  }
}
using GemmTile = void (*)(const TileCall&);

// The kernel for exactly `rows` (1 .. kMaxRows) rows. dtype as in plan.h; null where the processor cannot run it.
GemmTile gemm_tile(int dtype, int rows, int columns);

// Elements of one packed panel over `taps` taps of `channels` channels. bfloat16: [taps][(channels + 1) / 2][kPanel][2],
// where an odd last channel has a zero beside it.
inline int64_t panel_elements(int dtype, int64_t taps, int64_t channels) {
  return taps * (dtype == kBfloat16 ? (channels + 1) / 2 * 2 : channels) * kPanel;
}
