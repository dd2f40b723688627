// What a channel fusion's coefficients come to, for steps that have its expansion among other things.

#include <cstring>

#include "../kernels/inverted_residual.h"
#include "dynamic_task.h"

namespace {

constexpr float kNoBias[kPanel] = {};

// Rows of `rank` numbers, `row` apart, times the matrix [rank][rank], `out` in rows of fusion_row(rank).
void multiply(const float* rows, int64_t count, int64_t row, int64_t rank, const float* panels, float* out) {
  const int64_t out_row = fusion_row(rank);
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = rank;
  call.bias = kNoBias;
  call.out = outs;
  if (rank < out_row)
    for (int64_t r = 0; r < count; ++r) std::memset(out + r * out_row + rank, 0, (out_row - rank) * sizeof(float));
  for (int64_t first = 0; first < count; first += kMaxRows) {
    const int here = static_cast<int>(std::min<int64_t>(kMaxRows, count - first));
    for (int r = 0; r < here; ++r) {
      taps[r] = rows + (first + r) * row;
      outs[r] = out + (first + r) * out_row;
    }
    for (int64_t column = 0; column < rank; column += kPanel) {
      call.weight = panels + column * rank;
      call.column = column;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, rank - column));
      gemm_tile(kFloat32, here, call.columns)(call);
    }
  }
}

// [rank][rank] as panels of 32 columns, zero padded.
void take_panels(const float* matrix, int64_t rank, float* to) {
  for (int64_t first = 0; first < rank; first += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, rank - first);
    for (int64_t m = 0; m < rank; ++m, to += kPanel) {
      std::memset(to, 0, kPanel * sizeof(float));
      std::memcpy(to, matrix + m * rank + first, columns * sizeof(float));
    }
  }
}

int64_t panels_floats(int64_t rank) { return ceil_of(rank, kPanel) * rank * kPanel; }

// What Q makes of up to kMaxRows positions, in rows of whole panels.
void project(const Conv& reduce, const float* from, int64_t step, int rows, float* to) {
  const int64_t row = ceil_of(reduce.out_channels, kPanel) * kPanel;
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  for (int r = 0; r < rows; ++r) {
    taps[r] = from + r * step;
    outs[r] = to + r * row;
  }
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = reduce.in_channels;
  call.out = outs;
  for (int64_t panel = 0; panel * kPanel < reduce.out_channels; ++panel) {
    call.weight = static_cast<const float*>(reduce.weight) + panel * reduce.in_channels * kPanel;
    call.bias = reduce.bias + panel * kPanel;
    call.column = panel * kPanel;
    call.columns = static_cast<int>(std::min<int64_t>(kPanel, reduce.out_channels - panel * kPanel));
    gemm_tile(kFloat32, rows, call.columns)(call);
  }
}

}  // namespace

int64_t scratch_factors(const Plan& plan, const Step& step) {
  const int64_t rank = plan.convs[step.conv[1]].out_channels;
  return (panels_floats(rank) + kMaxRows * ceil_of(rank, kPanel) * kPanel) * int64_t{sizeof(float)};
}

void step_fusion_factors(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Conv& reduce = run.conv(step.conv[1]);
  const bool factored = step.in >= 0;
  const int64_t rank = reduce.out_channels, images = run.call.images, row = fusion_row(rank);
  const int64_t outputs = run.value(step.aux[0]).channels - rank * rank, whole = ceil_of(outputs, kPanel) * kPanel;
  const int64_t rows = factored ? int64_t{run.value(step.in).height} * run.value(step.in).width : reduce.in_channels;
  const int64_t parts = images >= worker.threads ? 1 : factored ? ceil_of(rows, kMaxRows) : worker.threads;
  auto* const panels = reinterpret_cast<float*>(worker.scratch);
  float* const reduced = panels + panels_floats(rank);
  worker.share(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const float* given = reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride;
    float* const scale = reinterpret_cast<float*>(run.data(step.out)) + image * run.value(step.out).stride;
    float* left = scale + whole;
    take_panels(given + outputs, rank, panels);
    if (part == 0) {
      for (int64_t o = 0; o < outputs; ++o)
        scale[o] = step.ints[4] ? std::min(std::max(given[o] + 3.0f, 0.0f), 6.0f) / 3.0f : given[o];
      std::memset(scale + outputs, 0, (whole - outputs) * sizeof(float));
      if (!factored) multiply(reduce.bias, 1, rank, rank, panels, left);
    }
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    if (!factored) {
      left += row;
      return multiply(static_cast<const float*>(reduce.weight) + first * rank, last - first, rank, rank, panels, left + first * row);
    }
    const int64_t stride = run.value(step.in).stride;
    const float* from = reinterpret_cast<const float*>(run.data(step.in)) + image * rows * stride;
    for (int64_t p = first; p < last; p += kMaxRows) {
      const int count = static_cast<int>(std::min<int64_t>(kMaxRows, last - p));
      project(reduce, from + p * stride, stride, count, reduced);
      multiply(reduced, count, ceil_of(rank, kPanel) * kPanel, rank, panels, left + p * row);
    }
  });
}
