// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3), over all tiles of 2x2 outputs or those that a mask touches.

#include <algorithm>

#include "winograd_tiles.h"

int64_t scratch_winograd(const Plan& plan, const Step& step) {
  const int64_t channels = plan.convs[step.conv[0]].in_channels, element = element_bytes(plan.values[step.in].dtype);
  const int64_t tiles = winograd_tiles_of_task(channels, element);
  const int64_t transformed = winograd_row(channels, element) * element, products = kPanel * int64_t{sizeof(float)};
  return tiles * (sizeof(Position) + kWinogradPoints * (transformed + products)) + 4096;
}

void step_winograd(Worker& worker, const Step& step, const Position* list, int64_t tiles) {
  const Conv& conv = worker.run.conv(step.conv[0]);
  const int dtype = worker.run.value(step.in).dtype;
  const WinogradTiles task(worker.run, step, list, worker.zeros);
  const int64_t channels = conv.in_channels, element = element_bytes(dtype), row = winograd_row(channels, element);
  const int64_t point_weights = panel_elements(dtype, 1, channels), most = winograd_tiles_of_task(channels, element);
  const int64_t panels = (conv.out_channels + kPanel - 1) / kPanel, threads = worker.threads;
  int64_t blocks = (tiles + most - 1) / most, groups = 1;
  if (threads > 1 && blocks < 4 * threads && tiles >= 2 * kMaxRows * threads)
    blocks = std::max<int64_t>((blocks + threads - 1) / threads * threads, threads);
  else if (blocks < 2 * threads)
    groups = std::min(panels, 2 * threads);

  worker.share(blocks * groups, [&](int64_t index) {
    const int64_t block = index % blocks, group = index / blocks;
    const int64_t first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
    if (count <= 0) return;
    auto* places = reinterpret_cast<Position*>(worker.scratch);
    char* const transformed = worker.scratch + (most * int64_t{sizeof(Position)} + 63) / 64 * 64;
    auto* products = reinterpret_cast<float*>(transformed + kWinogradPoints * most * row * element);
    for (int64_t t = 0; t < count; ++t) {
      places[t] = task.tile(first + t);
      task.transform(places[t], 0, channels, transformed + t * row * element, count * row);
    }
    for (int64_t panel = panels * group / groups; panel < panels * (group + 1) / groups; ++panel) {
      const char* weight = static_cast<const char*>(conv.winograd) + panel * kWinogradPoints * point_weights * element;
      WinogradProducts{transformed, count * row, row, count, weight, point_weights, channels, products, false, dtype}.run();
      for (int64_t t = 0; t < count; ++t)
        task.finish(places[t], products + t * kPanel, count * kPanel, conv.bias + panel * kPanel, panel);
    }
  });
}
