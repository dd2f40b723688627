// Convolutions and residual branches of the open positions.

#include <cstring>

#include "operators.h"

namespace {

constexpr double kBreakEven = 0.7;  // BREAK_EVEN_COMPILED in dynaconv/ops/masked_residual/cpu.py

void pack(const BranchConv& conv, const Tensor& weight, const Maybe& bias, float* packed) {
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == conv.out_channels), "a bias must be [O]");
  const Maybe shift = bias ? Maybe(as_planes(*bias)) : bias;
  dynaconv_pack(&conv, floats(weight), weight.strides().data(), shift ? floats(*shift) : nullptr, packed);
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

}  // namespace

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

Tensor pack_branch(std::vector<Tensor> weights, std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations,
                   Ints groups, Ints activations, int64_t activation) {
  return pack_whole(branch_of(weights, strides, paddings, dilations, groups, activations, activation), weights, biases);
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

Tensor run_branch(const Tensor& x, const Tensor& mask, const Tensor& shortcut, const Tensor& packed, double break_even) {
  STD_TORCH_CHECK(is_float(x) && is_float(shortcut), "the kernels compute float32 on a CPU");
  const Maybe y = run(unpacked(packed), x, mask, shortcut, break_even < 0 ? kBreakEven : break_even);
  return y ? *y : images(0, 0, 0, 0, false);
}
