// The kernels as operators of torch, for CPU tensors: the only file that knows torch, through its stable ABI.
//
// dynaconv/ops/_registry.py defines the operators and their meaning; what the kernels cannot run goes to the overload `eager`
// of the same operator, which is written in PyTorch operations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels/api.h"

// Read by dynaconv/ops/_native.py before it loads the library: one built for other operators must not register.
extern "C" __attribute__((visibility("default"), used)) const char dynaconv_ops_marker[] = "dynaconv operators, version 1";

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

constexpr double kBreakEven = 0.7;  // BREAK_EVEN_COMPILED in dynaconv/ops/masked_residual/cpu.py

bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_cpu(); }
bool is_float(const Maybe& t) { return !t || is_float(*t); }

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The strides of a dense [N, C, H, W] in one of the two orders; axes of one element may have any.
bool is_dense(const Tensor& t, bool rows) {
  const auto size = t.sizes(), stride = t.strides();
  const std::array<int, 4> order = rows ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0};
  int64_t expected = 1;
  for (const int axis : order) {
    if (size[axis] != 1 && stride[axis] != expected) return false;
    expected *= size[axis];
  }
  return true;
}

Tensor as_rows(const Tensor& t) { return is_dense(t, true) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }
Tensor as_planes(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// As torch.channels_last is asked about: what is both counts as contiguous.
bool prefers_rows(const Tensor& x) { return !x.is_contiguous() && is_dense(x, true); }

Tensor as_mask(const Tensor& mask) {
  return as_planes(is_float(mask) ? mask : torch::stable::to(mask, ScalarType::Float));
}

Tensor images(int64_t n, int64_t channels, int64_t height, int64_t width, bool rows) {
  const std::array<int64_t, 4> size = {n, channels, height, width};
  return torch::stable::empty({size.data(), size.size()}, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
                              rows ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <typename... Args>
Tensor eager(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "eager", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check_memory(int status, const char* what) {
  STD_TORCH_CHECK(status != 2, "no memory for a ", what, " on an input of this shape");
}

void check_images(const Tensor& x, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "expected x [N, C, H, W] and weights [O, I, kh, kw]");
  STD_TORCH_CHECK(groups > 0 && x.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0,
                  "the channels of x and of the weight do not fit together");
}

void check_grid(const Tensor& t, int64_t n, int64_t channels, const int64_t* size, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == n && t.size(1) == channels && t.size(2) == size[0] && t.size(3) == size[1],
                  what, " must be [", n, ", ", channels, ", ", size[0], ", ", size[1], "] to match the output");
}

// Two numbers of each list, from `at` on.
BranchConv geometry(const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                    size_t at) {
  STD_TORCH_CHECK(stride.size() >= at + 2 && padding.size() >= at + 2 && dilation.size() >= at + 2,
                  "stride, padding and dilation need two numbers for each convolution");
  BranchConv conv{};
  conv.out_channels = static_cast<int32_t>(weight.size(0));
  conv.in_channels = static_cast<int32_t>(weight.size(1) * groups);
  conv.groups = static_cast<int32_t>(groups);
  for (int i = 0; i < 2; ++i) {
    conv.kernel[i] = static_cast<int32_t>(weight.size(2 + i));
    conv.stride[i] = static_cast<int32_t>(stride[at + i]);
    conv.padding[i] = static_cast<int32_t>(padding[at + i]);
    conv.dilation[i] = static_cast<int32_t>(dilation[at + i]);
    STD_TORCH_CHECK(conv.stride[i] > 0 && conv.dilation[i] > 0 && conv.padding[i] >= 0 && conv.kernel[i] > 0,
                    "stride and dilation must be positive, padding not negative");
  }
  return conv;
}

template <typename Conv>
void output_size(const Conv& conv, const int64_t* in, int64_t* out) {
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = int64_t{conv.dilation[i]} * (conv.kernel[i] - 1);
    out[i] = (in[i] + 2 * conv.padding[i] - reach - 1) / conv.stride[i] + 1;
    STD_TORCH_CHECK(in[i] + 2 * conv.padding[i] > reach, "the kernel is larger than the padded input");
  }
}

void pack(const BranchConv& conv, const Tensor& weight, const Maybe& bias, float* packed) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == conv.out_channels), "a bias must be [O]");
  const Maybe shift = bias ? Maybe(as_planes(*bias)) : bias;
  dynaconv_pack(&conv, floats(weight), weight.strides().data(), shift ? floats(*shift) : nullptr, packed);
}

Tensor masked_conv2d(const Tensor& x, const Tensor& mask, const Tensor& weight, const Maybe& bias, Ints stride,
                     Ints padding, Ints dilation, int64_t groups) {
  if (!is_float(x) || !is_float(weight) || !is_float(bias))
    return eager("dynaconv::masked_conv2d", x, mask, weight, bias, stride, padding, dilation, groups);
  check_images(x, weight, groups);
  BranchConv conv = geometry(weight, stride, padding, dilation, groups, 0);
  std::array<int64_t, 4> sizes = {x.size(2), x.size(3), 0, 0};
  output_size(conv, sizes.data(), sizes.data() + 2);
  check_grid(mask, x.size(0), 1, sizes.data() + 2, "mask");
  std::vector<float> packed(dynaconv_packed_size(&conv));
  pack(conv, weight, bias, packed.data());
  conv.weight = packed.data();
  conv.bias = packed.data() + dynaconv_packed_bias(&conv);
  const Tensor rows = as_rows(x), open = as_mask(mask);
  const Tensor y = images(x.size(0), conv.out_channels, sizes[2], sizes[3], true);
  check_memory(dynaconv_masked_conv(floats(rows), floats(open), writable(y), x.size(0), &conv, sizes.data()),
               "masked convolution");
  return y;
}

struct Branch {
  std::vector<BranchConv> convs;
  std::vector<int64_t> sizes;
  int64_t floats = 0;
};

Branch branch_of(const std::vector<Tensor>& weights, const Ints& strides, const Ints& paddings, const Ints& dilations,
                 const Ints& groups, const Ints& activations) {
  STD_TORCH_CHECK(!weights.empty() && groups.size() == weights.size() && activations.size() == weights.size(),
                  "a branch needs groups and an activation for each convolution");
  Branch branch;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    STD_TORCH_CHECK(weight.dim() == 4 && groups[i] > 0 && weight.size(0) % groups[i] == 0,
                    "a branch's weights must be [O, I / groups, kh, kw]");
    branch.convs.push_back(geometry(weight, strides, paddings, dilations, groups[i], 2 * i));
    STD_TORCH_CHECK(i == 0 || branch.convs[i - 1].out_channels == branch.convs[i].in_channels,
                    "the convolutions of a branch do not follow each other");
    branch.convs[i].activation = static_cast<int32_t>(activations[i]);
    branch.floats += dynaconv_packed_size(&branch.convs[i]);
  }
  return branch;
}

// The branch's convolutions in the layout of the kernels, one after the other.
Tensor pack_branch(std::vector<Tensor> weights, std::vector<Tensor> biases, Ints groups) {
  const Ints pairs(2 * weights.size(), 1), none(weights.size(), 0);
  const Branch branch = branch_of(weights, pairs, pairs, pairs, groups, none);
  STD_TORCH_CHECK(biases.size() == weights.size(), "a branch needs a bias for each convolution");
  const std::array<int64_t, 1> size = {branch.floats};
  const Tensor packed = torch::stable::empty({size.data(), 1}, ScalarType::Float);
  float* to = writable(packed);
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(is_float(weights[i]) && is_float(biases[i]), "the kernels pack float32 weights on the CPU");
    pack(branch.convs[i], weights[i], biases[i], to);
    to += dynaconv_packed_size(&branch.convs[i]);
  }
  return packed;
}

Tensor masked_residual(const Tensor& x, const Tensor& mask, const Tensor& shortcut, std::vector<Tensor> weights,
                       std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations, Ints groups,
                       Ints activations, int64_t activation, std::optional<double> break_even, const Maybe& packed) {
  const auto elsewhere = [&] {
    return eager("dynaconv::masked_residual", x, mask, shortcut, weights, biases, strides, paddings, dilations, groups,
                 activations, activation, break_even, packed);
  };
  bool usable = is_float(x) && is_float(shortcut);
  for (const Tensor& weight : weights) usable = usable && is_float(weight);
  if (!usable) return elsewhere();
  Branch branch = branch_of(weights, strides, paddings, dilations, groups, activations);
  check_images(x, weights[0], groups[0]);
  branch.sizes = {x.size(2), x.size(3)};
  branch.sizes.resize(2 * weights.size() + 2);
  for (size_t i = 0; i < weights.size(); ++i)
    output_size(branch.convs[i], &branch.sizes[2 * i], &branch.sizes[2 * i + 2]);
  const int64_t* size = &branch.sizes[2 * weights.size()];
  const int64_t n = x.size(0), channels = branch.convs.back().out_channels;
  check_grid(mask, n, 1, size, "mask");
  check_grid(shortcut, n, channels, size, "shortcut");
  const Tensor panels = packed ? *packed : pack_branch(weights, biases, groups);
  STD_TORCH_CHECK(is_float(panels) && panels.is_contiguous() && panels.numel() == branch.floats,
                  "`packed` does not hold these weights");
  const float* from = floats(panels);
  for (BranchConv& conv : branch.convs) {
    conv.weight = from;
    conv.bias = from + dynaconv_packed_bias(&conv);
    from += dynaconv_packed_size(&conv);
  }
  const Tensor rows = as_rows(x), open = as_mask(mask), before = as_rows(shortcut);
  const Tensor y = images(n, channels, size[0], size[1], true);
  const int status = dynaconv_masked_residual(floats(rows), floats(open), floats(before), writable(y), n,
                                              branch.convs.data(), static_cast<int>(branch.convs.size()),
                                              branch.sizes.data(), static_cast<int>(activation),
                                              break_even.value_or(kBreakEven));
  check_memory(status, "masked block");
  return status ? elsewhere() : y;
}

Tensor mask_logits(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride) {
  if (!is_float(x) || !is_float(weight) || !is_float(linear) || !is_float(bias))
    return eager("dynaconv::mask_logits", x, weight, linear, bias, stride);
  check_images(x, weight, 1);
  const int64_t n = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(weight.size(0) == 1 && weight.size(2) == 3 && weight.size(3) == 3 && linear.numel() == channels &&
                      bias.numel() == 1 && stride > 0,
                  "mask logits need weight [1, C, 3, 3], linear [1, C], bias [1] and a positive stride");
  // Channels-last weights are the nine rows of taps that the kernel reads.
  const Tensor rows = as_rows(x), taps = as_rows(weight), line = as_planes(linear);
  const Tensor z = images(n, 1, (height - 1) / stride + 1, (width - 1) / stride + 1, false);
  if (n) dynaconv_mask_logits(floats(rows), floats(taps), floats(line), *floats(bias), n, height, width, channels, stride, writable(z));
  return z;
}

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
    STD_TORCH_CHECK(stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0, "stride and dilation must be positive, padding not negative");
  }
  const std::array<int64_t, 2> in = {x.size(2), x.size(3)};
  std::array<int64_t, 2> out{};
  output_size(conv, in.data(), out.data());
  const int64_t n = x.size(0), channels = conv.out_channels, taps_count = int64_t{conv.kernel[0]} * conv.kernel[1];
  const int64_t padded = depthwise ? channels : (channels + dynaconv_columns() - 1) / dynaconv_columns() * dynaconv_columns();
  STD_TORCH_CHECK(is_float(*packed) && packed->is_contiguous() &&
                      packed->numel() == padded * taps_count * conv.count * experts.size(2),
                  "`packed` does not hold these experts");
  const Tensor source = depthwise && planar ? as_planes(x) : as_rows(x);
  const Tensor y = images(n, channels, out[0], out[1], !planar);
  const std::vector<float> shift = offsets(routing, bias, static_bias, channels, padded);
  int status = 0;
  if (depthwise) {
    const std::vector<float> filters = mixed_filters(*packed, routing, taps, taps_count, channels, planar);
    status = dynaconv_sample_depthwise(floats(source), writable(y), n, in[0], in[1], out[0], out[1], &conv, filters.data(), shift.data());
  } else {
    conv.experts = floats(*packed);
    const std::vector<float> shares = coefficients(routing, padded);
    const Maybe scale = taps ? Maybe(as_planes(*taps)) : taps;
    status = dynaconv_dynamic_conv(floats(source), writable(y), n, in[0], in[1], out[0], out[1], &conv, shares.data(), scale ? floats(*scale) : nullptr, shift.data());
  }
  check_memory(status, "dynamic convolution");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dynaconv, CPU, library) {
  library.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  library.impl("masked_residual", TORCH_BOX(&masked_residual));
  library.impl("mask_logits", TORCH_BOX(&mask_logits));
  library.impl("dynamic_conv2d", TORCH_BOX(&dynamic_conv2d));
  library.impl("pack_branch", TORCH_BOX(&pack_branch));
}
