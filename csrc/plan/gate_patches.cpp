// Logits of 3x3 gates, patch by patch (csrc/kernels/gate_patch.h), or line by line where the picture itself is read in planes.

#include "../kernels/gate_patch.h"

#include <algorithm>
#include <new>

#include "../kernels/plane_taps.h"
#include "gate_lines.h"
#include "run.h"

namespace {

// The biases of the taps that lie inside of the map, for one position.
float inner_bias(const Conv& conv, const Value& in, int32_t y, int32_t x) {
  float sum = 0;
  for (int32_t t = 0; t < 9; ++t) {
    const int32_t at_y = y + t / 3 - 1, at_x = x + t % 3 - 1;
    if (at_y >= 0 && at_y < in.height && at_x >= 0 && at_x < in.width) sum += conv.bias[1 + t];
  }
  return sum;
}

// What the biases of the taps come to at every position of a map: the first line, those between and the last, likewise columns.
class TapBiases {
 public:
  TapBiases(const Step& step, const Conv& conv, const Value& in) : last_{in.height - 1, in.width - 1} {
    for (int i = 0; step.ints[1] && i < 9; ++i)
      sums_[i / 3][i % 3] = inner_bias(conv, in, place(i / 3, last_[0]), place(i % 3, last_[1]));
  }
  // Adds them and `start` to a line of logits.
  void add(int32_t y, float start, int32_t width, float* line) const {
    const float* const sums = sums_[y == 0 ? 0 : y < last_[0] ? 1 : 2];
    line[0] += start + sums[0];
    for (int32_t x = 1; x + 1 < width; ++x) line[x] += start + sums[1];
    if (width > 1) line[width - 1] += start + sums[2];
  }

 private:
  static int32_t place(int i, int32_t last) { return i == 0 ? 0 : i == 1 ? std::min(1, last) : last; }

  const int32_t last_[2];
  float sums_[3][3] = {};
};

// Where the rows that a patch reads lie in an image.
class PatchRows {
 public:
  PatchRows(const Worker& worker, const Step& step, int64_t image)
      : in_(worker.run.value(step.in)), stride_(worker.run.conv(step.conv[0]).stride[0]), zeros_(worker.zeros),
        row_bytes_(in_.stride * element_bytes(in_.dtype)), base_(worker.run.data(step.in) + image * in_.height * in_.width * row_bytes_) {}

  // Of the patch whose first position is (y, x).
  void find(int32_t y, int32_t x, const void** from) const {
    if (stride_ == 1) find<1>(y, x, from);
    else find<2>(y, x, from);
  }
  // Bytes from a row of the patch that begins in column x to the one at its place in the next patch: in the same lines, or
  // the first one of the next lines.
  int64_t next(int32_t x, int32_t width) const {
    const int64_t positions = x + kPatchColumns < width ? kPatchColumns : int64_t{kPatchRows} * in_.width - x;
    return positions * stride_ * row_bytes_;
  }

 private:
  // Rows outside of the map are zeros.
  template <int Stride>
  void find(int32_t y, int32_t x, const void** from) const {
    constexpr int32_t kWidth = patch_line(Stride);
    const int32_t left = x * Stride - 1;
    const bool within = left >= 0 && left + kWidth <= in_.width;
    for (int32_t i = 0; i < patch_lines(Stride); ++i, from += kWidth) {
      const int32_t at_y = y * Stride - 1 + i;
      const bool inside = at_y >= 0 && at_y < in_.height;
      const char* const line = base_ + int64_t{inside ? at_y : 0} * in_.width * row_bytes_;
      if (inside && within)
        for (int32_t j = 0; j < kWidth; ++j) from[j] = line + (left + j) * row_bytes_;
      else
        for (int32_t j = 0; j < kWidth; ++j) from[j] = inside && left + j >= 0 && left + j < in_.width ? line + (left + j) * row_bytes_ : zeros_;
    }
  }

  const Value& in_;
  const int32_t stride_;
  const void* const zeros_;
  const int64_t row_bytes_;
  const char* const base_;
};

// Some lines of logits from `y` on. The sum of the linear layer's products with the rows that are theirs is returned.
float some_lines(const Worker& worker, const Step& step, int64_t image, int32_t y, float* logits) {
  const Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const char* const weight = run.plan.gate_panels[worker.step].data();
  const GatePatch patch = gate_patch(in.dtype, conv.stride[0]);
  const PatchRows rows(worker, step, image);
  float sum = 0;
  for (int32_t x = 0; x < out.width; x += kPatchColumns) {
    const void* from[kMostPatchTaps];
    rows.find(y, x, from);
    float sums[kPatchRows * kPatchColumns];
    sum += patch(from, in.channels, weight, sums, rows.next(x, out.width));
    for (int32_t r = 0; r < kPatchRows && y + r < out.height; ++r) {
      const float* const line = sums + r * kPatchColumns;
      float* const to = logits + (image * out.height + y + r) * out.width + x;
      if (x + kPatchColumns <= out.width) std::copy_n(line, kPatchColumns, to);
      else std::copy_n(line, out.width - x, to);
    }
  }
  return sum;
}

// One line of logits from a picture in planes: along a plane neighbouring positions lie beside each other, as the few channels of
// a row do not. The sum of the linear layer's products with the lines from its own on, `stride` of them, is returned.
float line_of_planes(const Worker& worker, const Step& step, int64_t image, int32_t y, float* logits) {
  const Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const auto* const weight = static_cast<const float*>(conv.weight);
  const int64_t area = int64_t{in.height} * in.width, channels = in.channels, stride = conv.stride[0];
  std::fill_n(logits, out.width, 0.0f);
  float sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const float* const plane = reinterpret_cast<const float*>(run.data(step.in)) + (image * channels + c) * area;
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t at = y * stride - 1 + i;
      if (at < 0 || at >= in.height) continue;
      const float* const line = plane + at * in.width;
      if (step.ints[0] && i > 0 && i <= stride) sum += weight[9 * channels + c] * line_sum(line, in.width);
      const float taps[3] = {weight[3 * i * channels + c], weight[(3 * i + 1) * channels + c], weight[(3 * i + 2) * channels + c]};
      slide_taps(line, in.width, stride, taps, out.width, logits);
    }
  }
  return sum;
}

}  // namespace

bool takes_patches(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int32_t stride = conv.stride[0];
  for (int i = 0; i < 2; ++i)
    if (conv.kernel[i] != 3 || conv.stride[i] != stride || conv.padding[i] != 1 || conv.dilation[i] != 1) return false;
  return stride <= kMostPatchStride;
}

void pack_gate_patches(const Plan& plan, const Step& step, Region& panel) {
  const Conv& conv = plan.convs[step.conv[0]];
  const int dtype = plan.values[step.in].dtype;
  if (!panel.reserve(patch_weight_bytes(dtype, conv.in_channels))) throw std::bad_alloc();
  pack_patch_weights(dtype, conv.in_channels, static_cast<const float*>(conv.weight), step.ints[0] != 0, panel.data());
}

void gate_patches(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const bool squeeze = step.ints[0] != 0;
  float* const logits = reinterpret_cast<float*>(run.data(step.out));
  // One sum for the lines of a task, added up in order afterwards: the same bits whichever thread took them.
  float* const line_sums = squeeze ? reinterpret_cast<float*>(run.data(step.aux[0])) : nullptr;
  const bool planes = run.planes(step.in);
  const int64_t rows = planes ? 1 : kPatchRows, tasks = (out.height + rows - 1) / rows, lines = rows * conv.stride[0];
  worker.share(run.call.images * tasks, [&](int64_t task) {
    const int64_t image = task / tasks, first = task % tasks;
    const auto y = static_cast<int32_t>(first * rows);
    const float sum = planes ? line_of_planes(worker, step, image, y, logits + (image * out.height + y) * out.width)
                             : some_lines(worker, step, image, y, logits);
    const int64_t end = std::min<int64_t>((first + 1) * lines, in.height);
    for (int64_t line = first * lines; squeeze && line < end; ++line)
      line_sums[image * in.height + line] = line == first * lines ? sum : 0.0f;
  });
  worker.barrier();
  const TapBiases biases(step, conv, in);
  each_gate_line(worker, conv, in, line_sums, out.height, [&](int64_t line, float start) {
    biases.add(static_cast<int32_t>(line % out.height), start, out.width, logits + line * out.width);
  });
}
