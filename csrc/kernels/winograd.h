// Winograd's minimal filtering F(2x2, 3x3): 16 products instead of 36 for four outputs. Source: arXiv 1509.09308, section 4.1.

#pragma once

#include <cstdint>

constexpr int kWinogradPoints = 16;

struct WinogradKernels {
  // patch[16]: rows of `channels` channels of a 4x4 input patch; writes transformed[point * step + c].
  void (*input)(const void* const* patch, int64_t channels, void* transformed, int64_t step);
  // The same for weights that were transformed without the halves of G.
  void (*input_halved)(const void* const* patch, int64_t channels, void* transformed, int64_t step);
  // products[point * step + c] for c < kPanel -> sums of the four outputs, [4][kPanel], bias added.
  void (*output)(const float* products, int64_t step, const float* bias, float* sums);
  // One output row of `columns` channels: out = final_activation(activation(sums) + residual), residual may be null.
  void (*finish)(const float* sums, int columns, int activation, int final_activation, const void* residual, void* out);
  // Both at once for a whole panel whose activations are clamps (activations.h): rows of the four outputs, null where there
  // is none to write; `residual` may be null.
  void (*finish_panel)(const float* products, int64_t step, const float* bias, int activation, int final_activation,
                       const void* const* residual, void* const* out);
};

// dtype as in plan.h: of patches, transformed patches, residuals and results; all sums are float32. bfloat16 needs a
// processor with has_bfloat16().
const WinogradKernels& winograd_kernels(int dtype = 0);
