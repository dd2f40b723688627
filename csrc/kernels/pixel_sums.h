// Sums over pixels, and sums of a pixel that several threads hold a part of.

#pragma once

#include <cstdint>

// One output pixel whose sums several threads hold.
struct Join {
  const float* sums;  // [parts] of them, `part` apart; rounded up to whole panels
  int64_t part, parts;
  const float* bias;
  int64_t channels;
  int activation, final_activation;
  const float *scale, *add;  // of the sums and the bias, and what is added to that, rounded up to whole panels; or both null
};

// out[c] = final_activation(activation(scale[c] * (bias[c] + the sum of all parts) + add[c]) + residual[c]); residual may be null.
void join_pixel(const Join& join, const float* residual, float* out);

// Adds `count` pixels of at most kPanel channels to `sums`, which has room for all.
void add_pixels(const float* from, int64_t count, int64_t step, int64_t channels, float* sums);
