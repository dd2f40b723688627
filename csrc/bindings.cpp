// The kernels as operators of torch, for CPU tensors: the only file that knows torch, through its stable ABI.
//
// dynaconv/ops/_registry.py defines the operators and their meaning; what the kernels cannot run goes to the overload
// `eager` of the same operator, which is written in PyTorch operations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
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
// Rows of planes; small ones are turned here, which is less than a call of torch costs.
struct Rows {
  std::vector<float> turned;
  std::optional<Tensor> held;
  const float* data = nullptr;

  explicit Rows(const Tensor& x) {
    constexpr int64_t kSmall = 1 << 14;
    if (x.is_contiguous() && x.numel() <= kSmall && !is_dense(x, true)) {
      const int64_t n = x.size(0), channels = x.size(1), area = x.size(2) * x.size(3);
      turned.resize(x.numel());
      const float* from = floats(x);
      for (int64_t b = 0; b < n; ++b)
        for (int64_t c = 0; c < channels; ++c, from += area)
          for (int64_t p = 0; p < area; ++p) turned[(b * area + p) * channels + c] = from[p];
      data = turned.data();
    } else {
      held = as_rows(x);
      data = floats(*held);
    }
  }
};

Tensor as_planes(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// As torch.channels_last is asked about: what is both counts as contiguous.
bool prefers_rows(const Tensor& x) { return !x.is_contiguous() && is_dense(x, true); }

Tensor as_mask(const Tensor& mask) {
  return as_planes(is_float(mask) ? mask : torch::stable::to(mask, ScalarType::Float));
}

// Empty, without the detour over the dispatcher.
Tensor images(int64_t n, int64_t channels, int64_t height, int64_t width, bool rows) {
  const std::array<int64_t, 4> size = {n, channels, height, width};
  const int64_t area = height * width;
  const std::array<int64_t, 4> stride = rows ? std::array<int64_t, 4>{area * channels, 1, width * channels, channels}
                                             : std::array<int64_t, 4>{area * channels, area, width, 1};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, size.data(), stride.data(), aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
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
  const Rows rows(x);
  const Tensor open = as_mask(mask), y = images(x.size(0), conv.out_channels, sizes[2], sizes[3], true);
  check_memory(dynaconv_masked_conv(rows.data, floats(open), writable(y), x.size(0), &conv, sizes.data()),
               "masked convolution");
  return y;
}

// A residual branch: convolutions in order and the final activation.
struct Branch {
  std::vector<BranchConv> convs;
  int64_t activation = 0;

  int64_t floats() const {
    int64_t sum = 0;
    for (const BranchConv& conv : convs) sum += dynaconv_packed_size(&conv);
    return sum;
  }
};

Branch branch_of(const std::vector<Tensor>& weights, const Ints& strides, const Ints& paddings, const Ints& dilations,
                 const Ints& groups, const Ints& activations, int64_t activation) {
  STD_TORCH_CHECK(!weights.empty() && groups.size() == weights.size() && activations.size() == weights.size(),
                  "a branch needs groups and an activation for each convolution");
  Branch branch;
  branch.activation = activation;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    STD_TORCH_CHECK(weight.dim() == 4 && groups[i] > 0 && weight.size(0) % groups[i] == 0,
                    "a branch's weights must be [O, I / groups, kh, kw]");
    branch.convs.push_back(geometry(weight, strides, paddings, dilations, groups[i], 2 * i));
    STD_TORCH_CHECK(i == 0 || branch.convs[i - 1].out_channels == branch.convs[i].in_channels,
                    "the convolutions of a branch do not follow each other");
    branch.convs[i].activation = static_cast<int32_t>(activations[i]);
  }
  return branch;
}

// What a packed branch begins with; BranchConv structures without pointers follow, then the weights of each of them.
struct PackedHead {
  int64_t mark, count, activation, floats;
};

constexpr int64_t kPackedMark = 0x64796e6163763031;
constexpr int64_t kAlign = 16;  // floats

int64_t head_floats(int64_t count) {
  const int64_t bytes = sizeof(PackedHead) + count * sizeof(BranchConv), step = kAlign * sizeof(float);
  return (bytes + step - 1) / step * kAlign;
}

Tensor pack_whole(const Branch& branch, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  STD_TORCH_CHECK(biases.size() == weights.size(), "a branch needs a bias for each convolution");
  const auto count = static_cast<int64_t>(branch.convs.size());
  const PackedHead head{kPackedMark, count, branch.activation, branch.floats()};
  const Tensor packed = images(1, 1, 1, head_floats(count) + head.floats, false);
  float* to = writable(packed);
  std::memcpy(to, &head, sizeof(head));
  std::memcpy(reinterpret_cast<char*>(to) + sizeof(head), branch.convs.data(), count * sizeof(BranchConv));
  to += head_floats(count);
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(is_float(weights[i]) && is_float(biases[i]), "the kernels pack float32 weights on the CPU");
    pack(branch.convs[i], weights[i], biases[i], to);
    to += dynaconv_packed_size(&branch.convs[i]);
  }
  return packed;
}

// A branch in the layout of the kernels, in one tensor that also says what it is.
Tensor pack_branch(std::vector<Tensor> weights, std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations,
                   Ints groups, Ints activations, int64_t activation) {
  return pack_whole(branch_of(weights, strides, paddings, dilations, groups, activations, activation), weights, biases);
}

Branch unpacked(const Tensor& packed) {
  const char* said = "this is not a packed branch";
  STD_TORCH_CHECK(is_float(packed) && packed.is_contiguous() && packed.numel() >= head_floats(1), said);
  PackedHead head;
  std::memcpy(&head, packed.const_data_ptr(), sizeof(head));
  STD_TORCH_CHECK(head.mark == kPackedMark && head.count > 0 && head.count <= packed.numel() &&
                      packed.numel() == head_floats(head.count) + head.floats, said);
  Branch branch;
  branch.activation = head.activation;
  branch.convs.resize(head.count);
  std::memcpy(branch.convs.data(), static_cast<const char*>(packed.const_data_ptr()) + sizeof(head),
              head.count * sizeof(BranchConv));
  STD_TORCH_CHECK(branch.floats() == head.floats, said);
  const float* from = floats(packed) + head_floats(head.count);
  for (BranchConv& conv : branch.convs) {
    conv.weight = from;
    conv.bias = from + dynaconv_packed_bias(&conv);
    from += dynaconv_packed_size(&conv);
  }
  return branch;
}

// The result, or nothing where more than `break_even` of the branch would be computed.
Maybe run(const Branch& branch, const Tensor& x, const Tensor& mask, const Tensor& shortcut, double break_even) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == branch.convs[0].in_channels,
                  "the channels of x and of the weight do not fit together");
  std::array<int64_t, 16> few;
  std::vector<int64_t> many;
  const size_t count = branch.convs.size();
  if (2 * count + 2 > few.size()) many.resize(2 * count + 2);
  int64_t* sizes = many.empty() ? few.data() : many.data();
  sizes[0] = x.size(2);
  sizes[1] = x.size(3);
  for (size_t i = 0; i < count; ++i) output_size(branch.convs[i], sizes + 2 * i, sizes + 2 * i + 2);
  const int64_t *size = sizes + 2 * count, n = x.size(0), channels = branch.convs.back().out_channels;
  check_grid(mask, n, 1, size, "mask");
  check_grid(shortcut, n, channels, size, "shortcut");
  const Rows rows(x), before(shortcut);
  const Tensor open = as_mask(mask), y = images(n, channels, size[0], size[1], true);
  const int status = dynaconv_masked_residual(rows.data, floats(open), before.data, writable(y), n,
                                              branch.convs.data(), static_cast<int>(count), sizes,
                                              static_cast<int>(branch.activation), break_even);
  check_memory(status, "masked block");
  return status ? Maybe() : Maybe(y);
}

bool same(const Branch& a, const Branch& b) {
  if (a.convs.size() != b.convs.size() || a.activation != b.activation) return false;
  for (size_t i = 0; i < a.convs.size(); ++i) {
    BranchConv one = a.convs[i], other = b.convs[i];
    one.weight = one.bias = other.weight = other.bias = nullptr;
    if (std::memcmp(&one, &other, sizeof(one)) != 0) return false;
  }
  return true;
}

Tensor masked_residual(const Tensor& x, const Tensor& mask, const Tensor& shortcut, std::vector<Tensor> weights,
                       std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations, Ints groups,
                       Ints activations, int64_t activation, std::optional<double> break_even, const Maybe& packed) {
  const auto elsewhere = [&](std::optional<double> limit) {
    return eager("dynaconv::masked_residual", x, mask, shortcut, weights, biases, strides, paddings, dilations, groups,
                 activations, activation, limit, packed);
  };
  bool usable = is_float(x) && is_float(shortcut);
  for (const Tensor& weight : weights) usable = usable && is_float(weight);
  if (!usable) return elsewhere(break_even);
  const Branch asked = branch_of(weights, strides, paddings, dilations, groups, activations, activation);
  const Tensor whole = packed ? *packed : pack_whole(asked, weights, biases);
  const Branch branch = unpacked(whole);
  STD_TORCH_CHECK(same(asked, branch), "`packed` does not hold these weights");
  const Maybe y = run(branch, x, mask, shortcut, break_even.value_or(kBreakEven));
  // Zero asks for all positions.
  return y ? *y : elsewhere(0.0);
}

// The same without gradients and for little words: one packed tensor; empty where `break_even` is exceeded.
Tensor run_branch(const Tensor& x, const Tensor& mask, const Tensor& shortcut, const Tensor& packed, double break_even) {
  STD_TORCH_CHECK(is_float(x) && is_float(shortcut), "the kernels compute float32 on a CPU");
  const Maybe y = run(unpacked(packed), x, mask, shortcut, break_even < 0 ? kBreakEven : break_even);
  return y ? *y : images(0, 0, 0, 0, false);
}

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

Tensor mask_logits(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride) {
  if (!is_float(x) || !is_float(weight) || !is_float(linear) || !is_float(bias))
    return eager("dynaconv::mask_logits", x, weight, linear, bias, stride);
  return logits(x, weight, linear, bias, stride);
}

// 1 where the logit reaches the threshold, else 0; without gradients.
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dynaconv, CPU, library) {
  library.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  library.impl("masked_residual", TORCH_BOX(&masked_residual));
  library.impl("mask_logits", TORCH_BOX(&mask_logits));
  library.impl("dynamic_conv2d", TORCH_BOX(&dynamic_conv2d));
  library.impl("pack_branch", TORCH_BOX(&pack_branch));
  library.impl("squeeze_mask", TORCH_BOX(&squeeze_mask));
  library.impl("run_branch", TORCH_BOX(&run_branch));
}
