// The first convolution reads the picture itself: few channels, so the taps of a position are copied into one short row.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "run.h"

namespace {

constexpr int64_t kTilesOfTask = 8;

int64_t depth_of(const Conv& conv) {
  return (int64_t{conv.in_channels} * conv.kernel[0] * conv.kernel[1] + 3) / 4 * 4;
}

// Copies `Width` floats, or `width` where that is not known when compiling.
template <int Width>
void copy_taps(const float* from, int width, float* to) {
  std::memcpy(to, from, (Width ? Width : width) * sizeof(float));
}

// One kernel line of one channel for `pixels` neighbouring outputs: rows[p][..width] = line[x0 + p * stride ..].
template <int Width>
void gather_line(const float* line, int32_t in_width, int32_t x0, int32_t stride, int32_t width, int pixels, float* row,
                 int64_t depth) {
  for (int p = 0; p < pixels; ++p, x0 += stride, row += depth) {
    if (x0 >= 0 && x0 + width <= in_width) {
      copy_taps<Width>(line + x0, width, row);
    } else {
      for (int32_t j = 0; j < width; ++j) {
        const int32_t x = x0 + j;
        row[j] = x >= 0 && x < in_width ? line[x] : 0.0f;
      }
    }
  }
}

struct Picture {
  const float* base;
  int64_t channel_step, row_step, x_step, image_step;  // floats
  int32_t height, width;
};

// The taps of `pixels` outputs of one line, each as a row of `depth` floats in the order (channel, ky, kx).
void gather(const Picture& picture, const Conv& conv, int64_t image, int32_t oy, int32_t ox, int pixels, float* rows,
            int64_t depth) {
  const int32_t x0 = ox * conv.stride[1] - conv.padding[1], width = conv.kernel[1];
  float* at = rows;
  for (int32_t c = 0; c < conv.in_channels; ++c) {
    for (int32_t i = 0; i < conv.kernel[0]; ++i, at += width) {
      const int32_t y = oy * conv.stride[0] - conv.padding[0] + i * conv.dilation[0];
      if (y < 0 || y >= picture.height) {
        for (int p = 0; p < pixels; ++p) std::memset(at + p * depth, 0, width * sizeof(float));
        continue;
      }
      const float* line = picture.base + image * picture.image_step + c * picture.channel_step + y * picture.row_step;
      if (picture.x_step == 1 && conv.dilation[1] == 1) {
        if (width == 7) gather_line<7>(line, picture.width, x0, conv.stride[1], width, pixels, at, depth);
        else if (width == 3) gather_line<3>(line, picture.width, x0, conv.stride[1], width, pixels, at, depth);
        else gather_line<0>(line, picture.width, x0, conv.stride[1], width, pixels, at, depth);
        continue;
      }
      for (int p = 0; p < pixels; ++p) {
        for (int32_t j = 0; j < width; ++j) {
          const int32_t x = x0 + p * conv.stride[1] + j * conv.dilation[1];
          at[p * depth + j] = x >= 0 && x < picture.width ? line[x * picture.x_step] : 0.0f;
        }
      }
    }
  }
  const int64_t used = int64_t{conv.in_channels} * conv.kernel[0] * conv.kernel[1];
  for (int p = 0; p < pixels; ++p) std::memset(rows + p * depth + used, 0, (depth - used) * sizeof(float));
}

}  // namespace

int64_t scratch_stem(const Plan& plan, const Step& step) {
  return (kMaxRows + 1) * (depth_of(plan.convs[step.conv[0]]) + 16) * int64_t{sizeof(float)};
}

void step_stem(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const int64_t area = int64_t{in.height} * in.width, depth = depth_of(conv);
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
  const int64_t tiles = (out.width + kMaxRows - 1) / kMaxRows;
  const int64_t lines = std::max<int64_t>(1, kTilesOfTask / tiles);
  const int64_t all = run.call.images * out.height;
  worker.share((all + lines - 1) / lines, [&](int64_t task) {
    float* rows = reinterpret_cast<float*>(worker.scratch);
    for (int64_t line = task * lines; line < std::min(all, (task + 1) * lines); ++line) {
      const int64_t image = line / out.height;
      const auto oy = static_cast<int32_t>(line % out.height);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const auto first = static_cast<int32_t>(out.width * tile / tiles);
        const int pixels = static_cast<int>(out.width * (tile + 1) / tiles) - first;
        gather(picture, conv, image, oy, first, pixels, rows, depth);
        const void* taps[kMaxRows];
        void* outs[kMaxRows];
        for (int p = 0; p < pixels; ++p) {
          taps[p] = rows + p * depth;
          outs[p] = result + (line * out.width + first + p) * out_bytes;
        }
        TileCall call{};
        call.taps = taps;
        call.taps_count = 1;
        call.channels = depth;
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
    }
  });
}
