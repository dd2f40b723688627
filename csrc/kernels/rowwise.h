// Kernels that walk rows of channels: pooling, sums, products, normalisation, mask logits.

#pragma once

#include <cstdint>

enum class Pairing { kAdd, kSubtract, kMultiply };

struct RowKernels {
  // out[c] = max over taps t of taps[t][c]; no taps: -inf.
  void (*max)(const void* const* taps, int taps_count, int64_t channels, void* out);
  // out[c] = scale * sum over taps t of taps[t][c].
  void (*average)(const void* const* taps, int taps_count, int64_t channels, float scale, void* out);
  // out[c] = activation(a[c] op b[c]), or of b[0] alone when `single`.
  void (*pair)(Pairing op, const void* a, const void* b, bool single, int64_t channels, int activation, void* out);
  // out[c] = activation(a[c] + weight * b[c]).
  void (*weighted)(const void* a, const void* b, float weight, int64_t channels, int activation, void* out);
  void (*activate)(const void* in, int64_t channels, int activation, void* out);
  // out[c] = in[c], times slopes[c] where it is negative.
  void (*leaky)(const void* in, const float* slopes, int64_t channels, void* out);
  // out[c] = sum over taps t of factors[t] * taps[t][c].
  void (*blend)(const void* const* taps, const float* factors, int taps_count, int64_t channels, void* out);
  // Likewise from float32 rows, and to them.
  void (*from_float)(const float* in, int64_t channels, int activation, void* out);
  void (*to_float)(const void* in, int64_t channels, int activation, float* out);
  // sums[c] += sum over `rows` rows of rows[r][c] for `channels` channels; rows lie `stride` elements apart.
  void (*sum)(const void* rows, int64_t count, int64_t stride, int64_t channels, float* sums);
  // Layer norm of one row: (in - mean) / sqrt(variance + eps) * weight + bias.
  void (*normalize)(const void* in, int64_t channels, const float* weight, const float* bias, float eps, void* out);
  // sums[p] = sum over taps t of dot(taps[t * kGatePixels + p], weight + t * channels) for p < kGatePixels; where `extra` is
  // given, returns the sum over p < pixels of dot(taps[center * kGatePixels + p], extra).
  float (*dots)(const void* const* taps, int taps_count, int64_t channels, const float* weight, int center,
                const float* extra, int pixels, float* sums);
  // rows[p * stride + c] = planes[c * plane + p] for p < count, c < channels.
  void (*interleave)(const float* planes, int64_t plane, int64_t count, int64_t channels, void* rows, int64_t stride);
};

constexpr int kGatePixels = 4;

// dtype as in plan.h: that of rows; arithmetic is float32. bfloat16 needs a processor with has_bfloat16().
const RowKernels& row_kernels(int dtype);
