// Steps that decide where to compute: logits, threshold, dilation, and the lists of positions. Source: arXiv 1912.03203,
// sections 3.2 and 3.3.

#include <algorithm>
#include <cstring>

#include "../kernels/rowwise.h"
#include "run.h"

namespace {

// Positions of one image in order, without a branch on the mask: what is not needed is overwritten by the next.
int64_t list_image(const uint8_t* need, uint8_t wanted, int32_t image, int32_t height, int32_t width, int64_t most,
                   Position* list) {
  int64_t count = 0;
  int32_t row = image * height * width;
  for (int32_t y = 0; y < height; ++y) {
    for (int32_t x = 0; x < width; ++x, ++row) {
      if (count == most) return count;
      list[count] = {row, image, static_cast<int16_t>(y), static_cast<int16_t>(x)};
      count += *need++ == wanted;
    }
  }
  return count;
}

// Tiles of 2x2 positions of one image that hold an open one: counts them, and lists them where `list` is given.
int32_t walk_tiles(const uint8_t* need, int32_t image, const Grid& grid, Position* list) {
  int32_t count = 0;
  for (int32_t y = 0; y < grid.height; y += 2) {
    const uint8_t* line = need + int64_t{y} * grid.width;
    const uint8_t* below = y + 1 < grid.height ? line + grid.width : line;
    for (int32_t x = 0; x < grid.width; x += 2) {
      const int32_t right = x + 1 < grid.width ? x + 1 : x;
      if (!(line[x] | line[right] | below[x] | below[right])) continue;
      if (list) list[count] = {0, image, static_cast<int16_t>(y / 2), static_cast<int16_t>(x / 2)};
      ++count;
    }
  }
  return count;
}

// What the lists of an image need to know of the images before it.
void count_image(const Grid& grid, GridState& state, int64_t image) {
  const int64_t area = int64_t{grid.height} * grid.width;
  const uint8_t* need = state.need + image * area;
  int32_t sum = 0;
  for (int64_t p = 0; p < area; ++p) sum += need[p];
  state.image_counts[image] = sum;
  if (state.tiles) state.tile_counts[image] = walk_tiles(need, static_cast<int32_t>(image), grid, nullptr);
}

// The lists of a grid whose `need` and `image_counts` are there.
void list_grid(Worker& worker, int32_t id) {
  Run& run = worker.run;
  GridState& state = run.context.grids[id];
  const Grid& grid = run.plan.grids[id];
  const int64_t area = int64_t{grid.height} * grid.width;
  worker.share(run.call.images, [&](int64_t image) {
    int64_t before = 0;
    for (int64_t i = 0; i < image; ++i) before += state.image_counts[i];
    const uint8_t* need = state.need + image * area;
    const int64_t open = state.image_counts[image];
    const auto own = static_cast<int32_t>(image);
    list_image(need, 1, own, grid.height, grid.width, open, state.open + before);
    if (state.closed) list_image(need, 0, own, grid.height, grid.width, area - open, state.closed + image * area - before);
    if (image == run.call.images - 1) state.open_count = before + open;
    if (!state.tiles) return;
    int64_t tiles_before = 0;
    for (int64_t i = 0; i < image; ++i) tiles_before += state.tile_counts[i];
    const int32_t tiles = walk_tiles(need, own, grid, state.tiles + tiles_before);
    if (image == run.call.images - 1) state.tile_count = tiles_before + tiles;
  });
}

// Marks what a convolution reads for the open outputs of one image.
void dilate_image(const uint8_t* from, const Grid& out, const Conv& conv, uint8_t* to, const Grid& in) {
  std::memset(to, 0, int64_t{in.height} * in.width);
  for (int32_t oy = 0; oy < out.height; ++oy) {
    const uint8_t* line = from + int64_t{oy} * out.width;
    for (int i = 0; i < conv.kernel[0]; ++i) {
      const int32_t y = oy * conv.stride[0] - conv.padding[0] + i * conv.dilation[0];
      if (y < 0 || y >= in.height) continue;
      uint8_t* target = to + int64_t{y} * in.width;
      for (int j = 0; j < conv.kernel[1]; ++j) {
        const int32_t shift = j * conv.dilation[1] - conv.padding[1], step = conv.stride[1];
        int32_t first = shift < 0 ? (-shift + step - 1) / step : 0;
        const int32_t end = std::min(out.width, (in.width - 1 - shift) / step + 1);
        if (in.width - 1 - shift < 0) continue;
        if (step == 1) {
          for (int32_t x = first; x < end; ++x) target[x + shift] |= line[x];
        } else {
          for (int32_t x = first; x < end; ++x) target[x * step + shift] |= line[x];
        }
      }
    }
  }
}

}  // namespace

int64_t scratch_gate(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  return int64_t{conv.kernel[0]} * conv.kernel[1] * kGatePixels * sizeof(void*);
}

void step_gate(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const RowKernels& kernels = row_kernels(in.dtype);
  const int64_t row_bytes = in.stride * element_bytes(in.dtype);
  const char* base = run.data(step.in);
  float* logits = reinterpret_cast<float*>(run.data(step.out));
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const bool squeeze = step.ints[0] != 0;
  // Where every input position is the centre of an output one, the average comes along; else it takes its own walk.
  bool along = squeeze && out.height == in.height && out.width == in.width;
  for (int i = 0; i < 2; ++i)
    along = along && conv.stride[i] == 1 && conv.padding[i] == conv.kernel[i] / 2 * conv.dilation[i];
  const float* weight = static_cast<const float*>(conv.weight);
  const float* linear = weight + int64_t{taps_count} * in.channels;
  const int32_t center = conv.kernel[0] / 2 * conv.kernel[1] + conv.kernel[1] / 2;
  // One sum for each line, added up in order afterwards: the same bits whichever thread took the line.
  float* line_sums = squeeze ? reinterpret_cast<float*>(run.data(step.aux[0])) : nullptr;
  worker.share(run.call.images * out.height, [&](int64_t task) {
    const auto image = static_cast<int32_t>(task / out.height), oy = static_cast<int32_t>(task % out.height);
    const auto** taps = reinterpret_cast<const void**>(worker.scratch);
    float sum = 0;
    for (int32_t ox = 0; ox < out.width; ox += kGatePixels) {
      const int pixels = std::min(kGatePixels, out.width - ox);
      const int32_t x0 = ox * conv.stride[1] - conv.padding[1], reach = (conv.kernel[1] - 1) * conv.dilation[1];
      const bool within = pixels == kGatePixels && x0 >= 0 && x0 + reach + (kGatePixels - 1) * conv.stride[1] < in.width;
      int t = 0;
      for (int i = 0; i < conv.kernel[0]; ++i) {
        const int32_t y = oy * conv.stride[0] - conv.padding[0] + i * conv.dilation[0];
        const bool there = y >= 0 && y < in.height;
        const char* line = base + (int64_t{image} * in.height + (there ? y : 0)) * in.width * row_bytes;
        for (int j = 0; j < conv.kernel[1]; ++j, ++t) {
          for (int p = 0; p < kGatePixels; ++p) {
            const int32_t x = x0 + p * conv.stride[1] + j * conv.dilation[1];
            const bool inside = there && (within || (p < pixels && x >= 0 && x < in.width));
            taps[t * kGatePixels + p] = inside ? line + x * row_bytes : static_cast<const void*>(worker.zeros);
          }
        }
      }
      float sums[kGatePixels];
      sum += kernels.dots(taps, taps_count, in.channels, weight, center, along ? linear : nullptr, pixels, sums);
      for (int p = 0; p < pixels; ++p) logits[task * out.width + ox + p] = sums[p] + conv.bias[0];
    }
    if (along) line_sums[task] = sum;
  });
  if (!squeeze) return;
  if (!along) {
    worker.share(run.call.images * in.height, [&](int64_t task) {
      const auto** taps = reinterpret_cast<const void**>(worker.scratch);
      float sum = 0;
      for (int32_t x = 0; x < in.width; x += kGatePixels) {
        for (int p = 0; p < kGatePixels; ++p)
          taps[p] = x + p < in.width ? base + (task * in.width + x + p) * row_bytes
                                     : static_cast<const void*>(worker.zeros);
        float sums[kGatePixels];
        kernels.dots(taps, 1, in.channels, linear, 0, nullptr, 0, sums);
        for (int p = 0; p < kGatePixels; ++p) sum += sums[p];
      }
      line_sums[task] = sum;
    });
  }
  worker.barrier();
  worker.share(run.call.images, [&](int64_t image) {
    double sum = 0;
    for (int32_t y = 0; y < in.height; ++y) sum += line_sums[image * in.height + y];
    const auto offset = static_cast<float>(sum / (double(in.height) * in.width));
    const int64_t area = int64_t{out.height} * out.width;
    for (int64_t p = 0; p < area; ++p) logits[image * area + p] += offset;
  });
}

void step_threshold(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Grid& grid = run.plan.grids[step.grid];
  GridState& state = run.context.grids[step.grid];
  const int64_t area = int64_t{grid.height} * grid.width;
  const float* logits = reinterpret_cast<const float*>(run.data(step.in));
  const uint8_t* forced = run.call.forced ? run.call.forced[step.grid] : nullptr;
  const float threshold = step.floats[0];
  worker.share(run.call.images, [&](int64_t image) {
    uint8_t* need = state.need + image * area;
    if (forced) {
      for (int64_t p = 0; p < area; ++p) need[p] = forced[image * area + p] != 0;
    } else {
      for (int64_t p = 0; p < area; ++p) need[p] = logits[image * area + p] >= threshold;
    }
    count_image(grid, state, image);
  });
  worker.barrier();
  list_grid(worker, step.grid);
}

void step_dilate(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Grid &out = run.plan.grids[step.grid], &in = run.plan.grids[step.grid2];
  const GridState& from = run.context.grids[step.grid];
  GridState& to = run.context.grids[step.grid2];
  const int64_t out_area = int64_t{out.height} * out.width, in_area = int64_t{in.height} * in.width;
  const uint8_t* forced = run.call.forced ? run.call.forced[step.grid2] : nullptr;
  worker.share(run.call.images, [&](int64_t image) {
    uint8_t* need = to.need + image * in_area;
    if (forced) {
      for (int64_t p = 0; p < in_area; ++p) need[p] = forced[image * in_area + p] != 0;
    } else {
      dilate_image(from.need + image * out_area, out, run.conv(step.conv[0]), need, in);
    }
    count_image(in, to, image);
  });
  worker.barrier();
  list_grid(worker, step.grid2);
}

void step_mask_value(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const GridState& state = run.context.grids[step.grid];
  float* values = reinterpret_cast<float*>(run.data(step.out));
  const int64_t area = run.rows(step.out) / run.call.images;
  worker.share(run.call.images, [&](int64_t image) {
    for (int64_t p = image * area; p < (image + 1) * area; ++p) values[p] = state.need[p];
  });
}
