// The first convolution reads the picture itself. Its lines are copied once, padded, plane by plane; then every kernel line
// is a tap whose channels are the pixels of that line.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "../kernels/rowwise.h"
#include "run.h"

namespace {

// A padded line, and room for the vectors that read past its end.
int64_t line_elements(const Conv& conv, const Value& out) {
  return (int64_t{out.width} - 1) * conv.stride[1] + conv.kernel[1] + 16;
}

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Picture {
  const float* base;
  int64_t channel_step, row_step, x_step, image_step;  // floats
  int32_t height, width;
};

// Where the lines go: as floats, or rounded to bfloat16.
struct Lines {
  char* base;
  int64_t length;  // elements
  int dtype;

  // Line `index` becomes `left` zeros, `count` pixels that lie `step` apart, and zeros.
  void fill(int64_t index, int64_t left, const float* from, int64_t step, int64_t count, float* spare) const {
    const int64_t element = element_bytes(dtype);
    char* const line = base + index * length * element;
    std::memset(line, 0, left * element);
    if (step != 1) {
      for (int64_t x = 0; x < count; ++x) spare[x] = from[x * step];
      from = spare;
    }
    if (dtype == kFloat32) std::memcpy(line + left * element, from, count * element);
    else row_kernels(dtype).from_float(from, count, kNone, line + left * element);
    std::memset(line + (left + count) * element, 0, (length - left - count) * element);
  }
};

// Line c * kernel + ky is the one that output row `oy` reads, zeros outside of the picture.
void copy_lines(const Picture& picture, const Conv& conv, int64_t image, int64_t oy, const Lines& lines, float* spare) {
  const int64_t left = std::min<int64_t>(conv.padding[1], lines.length);
  const int64_t inside = std::min<int64_t>(picture.width, lines.length - left);
  int64_t index = 0;
  for (int32_t c = 0; c < conv.in_channels; ++c) {
    for (int32_t i = 0; i < conv.kernel[0]; ++i, ++index) {
      const int64_t y = oy * conv.stride[0] - conv.padding[0] + int64_t{i} * conv.dilation[0];
      const bool there = y >= 0 && y < picture.height;
      const int64_t start = image * picture.image_step + c * picture.channel_step + (there ? y * picture.row_step : 0);
      lines.fill(index, left, picture.base + start, picture.x_step, there ? inside : 0, spare);
    }
  }
}

}  // namespace

int64_t scratch_stem(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int64_t taps = int64_t{conv.in_channels} * conv.kernel[0];
  const int64_t length = line_elements(conv, plan.values[step.out]);
  return rounded(taps * kMaxRows * int64_t{sizeof(void*)}) + rounded(length * 4) + taps * length * 4 + 64;
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
  const int64_t tiles = (out.width + kMaxRows - 1) / kMaxRows, taps_count = int64_t{conv.in_channels} * conv.kernel[0];
  const int64_t element = element_bytes(out.dtype);
  int64_t elements = panel_elements(out.dtype, taps_count, conv.kernel[1]);
  if (out.dtype == kFloat32) elements = (elements + 4 * kPanel - 1) / (4 * kPanel) * (4 * kPanel);
  const int64_t panel_bytes = elements * element;
  worker.share(run.call.images * out.height, [&](int64_t line) {
    const int64_t image = line / out.height, oy = line % out.height;
    auto** taps = reinterpret_cast<const void**>(worker.scratch);
    float* spare = reinterpret_cast<float*>(worker.scratch + rounded(taps_count * kMaxRows * int64_t{sizeof(void*)}));
    const Lines lines{reinterpret_cast<char*>(spare) + rounded(length * 4), length, out.dtype};
    copy_lines(picture, conv, image, oy, lines, spare);
    for (int64_t t = 0; t < taps_count; ++t)
      for (int p = 0; p < kMaxRows; ++p) taps[t * kMaxRows + p] = lines.base + (t * length + p * conv.stride[1]) * element;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = out.width * tile / tiles;
      const int pixels = static_cast<int>(out.width * (tile + 1) / tiles - first);
      void* outs[kMaxRows];
      for (int p = 0; p < pixels; ++p) outs[p] = result + (line * out.width + first + p) * out_bytes;
      TileCall call{};
      call.taps = taps;
      call.taps_count = static_cast<int>(taps_count);
      call.channels = conv.kernel[1];
      call.tap_offset = first * conv.stride[1];
      call.out = outs;
      call.activation = step.activation[0];
      call.final_activation = kNone;
      for (int64_t panel = 0; panel < panels; ++panel) {
        call.weight = static_cast<const char*>(conv.weight) + panel * panel_bytes;
        call.bias = conv.bias + panel * kPanel;
        call.column = panel * kPanel;
        call.columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - call.column));
        gemm_tile(out.dtype, pixels, call.columns)(call);
      }
    }
  });
}
