// The first convolution reads the picture itself. Its lines are copied once, padded, channels beside each other; then every
// kernel line is a tap whose channels are the pixels and channels that it covers.

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

}  // namespace

int64_t scratch_stem(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int64_t lines = conv.kernel[0] * line_elements(conv, plan.values[step.out]);
  return pointer_bytes(conv, plan.values[step.out]) + rounded(lines * 4);
}

void step_stem(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const int64_t area = int64_t{in.height} * in.width, length = line_elements(conv, out);
  const bool planes = run.planes(step.in);
  const Picture picture{reinterpret_cast<const float*>(run.data(step.in)),
                        planes ? area : 1,
                        int64_t{in.width} * (planes ? 1 : in.stride),
                        planes ? 1 : in.stride,
                        area * (planes ? in.channels : in.stride),
                        in.height,
                        in.width};
  char* result = run.data(step.out);
  const int64_t out_bytes = out.stride * element_bytes(out.dtype), panels = (conv.out_channels + kPanel - 1) / kPanel;
  const int64_t tiles = (out.width + kMaxRows - 1) / kMaxRows, taps_count = conv.kernel[0];
  const int64_t channels = int64_t{conv.kernel[1]} * conv.in_channels, shift = int64_t{conv.stride[1]} * conv.in_channels;
  const int64_t element = element_bytes(out.dtype), panel_bytes = panel_elements(out.dtype, taps_count, channels) * element;
  // Tiles of as many rows each go through a panel at once.
  const int64_t group = out.dtype == kFloat32 && out.width % tiles == 0 ? tiles : 1;
  worker.share(run.call.images * out.height, [&](int64_t line) {
    const int64_t image = line / out.height, oy = line % out.height;
    auto** taps = reinterpret_cast<const void**>(worker.scratch);
    auto** outs = const_cast<void**>(taps + taps_count * kMaxRows);
    char* const lines = worker.scratch + pointer_bytes(conv, out);
    copy_lines(picture, conv, image, oy, length, out.dtype, lines);
    for (int64_t t = 0; t < taps_count; ++t)
      for (int p = 0; p < kMaxRows; ++p) taps[t * kMaxRows + p] = lines + (t * length + p * shift) * element;
    char* const row = result + line * out.width * out_bytes;
    // Behind the results of this line come those of the next, which are fetched meanwhile where tiles go one by one.
    for (int64_t p = 0; p < 2 * out.width; ++p) outs[p] = row + p * out_bytes;
    TileCall call{};
    call.taps = taps;
    call.taps_count = static_cast<int>(taps_count);
    call.channels = channels;
    call.row_step = shift;
    call.more = static_cast<int>(group) - 1;
    call.activation = step.activation[0];
    call.final_activation = kNone;
    for (int64_t tile = 0; tile < tiles; tile += group) {
      const int64_t first = out.width * tile / tiles;
      const int pixels = static_cast<int>(out.width * (tile + 1) / tiles - first);
      call.tap_offset = first * shift;
      call.out = outs + first;
      call.next.out = group == 1 ? outs + first + pixels : nullptr;
      call.next.rows = pixels;
      for (int64_t panel = 0; panel < panels; ++panel) {
        call.weight = static_cast<const char*>(conv.weight) + panel * panel_bytes;
        call.bias = conv.bias + panel * kPanel;
        call.column = call.next.column = panel * kPanel;
        call.columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - call.column));
        gemm_tile(out.dtype, pixels, call.columns)(call);
      }
    }
  });
}
