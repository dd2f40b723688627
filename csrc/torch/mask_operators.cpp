// What decides about positions: the squeeze unit's logits and masks. Source: arXiv 1912.03203, section 3.2.

#include "operators.h"

namespace {

Tensor logits(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride) {
  check_images(x, weight, 1);
  const int64_t n = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(weight.size(0) == 1 && weight.size(2) == 3 && weight.size(3) == 3 && linear.numel() == channels &&
                      bias.numel() == 1 && stride > 0,
                  "mask logits need weight [1, C, 3, 3], linear [1, C], bias [1] and a positive stride");
  // Channels-last weights are the nine rows of taps that the kernel reads.
  const Rows rows(x), taps(weight);
  const Tensor line = as_planes(linear);
  const Tensor z = images(n, 1, (height - 1) / stride + 1, (width - 1) / stride + 1, false);
  if (n)
    dynaconv_mask_logits(rows.data, taps.data, floats(line), *floats(bias), n, height, width, channels, stride,
                         writable(z));
  return z;
}

}  // namespace

Tensor mask_logits(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride) {
  if (!is_float(x) || !is_float(weight) || !is_float(linear) || !is_float(bias))
    return eager("dynaconv::mask_logits", x, weight, linear, bias, stride);
  return logits(x, weight, linear, bias, stride);
}

Tensor squeeze_mask(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride,
                    const Tensor& threshold) {
  STD_TORCH_CHECK(is_float(x) && is_float(weight) && is_float(linear) && is_float(bias) && is_float(threshold) &&
                      threshold.numel() == 1, "the kernels compute float32 on a CPU");
  const Tensor z = logits(x, weight, linear, bias, stride);
  float* values = writable(z);
  const float least = *floats(threshold);
  const int64_t count = z.numel();
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] >= least ? 1.0f : 0.0f;
  return z;
}
