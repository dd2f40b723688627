// What a channel fusion's coefficients come to, for steps that have its expansion among other things.

#include <cstring>

#include "../kernels/inverted_residual.h"
#include "fusion.h"

namespace {

// Rows of `rank` numbers, `row` apart, times the matrix in panels, `out` in rows of fusion_row(rank).
void multiply(const float* rows, int64_t count, int64_t row, int64_t rank, const float* panels, float* out) {
  const int64_t out_row = fusion_row(rank);
  if (rank < out_row)
    for (int64_t r = 0; r < count; ++r) std::memset(out + r * out_row + rank, 0, (out_row - rank) * sizeof(float));
  RowsTimesPanels{rows, count, row, rank, panels, rank, out, out_row}.multiply();
}

}  // namespace

int64_t scratch_factors(const Plan& plan, const Step& step) {
  const int64_t rank = plan.convs[step.conv[1]].out_channels;
  return (matrix_floats(rank) + kMaxRows * ceil_of(rank, kPanel) * kPanel) * int64_t{sizeof(float)};
}

void step_fusion_factors(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Conv& reduce = run.conv(step.conv[1]);
  const bool factored = step.in >= 0;
  const int64_t rank = reduce.out_channels, images = run.call.images, row = fusion_row(rank), reduced_row = ceil_of(rank, kPanel) * kPanel;
  const int64_t outputs = run.value(step.aux[0]).channels - rank * rank, whole = ceil_of(outputs, kPanel) * kPanel;
  const int64_t rows = factored ? int64_t{run.value(step.in).height} * run.value(step.in).width : reduce.in_channels;
  const int64_t parts = images >= worker.threads ? 1 : factored ? ceil_of(rows, kMaxRows) : worker.threads;
  auto* const panels = reinterpret_cast<float*>(worker.scratch);
  float* const reduced = panels + matrix_floats(rank);
  worker.deal(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const float* given = reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride;
    float* const scale = reinterpret_cast<float*>(run.data(step.out)) + image * run.value(step.out).stride;
    float* left = scale + whole;
    take_panels(given + outputs, rank, panels);
    if (part == 0) {
      take_scale(step, given, outputs, whole, scale);
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
      // What Q makes of the positions.
      RowsTimesPanels{from + p * stride, count, stride, reduce.in_channels, static_cast<const float*>(reduce.weight), rank, reduced,
                      reduced_row, reduce.bias}.multiply();
      multiply(reduced, count, reduced_row, rank, panels, left + p * row);
    }
  });
}
