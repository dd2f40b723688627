// Depthwise convolution of channels-last rows. The work item is a run: consecutive output pixels of one output row, all
// channels. A masked convolution is a list of runs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

constexpr int kMostTaps = 1024;  // of a kernel

// Sizes are those of one image; `in`, `out` and `residual` hold `images` of them, one after the other, as rows.
template <typename T>
struct DepthwiseArgsOf {
  int64_t images;
  int32_t height, width, out_height, out_width;
  int64_t channels;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  const T* in;            // [images * height * width] rows
  int64_t in_stride;      // elements from one row to the next
  const T* weight;        // [taps][channels]; bfloat16: pairs of taps, see csrc/plan/plan.h
  int64_t weight_stride;  // float32: elements from one tap's weights to the next, 0: channels
  const float* bias;      // [channels]; bfloat16: padded to whole panels of 32
  T* out;                 // [images * out_height * out_width] rows; may be `residual`, but not `in`
  int64_t out_stride;
  const T* residual;      // rows as `out`, or null; added after `activation`
  int64_t residual_stride;
  int32_t activation, final_activation;
  const uint8_t* need;    // [images * out_height * out_width] 0 or 1, or null: all
  bool closed;            // with `need`: the pixels of 0 instead of those of 1
  const T* zeros;         // at least `channels` zeros
};
using DepthwiseArgs = DepthwiseArgsOf<float>;
using DepthwiseArgsBfloat16 = DepthwiseArgsOf<Bfloat16>;

// A run whose taps are all there: either inside the image or in a border of zeros.
// float32: `lines` and `weight` are those of the kernel rows inside the image. bfloat16: of all kernel rows; a line outside
// is null, and every pixel has whole panels of channels, also of `out`.
template <typename T>
struct DepthwiseRunOf {
  const T* const* lines;      // for each kernel row, the first tap of the first pixel
  int32_t line_count;         // kernel rows; weights are [line_count][kernel columns][weight_stride]
  int64_t pixel;              // elements between neighbouring input pixels
  int64_t channels;
  const T* weight;
  int64_t weight_stride;
  const float* bias;
  T* out;
  int64_t out_pixel;
  int32_t count;              // output pixels
  int32_t kernel, stride, dilation;  // along the row
  int32_t activation;
};

using DepthwiseRun = DepthwiseRunOf<float>;
using DepthwiseRunBfloat16 = DepthwiseRunOf<Bfloat16>;

void depthwise_run(const DepthwiseRun& run);
void depthwise_run(const DepthwiseRunBfloat16& run);

// Output rows of all images are numbered one after the other. Computes [first, last) of them, or of those the needed pixels.
void depthwise_rows(const DepthwiseArgs& args, int64_t first, int64_t last);
void depthwise_rows(const DepthwiseArgsBfloat16& args, int64_t first, int64_t last);

// One run of one output row; `out` points at its first pixel, the residual is left out.
void depthwise_pixels(const DepthwiseArgs& args, int64_t row, int32_t first, int32_t last, float* out, int64_t out_pixel);
void depthwise_pixels(const DepthwiseArgsBfloat16& args, int64_t row, int32_t first, int32_t last, Bfloat16* out,
                      int64_t out_pixel);

// bfloat16: pairs of taps. Two kernel rows pair up column by column, a last odd row pairs neighbouring columns.
inline int64_t depthwise_pairs(int64_t kernel_rows, int64_t kernel_columns) {
  return kernel_rows / 2 * kernel_columns + kernel_rows % 2 * ((kernel_columns + 1) / 2);
}

// A sensible cut for `threads`: chunk c of depthwise_chunks() is a few whole output rows.
template <typename T>
int64_t depthwise_chunks(const DepthwiseArgsOf<T>& args, int threads) {
  const int64_t rows = args.images * args.out_height;
  const double macs = double(args.channels) * args.kernel[0] * args.kernel[1] * args.out_width * rows;
  // A chunk is worth at least some ten microseconds.
  const int64_t worth = std::max<int64_t>(1, static_cast<int64_t>(macs / 4e5));
  return std::min({rows, worth, int64_t{8} * threads});
}
template <typename T>
void depthwise_run_chunk(const DepthwiseArgsOf<T>& args, int64_t chunks, int64_t chunk) {
  const int64_t rows = args.images * args.out_height;
  depthwise_rows(args, rows * chunk / chunks, rows * (chunk + 1) / chunks);
}

// The first open pixel at or after `x`, and the first closed one after that; both `width` when there is none. Without
// `need` all are open.
inline int32_t next_open(const uint8_t* need, int32_t x, int32_t width) {
  while (need && x < width && !need[x]) ++x;
  return x;
}
inline int32_t next_closed(const uint8_t* need, int32_t x, int32_t width) {
  if (!need) return width;
  while (x < width && need[x]) ++x;
  return x;
}

// The first pixel at or after `x` of an output row that is computed, and the first one after that which is not.
template <typename T>
int32_t next_needed(const DepthwiseArgsOf<T>& args, const uint8_t* need, int32_t x) {
  return args.closed ? next_closed(need, x, args.out_width) : next_open(need, x, args.out_width);
}
template <typename T>
int32_t next_other(const DepthwiseArgsOf<T>& args, const uint8_t* need, int32_t x) {
  return args.closed ? next_open(need, x, args.out_width) : next_closed(need, x, args.out_width);
}
