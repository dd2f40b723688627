// What a channel fusion's coefficients come to, for steps that fold the weights of each image themselves.

#include <cstring>

#include "../kernels/inverted_residual.h"
#include "dynamic_task.h"

namespace {

constexpr float kNoBias[kPanel] = {};

// Rows of `rank` numbers times the matrix [rank][rank], `out` in rows of fusion_row(rank).
void multiply(const float* rows, int64_t count, int64_t rank, const float* panels, float* out) {
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
      taps[r] = rows + (first + r) * rank;
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

}  // namespace

int64_t scratch_factors(const Plan& plan, const Step& step) {
  const int64_t rank = plan.convs[step.conv[1]].out_channels;
  return ceil_of(rank, kPanel) * rank * kPanel * int64_t{sizeof(float)};
}

void step_fusion_factors(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Conv& reduce = run.conv(step.conv[1]);
  const int64_t rank = reduce.out_channels, channels = reduce.in_channels, images = run.call.images;
  const int64_t outputs = run.value(step.aux[0]).channels - rank * rank, whole = ceil_of(outputs, kPanel) * kPanel;
  const int64_t parts = images < worker.threads ? worker.threads : 1;
  auto* const panels = reinterpret_cast<float*>(worker.scratch);
  worker.share(images * parts, [&](int64_t task) {
    const int64_t image = task / parts, part = task % parts;
    const float* given = reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride;
    float* const scale = reinterpret_cast<float*>(run.data(step.out)) + image * run.value(step.out).stride;
    float *const shift = scale + whole, *const left = shift + fusion_row(rank);
    take_panels(given + outputs, rank, panels);
    if (part == 0) {
      for (int64_t o = 0; o < outputs; ++o)
        scale[o] = step.ints[4] ? std::min(std::max(given[o] + 3.0f, 0.0f), 6.0f) / 3.0f : given[o];
      std::memset(scale + outputs, 0, (whole - outputs) * sizeof(float));
      multiply(reduce.bias, 1, rank, panels, shift);
    }
    const int64_t first = channels * part / parts, last = channels * (part + 1) / parts;
    multiply(static_cast<const float*>(reduce.weight) + first * rank, last - first, rank, panels, left + first * fusion_row(rank));
  });
}
