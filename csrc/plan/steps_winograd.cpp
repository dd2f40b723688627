// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3), over all tiles of 2x2 outputs or those that a mask touches.

#include <algorithm>
#include <cstring>

#include "../kernels/gemm.h"
#include "../kernels/winograd.h"
#include "run.h"

namespace {

constexpr int64_t kMostTiles = 56;             // 2x2 tiles of a task
constexpr int64_t kTransformedBytes = 480 << 10;  // of a task's transformed input, which stays in the L2 cache
constexpr float kNoBias[kPanel] = {};

int64_t tiles_of_task(int64_t channels) {
  const int64_t fit = kTransformedBytes / (kWinogradPoints * channels * int64_t{sizeof(float)}) / kMaxRows * kMaxRows;
  return std::max<int64_t>(kMaxRows, std::min(kMostTiles, fit));
}

struct Task {
  const Run& run;
  const Step& step;
  const Conv& conv;
  const Value &in, &out;
  const char* source;
  char* result;
  const char* residual;
  int64_t residual_bytes;
  const uint8_t *need, *input_need;   // of the outputs that may be written, of the inputs that hold something; or null
  const float* zeros;
  int64_t tiles_high, tiles_wide;

  Position tile(const Position* list, int64_t index) const {
    if (list) return list[index];
    const int64_t area = tiles_high * tiles_wide, rest = index % area;
    return {0, static_cast<int32_t>(index / area), static_cast<int16_t>(rest / tiles_wide),
            static_cast<int16_t>(rest % tiles_wide)};
  }

  void gather(const Position& at, const void** patch) const {
    const int32_t y0 = 2 * at.y - conv.padding[0], x0 = 2 * at.x - conv.padding[1];
    const int64_t image = int64_t{at.image} * in.height * in.width;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int32_t y = y0 + i, x = x0 + j;
        const int64_t row = image + int64_t{y} * in.width + x;
        const bool there = y >= 0 && y < in.height && x >= 0 && x < in.width && (!input_need || input_need[row]);
        patch[4 * i + j] = there ? source + row * in.stride * 4 : reinterpret_cast<const char*>(zeros);
      }
    }
  }

  void scatter(const Position& at, const float* sums, int64_t column, int columns, const WinogradKernels& kernels) const {
    for (int q = 0; q < 4; ++q) {
      const int32_t y = 2 * at.y + q / 2, x = 2 * at.x + q % 2;
      if (y >= out.height || x >= out.width) continue;
      const int64_t row = (int64_t{at.image} * out.height + y) * out.width + x;
      if (need && !need[row]) continue;
      const auto* add = residual ? reinterpret_cast<const float*>(residual + row * residual_bytes) + column : nullptr;
      kernels.finish(sums + q * kPanel, columns, step.activation[0], step.final_activation, add,
                     reinterpret_cast<float*>(result + row * out.stride * 4) + column);
    }
  }
};

}  // namespace

int64_t scratch_winograd(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int64_t tiles = tiles_of_task(conv.in_channels);
  return tiles * (sizeof(Position) + kWinogradPoints * (conv.in_channels + 16 + kPanel) * int64_t{sizeof(float)}) + 4096;
}

void step_winograd(Worker& worker, const Step& step, const Position* list, int64_t tiles) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  Task task{run, step, conv, in, out, run.data(step.in), run.data(step.out), nullptr, 0, nullptr, nullptr, worker.zeros,
            (out.height + 1) / 2, (out.width + 1) / 2};
  if (step.in2 >= 0) {
    task.residual = run.data(step.in2);
    task.residual_bytes = run.value(step.in2).stride * int64_t{sizeof(float)};
  }
  if (list) task.need = run.context.grids[step.grid].need;
  // What the last convolution skipped may hold anything; the transform must read zeros there.
  if (step.grid2 >= 0) task.input_need = run.context.grids[step.grid2].need;
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t channels = conv.in_channels, row = channels * 4 % 4096 ? channels : channels + 16;
  const int64_t panels = (conv.out_channels + kPanel - 1) / kPanel, most = tiles_of_task(channels);
  const int64_t threads = worker.threads;
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
    auto* transformed = reinterpret_cast<float*>(worker.scratch + (most * int64_t{sizeof(Position)} + 63) / 64 * 64);
    float* products = transformed + kWinogradPoints * most * row;
    const void* patch[kWinogradPoints];
    for (int64_t t = 0; t < count; ++t) {
      places[t] = task.tile(list, first + t);
      task.gather(places[t], patch);
      kernels.input(patch, channels, transformed + t * row, count * row);
    }
    TileCall call{};
    call.taps_count = 1;
    call.channels = channels;
    call.bias = kNoBias;
    call.columns = kPanel;
    const int64_t row_tiles = (count + kMaxRows - 1) / kMaxRows;
    for (int64_t panel = panels * group / groups; panel < panels * (group + 1) / groups; ++panel) {
      for (int64_t point = 0; point < kWinogradPoints; ++point) {
        call.weight = static_cast<const float*>(conv.winograd) + (panel * kWinogradPoints + point) * channels * kPanel;
        for (int64_t tile = 0; tile < row_tiles; ++tile) {
          const int64_t from = count * tile / row_tiles, rows = count * (tile + 1) / row_tiles - from;
          const void* taps[kMaxRows];
          void* outs[kMaxRows];
          for (int64_t r = 0; r < rows; ++r) {
            taps[r] = transformed + (point * count + from + r) * row;
            outs[r] = products + (point * count + from + r) * kPanel;
          }
          call.taps = taps;
          call.out = outs;
          gemm_tile(kFloat32, static_cast<int>(rows), kPanel)(call);
        }
      }
      const int64_t column = panel * kPanel;
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - column));
      for (int64_t t = 0; t < count; ++t) {
        float sums[4 * kPanel];
        kernels.output(products + t * kPanel, count * kPanel, conv.bias + column, sums);
        task.scatter(places[t], sums, column, columns, kernels);
      }
    }
  });
}
