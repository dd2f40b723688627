// The first convolution reads the picture itself. Its lines are copied once, padded, plane by plane; then every kernel line
// is a tap whose channels are the pixels of that line.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "run.h"

namespace {

// A padded line, and room for the vectors that read past its end.
int64_t line_floats(const Conv& conv, const Value& out) {
  return (int64_t{out.width} - 1) * conv.stride[1] + conv.kernel[1] + 16;
}

struct Picture {
  const float* base;
  int64_t channel_step, row_step, x_step, image_step;  // floats
  int32_t height, width;
};

// lines[(c * kernel + ky)] = the line that output row `oy` reads, zeros outside of the picture.
void copy_lines(const Picture& picture, const Conv& conv, int64_t image, int64_t oy, int64_t length, float* lines) {
  const int64_t left = conv.padding[1];
  const int64_t inside = std::max<int64_t>(0, std::min<int64_t>(picture.width, length - left));
  for (int32_t c = 0; c < conv.in_channels; ++c) {
    for (int32_t i = 0; i < conv.kernel[0]; ++i, lines += length) {
      const int64_t y = oy * conv.stride[0] - conv.padding[0] + int64_t{i} * conv.dilation[0];
      if (y < 0 || y >= picture.height) {
        std::memset(lines, 0, length * sizeof(float));
        continue;
      }
      const float* from = picture.base + image * picture.image_step + c * picture.channel_step + y * picture.row_step;
      std::memset(lines, 0, left * sizeof(float));
      if (picture.x_step == 1) std::memcpy(lines + left, from, inside * sizeof(float));
      else
        for (int64_t x = 0; x < inside; ++x) lines[left + x] = from[x * picture.x_step];
      std::memset(lines + left + inside, 0, (length - left - inside) * sizeof(float));
    }
  }
}

}  // namespace

int64_t scratch_stem(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int64_t taps = int64_t{conv.in_channels} * conv.kernel[0];
  return taps * (line_floats(conv, plan.values[step.out]) * int64_t{sizeof(float)} + kMaxRows * int64_t{sizeof(void*)}) + 64;
}

void step_stem(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const int64_t area = int64_t{in.height} * in.width, length = line_floats(conv, out);
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
  const int64_t depth = (taps_count * conv.kernel[1] + 3) / 4 * 4;
  worker.share(run.call.images * out.height, [&](int64_t line) {
    const int64_t image = line / out.height, oy = line % out.height;
    auto** taps = reinterpret_cast<const void**>(worker.scratch);
    float* lines = reinterpret_cast<float*>(worker.scratch + (taps_count * kMaxRows * sizeof(void*) + 63) / 64 * 64);
    copy_lines(picture, conv, image, oy, length, lines);
    for (int64_t t = 0; t < taps_count; ++t)
      for (int p = 0; p < kMaxRows; ++p) taps[t * kMaxRows + p] = lines + t * length + p * conv.stride[1];
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
        call.weight = static_cast<const float*>(conv.weight) + panel * depth * kPanel;
        call.bias = conv.bias + panel * kPanel;
        call.column = panel * kPanel;
        call.columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - call.column));
        gemm_tile(out.dtype, pixels, call.columns)(call);
      }
    }
  });
}
