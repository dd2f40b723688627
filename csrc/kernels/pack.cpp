// Weights in the order in which the tiles of gemm.h read them.

#include <cstring>

#include "api.h"
#include "gemm.h"

namespace {

int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

int64_t bias_size(const BranchConv& conv) {
  return conv.depthwise() ? conv.out_channels : conv.groups * rounded(conv.out_channels / conv.groups, kPanel);
}

}  // namespace

int64_t dynaconv_packed_bias(const BranchConv* conv) {
  return rounded(bias_size(*conv) * conv->kernel[0] * conv->kernel[1] * (conv->in_channels / conv->groups), 16);
}

int64_t dynaconv_packed_size(const BranchConv* conv) {
  return dynaconv_packed_bias(conv) + rounded(bias_size(*conv), 16);
}

void dynaconv_pack(const BranchConv* conv, const float* weight, const int64_t* strides, const float* bias, float* packed) {
  const bool depthwise = conv->depthwise();
  const int64_t inputs = conv->in_channels / conv->groups, outputs = conv->out_channels / conv->groups;
  const int64_t kh = conv->kernel[0], kw = conv->kernel[1], depth = kh * kw * inputs;
  const int64_t padded = rounded(outputs, kPanel);
  std::memset(packed, 0, dynaconv_packed_size(conv) * sizeof(float));
  float* shift = packed + dynaconv_packed_bias(conv);
  for (int64_t o = 0; o < conv->out_channels; ++o) {
    const int64_t group = o / outputs, within = o % outputs;
    // Depthwise filters lie side by side; others in panels, each of them whole before the next.
    float* to = depthwise ? packed + o : packed + (group * padded + within / kPanel * kPanel) * depth + within % kPanel;
    const int64_t pitch = depthwise ? conv->out_channels : kPanel;
    for (int64_t y = 0; y < kh; ++y)
      for (int64_t x = 0; x < kw; ++x) {
        const float* from = weight + o * strides[0] + y * strides[2] + x * strides[3];
        for (int64_t i = 0; i < inputs; ++i, to += pitch) *to = from[i * strides[1]];
      }
    if (bias) shift[depthwise ? o : group * padded + within] = bias[o];
  }
}
