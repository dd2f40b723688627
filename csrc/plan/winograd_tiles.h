// Tiles of 2x2 outputs for Winograd's F(2x2, 3x3): where a step's tiles read and write, and their products.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels/gemm.h"
#include "../kernels/winograd.h"
#include "run.h"

constexpr int64_t kMostWinogradTiles = 56;            // 2x2 tiles of a task
constexpr int64_t kTransformedBytes = 480 << 10;      // of a task's transformed input, which stays in the L2 cache

inline int64_t winograd_tiles_of_task(int64_t channels, int64_t element = sizeof(float)) {
  const int64_t fit = kTransformedBytes / (kWinogradPoints * channels * element) / kMaxRows * kMaxRows;
  return std::max<int64_t>(kMaxRows, std::min(kMostWinogradTiles, fit));
}

// Elements of a transformed row; rows that lie a multiple of 4 KiB apart would fight for the same lines of the cache.
inline int64_t winograd_row(int64_t channels, int64_t element = sizeof(float)) {
  return channels * element % 4096 ? channels : channels + 64 / element;
}

class WinogradTiles {
 public:
  WinogradTiles(const Run& run, const Step& step, const Position* list, const void* zeros)
      : step_(step), conv_(run.conv(step.conv[0])), in_(run.value(step.in)), out_(run.value(step.out)), list_(list),
        source_(run.data(step.in)), result_(run.data(step.out)), zeros_(zeros), kernels_(winograd_kernels(in_.dtype)), element_(element_bytes(in_.dtype)),
        tiles_wide_((out_.width + 1) / 2), area_((out_.height + 1) / 2 * int64_t{tiles_wide_}) {
    if (step.in2 >= 0) {
      residual_ = run.data(step.in2);
      residual_bytes_ = run.value(step.in2).stride * element_;
    }
    if (list) need_ = run.context.grids[step.grid].need;
    // What the last convolution skipped may hold anything; the transform must read zeros there.
    if (step.grid2 >= 0) input_need_ = run.context.grids[step.grid2].need;
  }

  Position tile(int64_t index) const {
    if (list_) return list_[index];
    const int64_t rest = index % area_;
    return {0, static_cast<int32_t>(index / area_), static_cast<int16_t>(rest / tiles_wide_),
            static_cast<int16_t>(rest % tiles_wide_)};
  }

  // Channels [first, first + channels) of the transformed patch of a tile: out[point * step + c].
  void transform(const Position& at, int64_t first, int64_t channels, void* out, int64_t step) const {
    const void* patch[kWinogradPoints];
    const int32_t y0 = 2 * at.y - conv_.padding[0], x0 = 2 * at.x - conv_.padding[1];
    const int64_t image = int64_t{at.image} * in_.height * in_.width;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int32_t y = y0 + i, x = x0 + j;
        const int64_t row = image + int64_t{y} * in_.width + x;
        const bool there = y >= 0 && y < in_.height && x >= 0 && x < in_.width && (!input_need_ || input_need_[row]);
        patch[4 * i + j] = there ? source_ + (row * in_.stride + first) * element_ : zeros_;
      }
    }
    // Weights that are mixed lack the halves of G.
    if (step_.kind == kConv) kernels_.input(patch, channels, out, step);
    else kernels_.input_halved(patch, channels, out, step);
  }

  // The four outputs of a tile for one panel, from products[point * step + c].
  void finish(const Position& at, const float* products, int64_t step, const float* bias, int64_t panel) const {
    const int64_t column = panel * kPanel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, conv_.out_channels - column));
    void* outs[4];
    const void* adds[4];
    for (int q = 0; q < 4; ++q) {
      const int32_t y = 2 * at.y + q / 2, x = 2 * at.x + q % 2;
      const int64_t row = (int64_t{at.image} * out_.height + y) * out_.width + x;
      const bool wanted = y < out_.height && x < out_.width && (!need_ || need_[row]);
      outs[q] = wanted ? result_ + (row * out_.stride + column) * element_ : nullptr;
      adds[q] = wanted && residual_ ? residual_ + row * residual_bytes_ + column * element_ : nullptr;
    }
    const int act = step_.activation[0], final_act = step_.final_activation;
    if (columns == kPanel && act <= kRelu6 && final_act <= kRelu6)
      return kernels_.finish_panel(products, step, bias, act, final_act, residual_ ? adds : nullptr, outs);
    float sums[4 * kPanel];
    kernels_.output(products, step, bias, sums);
    for (int q = 0; q < 4; ++q)
      if (outs[q]) kernels_.finish(sums + q * kPanel, columns, act, final_act, adds[q], outs[q]);
  }

 private:
  const Step& step_;
  const Conv& conv_;
  const Value &in_, &out_;
  const Position* list_;
  const char* source_;
  char* result_;
  const void* zeros_;
  const WinogradKernels& kernels_;
  const int64_t element_;
  const int32_t tiles_wide_;
  const int64_t area_;
  const char* residual_ = nullptr;
  int64_t residual_bytes_ = 0;
  const uint8_t *need_ = nullptr, *input_need_ = nullptr;
};

// Products of `count` transformed tiles with one panel of transformed weights.
struct WinogradProducts {
  const void* transformed;   // row t of point p is transformed + p * point_step + t * row, elements
  int64_t point_step, row, count;
  const void* weight;        // of point p: weight + p * weight_step elements, [channels][kPanel] as gemm.h wants them
  int64_t weight_step, channels;
  float* products;           // [points][count][kPanel]
  bool add;                  // to what is there
  int dtype = kFloat32;      // of transformed tiles and weights
  Upcoming* upcoming = nullptr;
  bool far = false;          // transformed tiles come from beyond the L2 cache

  void run() const {
    for (int64_t first = 0; first < count; first += kMostWinogradTiles)
      multiply(first, std::min(kMostWinogradTiles, count - first));
  }

 private:
  // Pointers are made once: a point lies as far from them as from those of any other row.
  void multiply(int64_t first, int64_t rows) const {
    constexpr int64_t kTiles = (kMostWinogradTiles + kMaxRows - 1) / kMaxRows;
    const int64_t element = element_bytes(dtype), tiles = (rows + kMaxRows - 1) / kMaxRows;
    const void* taps[kTiles * kMaxRows];
    void* outs[kTiles * kMaxRows];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t from = rows * tile / tiles, r = from; r < rows * (tile + 1) / tiles; ++r) {
        taps[tile * kMaxRows + r - from] = static_cast<const char*>(transformed) + (first + r) * row * element;
        outs[tile * kMaxRows + r - from] = products + (first + r) * kPanel;
      }
    }
    // Of the first tile, at the next point.
    const void* after[kMaxRows];
    const auto rows_of = [=](int64_t tile) { return static_cast<int>(rows * (tile + 1) / tiles - rows * tile / tiles); };
    for (int r = 0; r < rows_of(0); ++r) after[r] = static_cast<const char*>(taps[r]) + point_step * element;
    TileCall call{};
    call.taps_count = 1;
    call.channels = channels;
    call.row_step = row;
    call.bias = kNoBias;
    call.columns = kPanel;
    call.float_out = true;
    for (int64_t point = 0; point < kWinogradPoints; ++point) {
      call.weight = static_cast<const char*>(weight) + point * weight_step * element;
      call.tap_offset = point * point_step;
      call.column = point * count * kPanel;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        call.taps = taps + tile * kMaxRows;
        call.out = outs + tile * kMaxRows;
        call.residual = add ? call.out : nullptr;
        fetch_ahead(call, tile, tiles, weight_step * element);
        if (upcoming) upcoming->give(call, element);
        if (far) {
          const int64_t next = tile + 1 < tiles ? tile + 1 : 0;
          call.next.taps = next ? taps + next * kMaxRows : after;
          call.next.rows = rows_of(next);
        }
        gemm_tile(dtype, rows_of(tile), kPanel)(call);
      }
    }
  }
};
