// What the ways to run a channel fusion share.

#include "fusion_parts.h"

#include <cstring>

namespace {

constexpr float kNoBias[kPanel] = {};

int64_t rounded(int64_t floats) { return ceil_of(floats, 16) * 16; }

}  // namespace

Fusion::Fusion(const Plan& plan, const Step& step)
    : conv(plan.convs[step.conv[0]]), reduce(plan.convs[step.conv[1]]), expand(plan.convs[step.conv[2]]),
      outputs((ceil_of(conv.out_channels, kPanel) + 1) * kPanel), rank(reduce.out_channels), rank_panels(ceil_of(rank, kPanel)),
      channels(conv.in_channels), folded(step.ints[3] == 0) {
  const PanelShape shape(plan, step);
  matrix_first = shape.small && shape.chunk == shape.channels && conv.out_channels < channels;
}

int64_t Fusion::shift() const { return rounded(rank_panels * kPanel); }
int64_t Fusion::left() const { return folded && !matrix_first ? channels * rounded(rank) : 0; }

Coefficients coefficients(const Run& run, const Step& step, const Fusion& fusion, int64_t image) {
  const float* from = reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride;
  return {from, from + fusion.conv.out_channels};
}

void take_scale(const Step& step, const Fusion& fusion, const float* from, float* to) {
  for (int64_t o = 0; o < fusion.conv.out_channels; ++o)
    to[o] = step.ints[4] ? std::min(std::max(from[o] + 3.0f, 0.0f), 6.0f) / 3.0f : from[o];
  for (int64_t o = fusion.conv.out_channels; o < fusion.outputs; ++o) to[o] = 0.0f;
}

void take_panels(const Fusion& fusion, const float* matrix, float* to) {
  std::memset(to, 0, fusion.panels() * sizeof(float));
  for (int64_t panel = 0; panel < fusion.rank_panels; ++panel) {
    const int64_t first = panel * kPanel, columns = std::min<int64_t>(kPanel, fusion.rank - first);
    for (int64_t m = 0; m < fusion.rank; ++m, to += kPanel)
      std::memcpy(to, matrix + m * fusion.rank + first, columns * sizeof(float));
  }
}

void multiply_panels(const Fusion& fusion, const float* rows, int64_t count, int64_t row, const float* panels, float* out,
                     int64_t out_row) {
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = fusion.rank;
  call.bias = kNoBias;
  call.out = outs;
  for (int64_t first = 0; first < count; first += kMaxRows) {
    const int here = static_cast<int>(std::min<int64_t>(kMaxRows, count - first));
    for (int r = 0; r < here; ++r) {
      taps[r] = rows + (first + r) * row;
      outs[r] = out + (first + r) * out_row;
    }
    for (int64_t panel = 0; panel < fusion.rank_panels; ++panel) {
      call.weight = panels + panel * fusion.rank * kPanel;
      call.column = panel * kPanel;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, fusion.rank - panel * kPanel));
      gemm_tile(kFloat32, here, call.columns)(call);
    }
  }
}

Prepared prepare_folded(Worker& worker, const Step& step, const Fusion& fusion) {
  const Run& run = worker.run;
  const int64_t images = run.call.images, rank_row = rounded(fusion.rank);
  auto* const scale = reinterpret_cast<float*>(worker.shared);
  float *const shift = scale + images * fusion.scale(), *const left = shift + images * fusion.shift();
  const auto* reduce = static_cast<const float*>(fusion.reduce.weight);
  const int64_t parts = fusion.left() && images < worker.threads ? worker.threads : 1;
  worker.share(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const Coefficients own = coefficients(run, step, fusion, image);
    auto* panels = reinterpret_cast<float*>(worker.scratch);
    take_panels(fusion, own.matrix, panels);
    if (part == 0) {
      take_scale(step, fusion, own.scale, scale + image * fusion.scale());
      multiply_panels(fusion, fusion.reduce.bias, 1, 0, panels, shift + image * fusion.shift(), 0);
    }
    if (!fusion.left()) return;
    const int64_t first = fusion.channels * part / parts, last = fusion.channels * (part + 1) / parts;
    multiply_panels(fusion, reduce + first * fusion.rank, last - first, fusion.rank, panels,
                    left + image * fusion.left() + first * rank_row, rank_row);
  });
  worker.barrier();
  Prepared prepared;
  prepared.scale = scale;
  prepared.scale_step = fusion.scale();
  prepared.shift = shift;
  prepared.shift_step = fusion.shift();
  prepared.right = static_cast<const float*>(fusion.expand.weight);
  prepared.offset = fusion.expand.bias;
  if (fusion.matrix_first) {
    prepared.left = reduce;
    prepared.left_row = fusion.rank;
    prepared.matrix = coefficients(run, step, fusion, 0).matrix;
    prepared.matrix_step = run.value(step.aux[0]).stride;
  } else {
    prepared.left = left;
    prepared.left_step = fusion.left();
    prepared.left_row = rank_row;
  }
  return prepared;
}
