// Tensors as the kernels see them, through torch's stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "kernels/api.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

inline bool is_float(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_cpu(); }
inline bool is_float(const Maybe& t) { return !t || is_float(*t); }

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The strides of a dense [N, C, H, W] in one of the two orders; axes of one element may have any.
inline bool is_dense(const Tensor& t, bool rows) {
  const auto size = t.sizes(), stride = t.strides();
  const std::array<int, 4> order = rows ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0};
  int64_t expected = 1;
  for (const int axis : order) {
    if (size[axis] != 1 && stride[axis] != expected) return false;
    expected *= size[axis];
  }
  return true;
}

inline Tensor as_rows(const Tensor& t) { return is_dense(t, true) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast); }
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

inline Tensor as_planes(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// As torch.channels_last is asked about: what is both counts as contiguous.
inline bool prefers_rows(const Tensor& x) { return !x.is_contiguous() && is_dense(x, true); }

inline Tensor as_mask(const Tensor& mask) {
  return as_planes(is_float(mask) ? mask : torch::stable::to(mask, ScalarType::Float));
}

// Empty, without the detour over the dispatcher.
inline Tensor images(int64_t n, int64_t channels, int64_t height, int64_t width, bool rows) {
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

inline void check_memory(int status, const char* what) {
  STD_TORCH_CHECK(status != 2, "no memory for a ", what, " on an input of this shape");
}

inline void check_images(const Tensor& x, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "expected x [N, C, H, W] and weights [O, I, kh, kw]");
  STD_TORCH_CHECK(groups > 0 && x.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0,
                  "the channels of x and of the weight do not fit together");
}

inline void check_grid(const Tensor& t, int64_t n, int64_t channels, const int64_t* size, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == n && t.size(1) == channels && t.size(2) == size[0] && t.size(3) == size[1],
                  what, " must be [", n, ", ", channels, ", ", size[0], ", ", size[1], "] to match the output");
}

// Two numbers of each list, from `at` on.
inline BranchConv geometry(const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
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
