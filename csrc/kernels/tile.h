// The innermost loops, one template for all instruction sets; one table picks the best at run time.

#pragma once

#include <cstdint>

constexpr int kRows = 12;     // pixels of a tile
constexpr int kColumns = 32;  // output channels of a tile and of a packed weight panel

// block[r * kColumns + c] = bias[c] + sum over taps t and channels k of taps[t * kRows + r][k] * weight[(t * depth + k)
// * kColumns + c].
using TileFunction = void (*)(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                              const float* bias, float* block);
// out[c] = bias[c] + sum over taps t of taps[t * kRows][c] * weight[t * channels + c].
using DepthwiseFunction = void (*)(const float* const* taps, int taps_count, int64_t channels, const float* weight,
                                   const float* bias, float* out);
// One plane of a depthwise convolution with stride 1: out[i] = bias + sum over taps t of weight[t] * from[offsets[t] + i] for
// i < count, where `from` is the padded plane as one row. Writes up to 15 values past `count`.
using PlaneFunction = void (*)(const float* from, const int64_t* offsets, const float* weight, int taps_count, float bias,
                               int64_t count, float* out);
// mixed[(t * channels + k) * kColumns + c] = scale[t] * sum over experts e of shares[e * kColumns + c] * experts[((t *
// channels + k) * count + e) * kColumns + c].
using MixFunction = void (*)(const float* experts, int count, const float* shares, const float* scale, int taps_count,
                             int64_t channels, float* mixed);
using MaskRowFunction = void (*)(const float* x, const float* taps, int64_t height, int64_t width, int64_t channels,
                                 int64_t stride, int64_t oy, int64_t out_width, float offset, float* z);
using MeanFunction = float (*)(const float* x, int64_t count, int64_t channels, const float* weight);

TileFunction best_tile();
DepthwiseFunction best_depthwise();
MaskRowFunction best_mask_row();
MeanFunction best_mean();
MixFunction best_mix();
PlaneFunction best_plane();
