// Rows of a convolution's result: how they are cut into tasks, and pointers to what each of them reads and writes.

#pragma once

#include <cstdint>

#include "../kernels/gemm.h"
#include "run.h"

constexpr int64_t kMostTiles = 48;  // of a table
constexpr int64_t kFetchBytes = 256 << 10;  // weights beyond this do not wait in the L2 cache for the next run

// Blocks of rows times groups of panels.
struct Cut {
  int64_t rows, row_blocks, panels, panel_groups;

  int64_t tasks() const { return row_blocks * panel_groups; }
  // Whole tiles where blocks are large, equal shares where they are small.
  int64_t first_row(int64_t block) const {
    const int64_t exact = rows * block / row_blocks;
    return block < row_blocks && rows / row_blocks >= 8 * kMaxRows ? exact / kMaxRows * kMaxRows : exact;
  }
  int64_t first_panel(int64_t group) const { return panels * group / panel_groups; }
};

// row_bytes: of input that one row of the result brings; panel_macs: of one row and one panel.
Cut cut(int64_t rows, int64_t row_bytes, int64_t panels, int64_t panel_bytes, double panel_macs, int threads);

// Walks the output positions of a block: a list, or every row from some row on.
struct Walk {
  const Position* list;
  int64_t row;
  int32_t height, width, image, y, x;

  Walk(const Position* list_, int64_t first, const Value& out)
      : list(list_ ? list_ + first : nullptr), row(first), height(out.height), width(out.width) {
    const int64_t area = int64_t{height} * width;
    image = static_cast<int32_t>(row / area);
    y = static_cast<int32_t>(row % area / width);
    x = static_cast<int32_t>(row % width);
  }
  Position next() {
    if (list) return *list++;
    const Position at{static_cast<int32_t>(row), image, static_cast<int16_t>(y), static_cast<int16_t>(x)};
    ++row;
    if (++x == width) {
      x = 0;
      if (++y == height) {
        y = 0;
        ++image;
      }
    }
    return at;
  }
};

// Pointers of some rows, tile by tile.
struct RowTable {
  const void** taps;   // [tiles][taps][kMaxRows]
  void** outs;         // [tiles][kMaxRows]
  const void** adds;   // likewise, or null
  int64_t rows, tiles, taps_count;
  int64_t step;        // elements between rows where none are nearer; 0: not known
  bool in_place;       // the result takes the place of what is added

  int64_t first_of(int64_t tile) const { return rows * tile / tiles; }
  int rows_of(int64_t tile) const { return static_cast<int>(first_of(tile + 1) - first_of(tile)); }
  void point(TileCall& call, int64_t tile) const {
    call.taps = taps + tile * kMaxRows * taps_count;
    call.out = outs + tile * kMaxRows;
    call.residual = adds ? adds + tile * kMaxRows : nullptr;
    call.row_step = step ? even_step(call.taps, rows_of(tile), step) : 0;
  }
};

inline int64_t table_bytes(int64_t taps) { return (kMostTiles + 2) * kMaxRows * (taps + 2) * int64_t{sizeof(void*)}; }

// Where the rows of a step lie.
class ConvRows {
 public:
  ConvRows(const Run& run, const Step& step, const void* zeros)
      : conv_(run.conv(step.conv[0])), in_(run.value(step.in)), out_(run.value(step.out)), zeros_(zeros),
        base_(run.data(step.in)), result_(run.data(step.out)),
        residual_(step.in2 >= 0 ? run.data(step.in2) : nullptr),
        in_bytes_(in_.stride * element_bytes(in_.dtype)), out_bytes_(out_.stride * element_bytes(out_.dtype)),
        residual_bytes_(step.in2 >= 0 ? run.value(step.in2).stride * element_bytes(out_.dtype) : 0),
        pointwise_(conv_.kernel[0] == 1 && conv_.kernel[1] == 1 && conv_.stride[0] == 1 && conv_.stride[1] == 1 &&
                   conv_.padding[0] == 0 && conv_.padding[1] == 0) {}

  int64_t taps() const { return int64_t{conv_.kernel[0]} * conv_.kernel[1]; }

  // The rows [first, first + rows) of the list, or of all; at most kMostTiles tiles.
  RowTable table(void* scratch, const Position* list, int64_t first, int64_t rows) const {
    RowTable table{};
    table.rows = rows;
    table.tiles = (rows + kMaxRows - 1) / kMaxRows;
    table.taps_count = taps();
    table.step = pointwise_ && in_.dtype == kFloat32 ? in_.stride : 0;
    table.in_place = residual_ == result_;
    table.taps = static_cast<const void**>(scratch);
    table.outs = const_cast<void**>(table.taps + table.tiles * kMaxRows * table.taps_count);
    table.adds = residual_ ? const_cast<const void**>(table.outs + table.tiles * kMaxRows) : nullptr;
    Walk walk(list, first, out_);
    for (int64_t tile = 0; tile < table.tiles; ++tile) {
      const int count = table.rows_of(tile);
      for (int r = 0; r < count; ++r) {
        const Position at = walk.next();
        point(at, table.taps + tile * kMaxRows * table.taps_count + r);
        table.outs[tile * kMaxRows + r] = result_ + at.row * out_bytes_;
        if (residual_) table.adds[tile * kMaxRows + r] = residual_ + at.row * residual_bytes_;
      }
    }
    return table;
  }

 private:
  // Pointers to the taps of one position, a column of taps[t * kMaxRows].
  void point(const Position& at, const void** taps) const {
    if (pointwise_) {
      taps[0] = base_ + at.row * in_bytes_;
      return;
    }
    const int32_t y0 = at.y * conv_.stride[0] - conv_.padding[0], x0 = at.x * conv_.stride[1] - conv_.padding[1];
    const char* image = base_ + int64_t{at.image} * in_.height * in_.width * in_bytes_;
    for (int i = 0; i < conv_.kernel[0]; ++i) {
      const int32_t y = y0 + i * conv_.dilation[0];
      const bool inside = static_cast<uint32_t>(y) < static_cast<uint32_t>(in_.height);
      const char* line = image + (int64_t{y} * in_.width + x0) * in_bytes_;
      for (int j = 0; j < conv_.kernel[1]; ++j, taps += kMaxRows) {
        const int32_t x = x0 + j * conv_.dilation[1];
        taps[0] = inside && static_cast<uint32_t>(x) < static_cast<uint32_t>(in_.width)
                      ? line + int64_t{j} * conv_.dilation[1] * in_bytes_
                      : zeros_;
      }
    }
  }

  const Conv& conv_;
  const Value &in_, &out_;
  const void* zeros_;
  const char* base_;
  char* result_;
  const char* residual_;
  int64_t in_bytes_, out_bytes_, residual_bytes_;
  bool pointwise_;
};
