// What the coefficients of a channel fusion come to.

#include "fusion.h"

#include <cstring>

#include "../kernels/mixing.h"

namespace {

constexpr float kNoBias[kPanel] = {};

}  // namespace

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

int64_t ImageFold::floats(const Fusion& fusion) {
  const int64_t factor = fusion.matrix_first ? ceil_of(fusion.conv.out_channels, kPanel) * fusion.rank * kPanel
                                             : fusion.channels * rounded_floats(fusion.rank);
  return fusion.outputs + fusion.rank_panels * kPanel + fusion.panels() + factor;
}

ImageFold::ImageFold(const Run& run, const Step& step, const Fusion& fusion, float* scratch)
    : run_(run), step_(step), fusion_(fusion), scale_(scratch), shift_(scale_ + fusion.outputs),
      matrix_(shift_ + fusion.rank_panels * kPanel), factor_(matrix_ + fusion.panels()) {}

void ImageFold::take(int64_t image) {
  const Coefficients given(run_, step_, fusion_, image);
  take_scale(step_, fusion_, given.scale, scale_);
  take_panels(fusion_, given.matrix, matrix_);
  multiply_panels(fusion_, fusion_.reduce.bias, 1, 0, matrix_, shift_, 0);
  const int64_t rank = fusion_.rank;
  if (!fusion_.matrix_first) {
    multiply_panels(fusion_, static_cast<const float*>(fusion_.reduce.weight), fusion_.channels, rank, matrix_, factor_,
                    rounded_floats(rank));
    return;
  }
  const void* taps[kMaxRows];
  void* outs[kMaxRows];
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = rank;
  call.bias = kNoBias;
  call.out = outs;
  call.columns = kPanel;
  for (int64_t panel = 0; panel * kPanel < fusion_.conv.out_channels; ++panel) {
    call.weight = right(panel);
    for (int64_t from = 0; from < rank; from += kMaxRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kMaxRows, rank - from));
      for (int r = 0; r < rows; ++r) {
        taps[r] = given.matrix + (from + r) * rank;
        outs[r] = factor_ + (panel * rank + from + r) * kPanel;
      }
      gemm_tile(kFloat32, rows, kPanel)(call);
    }
  }
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
  const void* taps[kMaxRows] = {shift_};
  void* outs[kMaxRows] = {out};
  TileCall call{};
  call.taps = taps;
  call.taps_count = 1;
  call.channels = fusion_.rank;
  call.weight = right(panel);
  call.bias = fusion_.expand.bias + panel * kPanel;
  call.out = outs;
  call.columns = kPanel;
  gemm_tile(kFloat32, 1, kPanel)(call);
  const float *const scale = scale_ + panel * kPanel, *const inner = fusion_.conv.bias + panel * kPanel;
  for (int c = 0; c < kPanel; ++c) out[c] += inner[c] * scale[c];
}
