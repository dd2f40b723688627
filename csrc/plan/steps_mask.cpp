// Steps that decide where to compute: threshold, dilation, and the lists of positions. Source: arXiv 1912.03203, sections
// 3.2 and 3.3.

#include <algorithm>
#include <cstring>

#include "../kernels/mask_bytes.h"
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

template <typename T, typename F>
void decide(int64_t count, uint8_t* __restrict need, const T* __restrict from, F&& open) {
  for (int64_t p = 0; p < count; ++p) need[p] = open(from[p]);
}

// Whether a position that is to be decided has no number to decide by. `within`: null where all are.
bool has_nan(int64_t count, const float* __restrict logits, const uint8_t* __restrict within) {
  int32_t found = 0;
  if (within)
    for (int64_t p = 0; p < count; ++p) found |= (logits[p] != logits[p]) & within[p];
  else
    for (int64_t p = 0; p < count; ++p) found |= logits[p] != logits[p];
  return found != 0;
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
  state.image_counts[image] = static_cast<int32_t>(ones(need, area));
  if (state.tiles) state.tile_counts[image] = walk_tiles(need, static_cast<int32_t>(image), grid, nullptr);
}

// The lists of a grid whose `need` and counts are there. Nobody walks a list of all positions, or of none.
void list_grid(Worker& worker, int32_t id) {
  Run& run = worker.run;
  GridState& state = run.context.grids[id];
  const Grid& grid = run.plan.grids[id];
  const int64_t images = run.call.images, area = int64_t{grid.height} * grid.width;
  int64_t open = 0, tiles = 0;
  for (int64_t i = 0; i < images; ++i) open += state.image_counts[i];
  for (int64_t i = 0; state.tiles && i < images; ++i) tiles += state.tile_counts[i];
  if (worker.id == 0) {
    state.open_count = open;
    state.tile_count = tiles;
  }
  if (open == 0 || open == images * area || (!state.open && !state.closed && !state.tiles)) return;
  worker.share(images, [&](int64_t image) {
    int64_t before = 0, tiles_before = 0;
    for (int64_t i = 0; i < image; ++i) before += state.image_counts[i];
    for (int64_t i = 0; state.tiles && i < image; ++i) tiles_before += state.tile_counts[i];
    const uint8_t* need = state.need + image * area;
    const int64_t own_open = state.image_counts[image];
    const auto own = static_cast<int32_t>(image);
    if (state.open) list_image(need, 1, own, grid.height, grid.width, own_open, state.open + before);
    if (state.closed) list_image(need, 0, own, grid.height, grid.width, area - own_open, state.closed + image * area - before);
    if (state.tiles) walk_tiles(need, own, grid, state.tiles + tiles_before);
  });
}

// to[x * step + shift] |= from[x] wherever that lies within the line.
void mark_shifted(const uint8_t* __restrict from, int32_t count, int32_t shift, int32_t step, uint8_t* __restrict to, int32_t width) {
  if (width - 1 - shift < 0) return;
  const int32_t first = shift < 0 ? (-shift + step - 1) / step : 0, end = std::min(count, (width - 1 - shift) / step + 1);
  if (step == 1)
    for (int32_t x = first; x < end; ++x) to[x + shift] |= from[x];
  else
    for (int32_t x = first; x < end; ++x) to[x * step + shift] |= from[x];
}

// Whether outputs that are all open read every input.
bool reads_all(const Conv& conv, const Grid& out, const Grid& in) {
  const int32_t outs[2] = {out.height, out.width}, ins[2] = {in.height, in.width};
  for (int i = 0; i < 2; ++i)
    if (conv.dilation[i] != 1 || conv.stride[i] > conv.kernel[i] ||
        int64_t{outs[i] - 1} * conv.stride[i] + conv.kernel[i] - conv.padding[i] < ins[i]) return false;
  return true;
}

// Marks what a convolution reads for the open outputs of one image: along the lines first, then across them. `line` has room
// for one of the input.
void dilate_image(const uint8_t* from, const Grid& out, const Conv& conv, uint8_t* to, const Grid& in, uint8_t* line) {
  std::memset(to, 0, int64_t{in.height} * in.width);
  for (int32_t oy = 0; oy < out.height; ++oy, from += out.width) {
    std::memset(line, 0, in.width);
    for (int j = 0; j < conv.kernel[1]; ++j)
      mark_shifted(from, out.width, j * conv.dilation[1] - conv.padding[1], conv.stride[1], line, in.width);
    for (int i = 0; i < conv.kernel[0]; ++i) {
      const int64_t y = int64_t{oy} * conv.stride[0] - conv.padding[0] + int64_t{i} * conv.dilation[0];
      if (y >= 0 && y < in.height) mark_shifted(line, in.width, 0, 1, to + y * in.width, in.width);
    }
  }
}

}  // namespace

int64_t scratch_dilate(const Plan& plan, const Step& step) { return plan.grids[step.grid2].width; }

void step_threshold(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Grid& grid = run.plan.grids[step.grid];
  GridState& state = run.context.grids[step.grid];
  const int64_t area = int64_t{grid.height} * grid.width;
  const float* logits = reinterpret_cast<const float*>(run.data(step.in));
  // Decisions about channels have one row of logits an image.
  const Value& in = run.value(step.in);
  const int64_t step_of_image = int64_t{in.height} * in.width * in.stride;
  const uint8_t* forced = run.forced(step.grid);
  const uint8_t* within = step.grid2 >= 0 ? run.context.grids[step.grid2].need : nullptr;
  const float threshold = step.floats[0];
  worker.share(run.call.images, [&](int64_t image) {
    uint8_t* need = state.need + image * area;
    if (forced) {
      decide(area, need, forced + image * area, [](uint8_t f) { return f != 0; });
    } else {
      const float* own = logits + image * step_of_image;
      decide(area, need, own, [=](float logit) { return logit >= threshold; });
      int32_t none = -1;
      if (has_nan(area, own, within ? within + image * area : nullptr)) run.spoilt.compare_exchange_strong(none, worker.step);
    }
    if (within)
      for (int64_t p = 0; p < area; ++p) need[p] &= within[image * area + p];
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
  const Conv& conv = run.conv(step.conv[0]);
  const int64_t out_area = int64_t{out.height} * out.width, in_area = int64_t{in.height} * in.width;
  const bool whole = reads_all(conv, out, in);
  const uint8_t* forced = run.forced(step.grid2);
  worker.share(run.call.images, [&](int64_t image) {
    uint8_t* need = to.need + image * in_area;
    if (forced) {
      decide(in_area, need, forced + image * in_area, [](uint8_t f) { return f != 0; });
    } else if (from.image_counts[image] == 0 || (whole && from.image_counts[image] == out_area)) {
      std::memset(need, from.image_counts[image] != 0, in_area);
    } else {
      dilate_image(from.need + image * out_area, out, conv, need, in, reinterpret_cast<uint8_t*>(worker.scratch));
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
  const Value& out = run.value(step.out);
  const int64_t step_of_image = int64_t{out.height} * out.width * out.stride;
  const Grid& grid = run.plan.grids[step.grid];
  const int64_t area = int64_t{grid.height} * grid.width;
  worker.share(run.call.images, [&](int64_t image) {
    for (int64_t p = 0; p < area; ++p) values[image * step_of_image + p] = state.need[image * area + p];
  });
}
