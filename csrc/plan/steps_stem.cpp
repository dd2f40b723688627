// The first convolution reads the picture itself. Its lines are copied once, padded, channels beside each other; then every
// kernel line is a tap whose channels are the pixels and channels that it covers. Under a mask a line's pixels are listed.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "../kernels/rowwise.h"
#include "run.h"

namespace {

// A padded line of all channels, and room for the vectors that read past its end.
int64_t line_elements(const Conv& conv, const Value& out) {
  return ((int64_t{out.width} - 1) * conv.stride[1] + conv.kernel[1]) * conv.in_channels + 16;
}

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Of the taps of a tile, and of the results of a line with as many behind them.
int64_t pointer_bytes(const Conv& conv, const Value& out) {
  return rounded((conv.kernel[0] * kMaxRows + 2 * int64_t{out.width}) * int64_t{sizeof(void*)});
}

// Of a list of the pixels of a line.
int64_t list_bytes(const Value& out) { return rounded(out.width * int64_t{sizeof(int32_t)}); }

struct Picture {
  const float* base;
  int64_t channel_step, row_step, x_step, image_step;  // floats
  int32_t height, width;
};

// Line `ky` is the one that output row `oy` reads, zeros outside of the picture, as floats or rounded to bfloat16.
void copy_lines(const Picture& picture, const Conv& conv, int64_t image, int64_t oy, int64_t length, int dtype, char* lines) {
  const RowKernels& kernels = row_kernels(dtype);
  const int64_t channels = conv.in_channels, left = std::min<int64_t>(conv.padding[1] * channels, length);
  const int64_t pixels = std::min<int64_t>(picture.width, (length - left) / channels), inside = pixels * channels;
  const int64_t element = element_bytes(dtype);
  for (int32_t i = 0; i < conv.kernel[0]; ++i, lines += length * element) {
    const int64_t y = oy * conv.stride[0] - conv.padding[0] + int64_t{i} * conv.dilation[0];
    if (y < 0 || y >= picture.height) {
      std::memset(lines, 0, length * element);
      continue;
    }
    const float* from = picture.base + image * picture.image_step + y * picture.row_step;
    char* const to = lines + left * element;
    std::memset(lines, 0, left * element);
    if (picture.x_step == 1) kernels.interleave(from, picture.channel_step, pixels, channels, to, channels);
    else if (picture.x_step == channels) kernels.from_float(from, inside, kNone, to);
    else
      for (int64_t x = 0; x < pixels; ++x)
        kernels.from_float(from + x * picture.x_step, channels, kNone, to + x * channels * element);
    std::memset(to + inside * element, 0, (length - left - inside) * element);
  }
}

// What the tiles of a line have in common.
struct Line {
  const Conv& conv;
  const Value& out;
  const char* lines;  // of the picture, copied
  int64_t length;     // elements of such a line
  const void** taps;  // room for those of a tile
  void** outs;        // room for the results of two lines
  char* row;          // the first result

  int64_t element() const { return element_bytes(out.dtype); }
  int64_t row_bytes() const { return out.stride * element(); }
  // Elements from one output pixel to the next in a copied line.
  int64_t shift() const { return int64_t{conv.stride[1]} * conv.in_channels; }
  int64_t channels() const { return int64_t{conv.kernel[1]} * conv.in_channels; }
  TileCall call(int activation) const {
    TileCall call{};
    call.taps = taps;
    call.taps_count = conv.kernel[0];
    call.channels = channels();
    call.activation = activation;
    call.final_activation = kNone;
    return call;
  }
  // A tile whose pointers are there, one panel of outputs after the other.
  void run(TileCall& call, int pixels) const {
    const int64_t panel_bytes = panel_elements(out.dtype, conv.kernel[0], channels()) * element();
    for (int64_t column = 0; column < conv.out_channels; column += kPanel) {
      call.weight = static_cast<const char*>(conv.weight) + column / kPanel * panel_bytes;
      call.bias = conv.bias + column;
      call.column = call.next.column = column;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - column));
      gemm_tile(out.dtype, pixels, call.columns)(call);
    }
  }
};

// Every pixel of a line.
void whole_line(const Line& line, int activation) {
  const int64_t width = line.out.width, tiles = (width + kMaxRows - 1) / kMaxRows;
  // Tiles of as many rows each go through a panel at once.
  const int64_t group = line.out.dtype == kFloat32 && width % tiles == 0 ? tiles : 1;
  for (int64_t t = 0; t < line.conv.kernel[0]; ++t)
    for (int p = 0; p < kMaxRows; ++p) line.taps[t * kMaxRows + p] = line.lines + (t * line.length + p * line.shift()) * line.element();
  // Behind the results of this line come those of the next, which are fetched meanwhile where tiles go one by one.
  for (int64_t p = 0; p < 2 * width; ++p) line.outs[p] = line.row + p * line.row_bytes();
  TileCall call = line.call(activation);
  call.row_step = line.shift();
  call.more = static_cast<int>(group) - 1;
  for (int64_t tile = 0; tile < tiles; tile += group) {
    const int64_t first = width * tile / tiles;
    const int pixels = static_cast<int>(width * (tile + 1) / tiles - first);
    call.tap_offset = first * line.shift();
    call.out = line.outs + first;
    call.next.out = group == 1 ? line.outs + first + pixels : nullptr;
    call.next.rows = pixels;
    line.run(call, pixels);
  }
}

// Some pixels of a line, by their columns.
void some_pixels(const Line& line, const int32_t* columns, int64_t count, int activation) {
  TileCall call = line.call(activation);
  call.out = line.outs;
  const int64_t tiles = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = count * tile / tiles;
    const int pixels = static_cast<int>(count * (tile + 1) / tiles - first);
    for (int p = 0; p < pixels; ++p) {
      const int64_t x = columns[first + p];
      for (int64_t t = 0; t < line.conv.kernel[0]; ++t)
        line.taps[t * kMaxRows + p] = line.lines + (t * line.length + x * line.shift()) * line.element();
      line.outs[p] = line.row + x * line.row_bytes();
    }
    line.run(call, pixels);
  }
}

// The columns that a step writes of a line of its mask; without one, or where all are, only their number.
int64_t list_columns(const uint8_t* need, bool closed, int32_t width, int32_t* columns) {
  if (!need) return width;
  int64_t count = 0;
  for (int32_t x = 0; x < width; ++x) {
    columns[count] = x;
    count += need[x] == (closed ? 0 : 1);
  }
  return count;
}

}  // namespace

int64_t scratch_stem(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const Value& out = plan.values[step.out];
  return list_bytes(out) + pointer_bytes(conv, out) + rounded(conv.kernel[0] * line_elements(conv, out) * 4);
}

void step_stem(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const uint8_t* const need = step.closed ? run.context.grids[step.grid].need : run.need(step.grid, step.run_all_above);
  if (step.closed && run.context.grids[step.grid].open_count == run.rows(step.out)) return;
  const int64_t area = int64_t{in.height} * in.width, length = line_elements(conv, out);
  const bool planes = run.planes(step.in);
  const Picture picture{reinterpret_cast<const float*>(run.data(step.in)),
                        planes ? area : 1,
                        int64_t{in.width} * (planes ? 1 : in.stride),
                        planes ? 1 : in.stride,
                        area * (planes ? in.channels : in.stride),
                        in.height,
                        in.width};
  char* const result = run.data(step.out);
  auto* const columns = reinterpret_cast<int32_t*>(worker.scratch);
  char* const pointers = worker.scratch + list_bytes(out);
  char* const lines = pointers + pointer_bytes(conv, out);
  auto** const taps = reinterpret_cast<const void**>(pointers);
  worker.share(run.call.images * out.height, [&](int64_t index) {
    const int64_t count = list_columns(need ? need + index * out.width : nullptr, step.closed != 0, out.width, columns);
    if (count == 0) return;
    copy_lines(picture, conv, index / out.height, index % out.height, length, out.dtype, lines);
    Line line{conv, out, lines, length, taps, const_cast<void**>(taps + conv.kernel[0] * kMaxRows), nullptr};
    line.row = result + index * out.width * line.row_bytes();
    if (count == out.width) whole_line(line, step.activation[0]);
    else some_pixels(line, columns, count, step.activation[0]);
  });
}
