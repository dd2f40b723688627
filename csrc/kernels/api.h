// The kernels as plain C functions on raw pointers: what csrc/torch calls. All activations are float32.

#pragma once

#include <cstdint>

// One convolution of a residual branch. Activations by number: `Activation` in plan.h.
struct BranchConv {
  const float* weight;  // packed, see dynaconv_pack
  const float* bias;
  int32_t in_channels, out_channels, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t activation;

  bool depthwise() const { return groups > 1 && groups == in_channels && groups == out_channels; }
};

// A convolution with a kernel for each sample.
struct DynamicConv {
  const float* experts;  // packed [O / 32][taps * I][K][32], zero padded
  int32_t in_channels, out_channels, count;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t per_channel;   // 1: coefficients are [n][K][O padded to 32]; 0: [n][K]
  int32_t planar;        // 1: write [n, O, h, w]; 0: write [n, h, w, O]
};

extern "C" {

int dynaconv_abi();
const char* dynaconv_isa();
int dynaconv_columns();

// Floats that a packed convolution takes. The weight is [groups][O / g / 32][taps * I / g][32], zero padded, and the bias
// [groups][O / g padded to 32]; depthwise: [taps][O] and [O]. Both start at a multiple of 16 floats.
int64_t dynaconv_packed_size(const BranchConv* conv);
// Where in those the bias starts.
int64_t dynaconv_packed_bias(const BranchConv* conv);
// weight: elements at [o * strides[0] + i * strides[1] + y * strides[2] + x * strides[3]]; bias [O] or null.
void dynaconv_pack(const BranchConv* conv, const float* weight, const int64_t* strides, const float* bias, float* packed);

// y = act(shortcut + mask * branch(x)) over rows. sizes: (H, W) of the input and of every convolution's output.
// Returns 0 when done, 1 when the executed share exceeds `break_even` (nothing is written then), 2 out of memory.
int dynaconv_masked_residual(const float* x, const float* mask, const float* shortcut, float* y, int64_t n,
                             const BranchConv* convs, int count, const int64_t* sizes, int final_activation,
                             double break_even);
// y = mask * act(conv(x)) over rows; zero where the mask is closed. sizes: (H, W) and (h, w).
// Returns 0 when done, 2 out of memory.
int dynaconv_masked_conv(const float* x, const float* mask, float* y, int64_t n, const BranchConv* conv,
                         const int64_t* sizes);
// Squeeze mask unit: z = conv3x3(x) (stride s, padding 1) + linear(mean of x) + bias, one value a position.
// x rows; taps [9][C]; linear [C].
void dynaconv_mask_logits(const float* x, const float* taps, const float* linear, float bias, int64_t n, int64_t height,
                          int64_t width, int64_t channels, int64_t stride, float* z);

// x [n, H, W, I], coefficients as in DynamicConv, tap_scale [n][taps] or null, bias [n][O padded to 32].
// Returns 0 when done, 2 out of memory.
int dynaconv_dynamic_conv(const float* x, float* y, int64_t n, int64_t height, int64_t width, int64_t out_height,
                          int64_t out_width, const DynamicConv* conv, const float* coefficients, const float* tap_scale,
                          const float* bias);
// One filter a channel and a sample, mixed already. planar: x [n, C, H, W], stride 1, weight [n][C][taps]; else
// x [n, H, W, C], weight [n][taps][C]. bias [n][C]. Returns 0 when done, 2 out of memory.
int dynaconv_sample_depthwise(const float* x, float* y, int64_t n, int64_t height, int64_t width, int64_t out_height,
                              int64_t out_width, const DynamicConv* conv, const float* weight, const float* bias);

}  // extern "C"
