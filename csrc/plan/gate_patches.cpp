// Logits of 3x3 gates on maps in float32, patch by patch (csrc/kernels/gate_patch.h).

#include "../kernels/gate_patch.h"

#include <algorithm>

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

// Two lines of an image from `y` on. The sum of the linear layer's products with them is returned.
float two_lines(const Worker& worker, const Step& step, int64_t image, int32_t y, float* logits) {
  const Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value& in = run.value(step.in);
  const float* const weight = static_cast<const float*>(conv.weight);
  const float* const linear = step.ints[0] ? weight + 9 * int64_t{in.channels} : nullptr;
  const float* const base = reinterpret_cast<const float*>(run.data(step.in)) + image * in.height * in.width * in.stride;
  float sum = 0;
  for (int32_t x = 0; x < in.width; x += kPatchColumns) {
    const float* from[kPatchTaps];
    for (int32_t i = 0; i < kPatchTaps; ++i) {
      const int32_t at_y = y - 1 + i / (kPatchColumns + 2), at_x = x - 1 + i % (kPatchColumns + 2);
      const bool inside = at_y >= 0 && at_y < in.height && at_x >= 0 && at_x < in.width;
      from[i] = inside ? base + (int64_t{at_y} * in.width + at_x) * in.stride : worker.zeros;
    }
    float sums[kPatchRows * kPatchColumns];
    sum += gate_patch(from, in.channels, weight, linear, sums);
    for (int32_t r = 0; r < kPatchRows && y + r < in.height; ++r)
      for (int32_t p = 0; p < kPatchColumns && x + p < in.width; ++p)
        logits[(image * in.height + y + r) * in.width + x + p] =
            sums[r * kPatchColumns + p] + (step.ints[1] ? inner_bias(conv, in, y + r, x + p) : 0.0f);
  }
  return sum;
}

}  // namespace

bool takes_patches(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  for (int i = 0; i < 2; ++i)
    if (conv.kernel[i] != 3 || conv.stride[i] != 1 || conv.padding[i] != 1 || conv.dilation[i] != 1) return false;
  return plan.values[step.in].dtype == kFloat32;
}

void gate_patches(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value& in = run.value(step.in);
  const bool squeeze = step.ints[0] != 0;
  float* const logits = reinterpret_cast<float*>(run.data(step.out));
  // One sum for two lines, added up in order afterwards: the same bits whichever thread took the lines.
  float* const line_sums = squeeze ? reinterpret_cast<float*>(run.data(step.aux[0])) : nullptr;
  const int64_t pairs = (in.height + 1) / 2;
  worker.share(run.call.images * pairs, [&](int64_t task) {
    const int64_t image = task / pairs, y = task % pairs * 2;
    const float sum = two_lines(worker, step, image, static_cast<int32_t>(y), logits);
    for (int64_t line = y; squeeze && line < std::min<int64_t>(y + 2, in.height); ++line)
      line_sums[image * in.height + line] = line == y ? sum : 0.0f;
  });
  worker.barrier();
  each_gate_line(worker, conv, in, line_sums, in.height, [&](int64_t line, float start) {
    for (int32_t x = 0; x < in.width; ++x) logits[line * in.width + x] += start;
  });
}
