// What the coefficients of a channel fusion come to.

#include "fusion.h"

#include <cstring>

#include "../kernels/mixing.h"

Fusion::Fusion(const Plan& plan, const Step& step)
    : conv(plan.convs[step.conv[0]]), reduce(plan.convs[step.conv[1]]), expand(plan.convs[step.conv[2]]),
      outputs((ceil_of(conv.out_channels, kPanel) + 1) * kPanel), rank(reduce.out_channels), rank_panels(ceil_of(rank, kPanel)),
      channels(conv.in_channels), folded(step.ints[3] == 0) {
  const PanelShape shape(plan, step);
  matrix_first = shape.small && shape.chunk == shape.channels && conv.out_channels < channels;
}

Coefficients::Coefficients(const Run& run, const Step& step, const Fusion& fusion, int64_t image)
    : scale(reinterpret_cast<const float*>(run.data(step.aux[0])) + image * run.value(step.aux[0]).stride),
      matrix(scale + fusion.conv.out_channels) {}

void take_scale(const Step& step, const float* from, int64_t count, int64_t padded, float* to) {
  for (int64_t o = 0; o < count; ++o) to[o] = step.ints[4] ? std::min(std::max(from[o] + 3.0f, 0.0f), 6.0f) / 3.0f : from[o];
  for (int64_t o = count; o < padded; ++o) to[o] = 0.0f;
}

void take_panels(const float* matrix, int64_t rank, float* to) {
  std::memset(to, 0, matrix_floats(rank) * sizeof(float));
  for (int64_t first = 0; first < rank; first += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, rank - first);
    for (int64_t m = 0; m < rank; ++m, to += kPanel) std::memcpy(to, matrix + m * rank + first, columns * sizeof(float));
  }
}

int64_t ImageFold::floats(const Fusion& fusion) {
  const int64_t factor = fusion.matrix_first ? ceil_of(fusion.conv.out_channels, kPanel) * fusion.rank * kPanel
                                             : fusion.channels * rounded_floats(fusion.rank);
  return fusion.outputs + fusion.rank_panels * kPanel + matrix_floats(fusion.rank) + factor;
}

ImageFold::ImageFold(const Run& run, const Step& step, const Fusion& fusion, float* scratch)
    : run_(run), step_(step), fusion_(fusion), scale_(scratch), shift_(scale_ + fusion.outputs),
      matrix_(shift_ + fusion.rank_panels * kPanel), factor_(matrix_ + matrix_floats(fusion.rank)) {}

void ImageFold::take(int64_t image) {
  const Coefficients given(run_, step_, fusion_, image);
  const int64_t rank = fusion_.rank;
  const auto* const reduce = static_cast<const float*>(fusion_.reduce.weight);
  take_scale(step_, given.scale, fusion_.conv.out_channels, fusion_.outputs, scale_);
  take_panels(given.matrix, rank, matrix_);
  RowsTimesPanels{fusion_.reduce.bias, 1, 0, rank, matrix_, rank, shift_, 0}.multiply();
  if (!fusion_.matrix_first) {
    RowsTimesPanels{reduce, fusion_.channels, rank, rank, matrix_, rank, factor_, rounded_floats(rank)}.multiply();
    return;
  }
  for (int64_t panel = 0; panel * kPanel < fusion_.conv.out_channels; ++panel)
    RowsTimesPanels{given.matrix, rank, rank, rank, right(panel), kPanel, factor_ + panel * rank * kPanel, kPanel}.multiply();
}

void ImageFold::weights(int64_t panel, int64_t first, int64_t channels, float* out) const {
  FuseCall call{};
  call.weights = static_cast<const float*>(fusion_.conv.weight) + (panel * fusion_.channels + first) * kPanel;
  call.rows = channels;
  call.shares = scale_ + panel * kPanel;
  call.rank = fusion_.rank;
  if (fusion_.matrix_first) {
    call.left = static_cast<const float*>(fusion_.reduce.weight) + first * fusion_.rank;
    call.left_row = fusion_.rank;
    call.right = factor_ + panel * fusion_.rank * kPanel;
  } else {
    call.left_row = rounded_floats(fusion_.rank);
    call.left = factor_ + first * call.left_row;
    call.right = right(panel);
  }
  call.out = out;
  mix_kernels().fuse(call);
}

void ImageFold::bias(int64_t panel, float* out) const {
  RowsTimesPanels{shift_, 1, 0, fusion_.rank, right(panel), kPanel, out, 0, fusion_.expand.bias + panel * kPanel}.multiply();
  const float *const scale = scale_ + panel * kPanel, *const inner = fusion_.conv.bias + panel * kPanel;
  for (int c = 0; c < kPanel; ++c) out[c] += inner[c] * scale[c];
}
