// The operators that the kernels run; dynaconv/ops/_registry.py defines them and says what they mean.

#pragma once

#include "tensors.h"

Tensor masked_conv2d(const Tensor& x, const Tensor& mask, const Tensor& weight, const Maybe& bias, Ints stride,
                     Ints padding, Ints dilation, int64_t groups);
Tensor masked_residual(const Tensor& x, const Tensor& mask, const Tensor& shortcut, std::vector<Tensor> weights,
                       std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations, Ints groups,
                       Ints activations, int64_t activation, std::optional<double> break_even, const Maybe& packed);
// A branch in the layout of the kernels, in one tensor that also says what it is.
Tensor pack_branch(std::vector<Tensor> weights, std::vector<Tensor> biases, Ints strides, Ints paddings, Ints dilations,
                   Ints groups, Ints activations, int64_t activation);
// masked_residual without gradients and for little words: one packed tensor; empty where `break_even` is exceeded.
Tensor run_branch(const Tensor& x, const Tensor& mask, const Tensor& shortcut, const Tensor& packed, double break_even);
Tensor mask_logits(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride);
// 1 where the logit reaches the threshold, else 0; without gradients.
Tensor squeeze_mask(const Tensor& x, const Tensor& weight, const Tensor& linear, const Tensor& bias, int64_t stride,
                    const Tensor& threshold);
Tensor dynamic_conv2d(const Tensor& x, const Tensor& experts, const Tensor& routing, const Maybe& bias,
                      const Maybe& static_bias, const Maybe& taps, Ints stride, Ints padding, Ints dilation,
                      int64_t groups, const Maybe& packed);
