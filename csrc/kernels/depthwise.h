// Depthwise convolution of channels-last rows. The work item is a run: consecutive output pixels of one output row, all
// channels. A masked convolution is a list of runs.

#pragma once

#include <cstdint>

constexpr int kMostTaps = 1024;  // of a kernel

// Sizes are those of one image; `in`, `out` and `residual` hold `images` of them, one after the other, as rows.
struct DepthwiseArgs {
  int64_t images;
  int32_t height, width, out_height, out_width;
  int64_t channels;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  const float* in;        // [images * height * width] rows
  int64_t in_stride;      // elements from one row to the next
  const float* weight;    // [taps][channels]
  const float* bias;      // [channels]
  float* out;             // [images * out_height * out_width] rows; may be `residual`, but not `in`
  int64_t out_stride;
  const float* residual;  // rows as `out`, or null; added after `activation`
  int64_t residual_stride;
  int32_t activation, final_activation;
  const uint8_t* need;    // [images * out_height * out_width] 0 or 1, or null: all
  const float* zeros;     // at least `channels` zeros
};

// A run whose taps are all there: either inside the image or in a border of zeros.
struct DepthwiseRun {
  const float* const* lines;  // for each kernel row, the first tap of the first pixel
  int32_t line_count;         // kernel rows; weights are [line_count][kernel columns][weight_stride]
  int64_t pixel;              // elements between neighbouring input pixels
  int64_t channels;
  const float* weight;
  int64_t weight_stride;
  const float* bias;
  float* out;
  int64_t out_pixel;
  int32_t count;              // output pixels
  int32_t kernel, stride, dilation;  // along the row
  int32_t activation;
};

void depthwise_run(const DepthwiseRun& run);

// Output rows of all images are numbered one after the other. Computes [first, last) of them, or of those the open pixels.
void depthwise_rows(const DepthwiseArgs& args, int64_t first, int64_t last);

// One run of one output row; `out` points at its first pixel, the residual is left out.
void depthwise_pixels(const DepthwiseArgs& args, int64_t row, int32_t first, int32_t last, float* out, int64_t out_pixel);

// A sensible cut for `threads`: chunk c of depthwise_chunks() is a few whole output rows.
int64_t depthwise_chunks(const DepthwiseArgs& args, int threads);
void depthwise_run_chunk(const DepthwiseArgs& args, int64_t chunks, int64_t chunk);

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
