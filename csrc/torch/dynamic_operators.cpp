// Convolutions with a kernel for each sample.

#include <algorithm>

#include "operators.h"

namespace {

// Coefficients in the kernel's order: [n][K], or [n][K][O padded] from [n, O, K].
std::vector<float> coefficients(const Tensor& routing, int64_t padded) {
  const auto size = routing.sizes(), stride = routing.strides();
  const float* from = floats(routing);
  const bool each = routing.dim() == 3;
  const int64_t n = size[0], count = size[each ? 2 : 1], step = stride[each ? 2 : 1];
  std::vector<float> out(n * count * (each ? padded : 1));
  for (int64_t b = 0; b < n; ++b)
    for (int64_t k = 0; k < count; ++k) {
      const float* at = from + b * stride[0] + k * step;
      if (!each) out[b * count + k] = *at;
      else
        for (int64_t o = 0; o < size[1]; ++o) out[(b * count + k) * padded + o] = at[o * stride[1]];
    }
  return out;
}

// What is added to each output channel of each sample, [n][O padded]: the experts' biases mixed, and a common one.
std::vector<float> offsets(const Tensor& routing, const Maybe& bias, const Maybe& common, int64_t channels,
                           int64_t padded) {
  const int64_t n = routing.size(0), count = routing.size(routing.dim() - 1);
  std::vector<float> out(n * padded);
  if (common) {
    const int64_t step = common->stride(0);
    for (int64_t b = 0; b < n; ++b)
      for (int64_t o = 0; o < channels; ++o) out[b * padded + o] = floats(*common)[o * step];
  }
  if (!bias) return out;
  const auto stride = routing.strides(), at = bias->strides();
  const int64_t by_channel = routing.dim() == 3 ? stride[1] : 0, by_expert = stride[routing.dim() - 1];
  for (int64_t b = 0; b < n; ++b)
    for (int64_t k = 0; k < count; ++k) {
      const float* share = floats(routing) + b * stride[0] + k * by_expert;
      const float* from = floats(*bias) + k * at[0];
      for (int64_t o = 0; o < channels; ++o) out[b * padded + o] += share[o * by_channel] * from[o * at[1]];
    }
  return out;
}

// Depthwise filters of each sample: [n][taps][C], or planar [n][C][taps]. packed is [K][taps][C].
std::vector<float> mixed_filters(const Tensor& packed, const Tensor& routing, const Maybe& taps, int64_t taps_count,
                                 int64_t channels, bool planar) {
  const auto stride = routing.strides();
  const int64_t n = routing.size(0), count = routing.size(routing.dim() - 1);
  const int64_t by_channel = routing.dim() == 3 ? stride[1] : 0, by_expert = stride[routing.dim() - 1];
  std::vector<float> out(n * taps_count * channels), sums(channels);
  for (int64_t b = 0; b < n; ++b)
    for (int64_t t = 0; t < taps_count; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < count; ++k) {
        const float* share = floats(routing) + b * stride[0] + k * by_expert;
        const float* from = floats(packed) + (k * taps_count + t) * channels;
        for (int64_t c = 0; c < channels; ++c) sums[c] += share[c * by_channel] * from[c];
      }
      const float scale = taps ? floats(*taps)[b * taps->stride(0) + t * taps->stride(1)] : 1.0f;
      float* to = out.data() + b * taps_count * channels + (planar ? t : t * channels);
      for (int64_t c = 0; c < channels; ++c) to[c * (planar ? taps_count : 1)] = sums[c] * scale;
    }
  return out;
}

void check_mixture(const Tensor& x, const Tensor& experts, const Tensor& routing, const Maybe& bias, const Maybe& common,
                   const Maybe& taps, int64_t groups) {
  const int64_t n = x.size(0), count = experts.size(0), channels = experts.size(1);
  STD_TORCH_CHECK(groups > 0 && x.size(1) == experts.size(2) * groups && channels % groups == 0,
                  "the channels of x and of the experts do not fit together");
  const bool each = routing.dim() == 3;
  STD_TORCH_CHECK((each || routing.dim() == 2) && routing.size(0) == n && routing.size(routing.dim() - 1) == count &&
                      (!each || routing.size(1) == channels),
                  "routing must be [B, K] or [B, O, K]");
  STD_TORCH_CHECK(!bias || (bias->dim() == 2 && bias->size(0) == count && bias->size(1) == channels), "bias must be [K, O]");
  STD_TORCH_CHECK(!common || (common->dim() == 1 && common->size(0) == channels), "static_bias must be [O]");
  STD_TORCH_CHECK(!taps || (taps->dim() == 2 && taps->size(0) == n && taps->size(1) == experts.size(3) * experts.size(4)),
                  "taps must be [B, kh * kw]");
}

}  // namespace

Tensor dynamic_conv2d(const Tensor& x, const Tensor& experts, const Tensor& routing, const Maybe& bias,
                      const Maybe& static_bias, const Maybe& taps, Ints stride, Ints padding, Ints dilation,
                      int64_t groups, const Maybe& packed) {
  const bool images_of_floats = x.dim() == 4 && experts.dim() == 5 && is_float(x) && is_float(experts) &&
                                is_float(routing) && is_float(bias) && is_float(static_bias) && is_float(taps);
  const bool planar = !images_of_floats || !prefers_rows(x);
  const bool depthwise = groups > 1 && groups == x.size(1) && experts.dim() == 5 && experts.size(1) == groups;
  const bool steps_of_one = stride.size() == 2 && stride[0] == 1 && stride[1] == 1;
  if (!packed || !images_of_floats || !(groups == 1 || depthwise) || (depthwise && planar && !steps_of_one) || !x.size(0))
    return eager("dynaconv::dynamic_conv2d", x, experts, routing, bias, static_bias, taps, stride, padding, dilation,
                 groups, packed);
  check_mixture(x, experts, routing, bias, static_bias, taps, groups);
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation need two numbers");
  DynamicConv conv{};
  conv.count = static_cast<int32_t>(experts.size(0));
  conv.out_channels = static_cast<int32_t>(experts.size(1));
  conv.in_channels = static_cast<int32_t>(depthwise ? groups : experts.size(2));
  conv.per_channel = routing.dim() == 3;
  conv.planar = planar;
  for (int i = 0; i < 2; ++i) {
    conv.kernel[i] = static_cast<int32_t>(experts.size(3 + i));
    conv.stride[i] = static_cast<int32_t>(stride[i]);
    conv.padding[i] = static_cast<int32_t>(padding[i]);
    conv.dilation[i] = static_cast<int32_t>(dilation[i]);
    STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "stride and dilation must be positive, padding not negative");
  }
  const std::array<int64_t, 2> in = {x.size(2), x.size(3)};
  std::array<int64_t, 2> out{};
  output_size(conv, in.data(), out.data());
  const int64_t n = x.size(0), channels = conv.out_channels, taps_count = int64_t{conv.kernel[0]} * conv.kernel[1];
  const int64_t columns = depthwise ? 1 : dynaconv_columns(), padded = (channels + columns - 1) / columns * columns;
  STD_TORCH_CHECK(is_float(*packed) && packed->is_contiguous() &&
                      packed->numel() == padded * taps_count * conv.count * experts.size(2),
                  "`packed` does not hold these experts");
  const Maybe planes = depthwise && planar ? Maybe(as_planes(x)) : Maybe();
  const std::optional<Rows> rows = planes ? std::nullopt : std::optional<Rows>(std::in_place, x);
  const float* source = planes ? floats(*planes) : rows->data;
  const Tensor y = images(n, channels, out[0], out[1], !planar);
  const std::vector<float> shift = offsets(routing, bias, static_bias, channels, padded);
  int status = 0;
  if (depthwise) {
    const std::vector<float> filters = mixed_filters(*packed, routing, taps, taps_count, channels, planar);
    status = dynaconv_sample_depthwise(source, writable(y), n, in[0], in[1], out[0], out[1], &conv, filters.data(),
                                       shift.data());
  } else {
    conv.experts = floats(*packed);
    const std::vector<float> shares = coefficients(routing, padded);
    const Maybe scale = taps ? Maybe(as_planes(*taps)) : taps;
    status = dynaconv_dynamic_conv(source, writable(y), n, in[0], in[1], out[0], out[1], &conv, shares.data(),
                                   scale ? floats(*scale) : nullptr, shift.data());
  }
  check_memory(status, "dynamic convolution");
  return y;
}
