// The fused inverted residual: expand (1x1), depthwise, project (1x1). The hidden tensor never leaves the cache. Without
// projection the result is what lies behind the depthwise convolution, with its mean over the open positions where that is
// wanted.
//
// A thread walks output rows in bands. For a band it expands the missing hidden rows into a ring with a border of zeros,
// one panel of 32 hidden channels after the other, convolves each panel while it is in the L1 cache into a small buffer,
// and projects that buffer into the output rows. Small images are cut by hidden channels instead, in two phases.

#pragma once

#include <cstdint>

#include "gemm.h"
#include "vectors.h"

// A low-rank part that is added to the scaled weights of the expansion, other for each image: DCD's channel fusion, arXiv
// 2103.08756, equation 6. factors: of each image the scale of every output, padded to panels, then rows of fusion_row(rank):
// folded, one for the bias and one for each channel; else one for each pixel.
struct FusedExpansion {
  int64_t rank;
  bool folded;           // to weights of the image
  const float* right;    // [panels][rank][32]
  const float* offset;   // added to the bias, not scaled
  const float* factors;
  int64_t factors_stride;
};
inline int64_t fusion_row(int64_t rank) { return (rank + 15) / 16 * 16; }
inline int64_t fusion_floats(int64_t outputs, int64_t rank, int64_t rows) {
  return (outputs + 31) / 32 * 32 + rows * fusion_row(rank);
}

// Weights as in csrc/plan/plan.h: panels for expand and project, [taps][hidden] for depthwise. T is float or Bfloat16.
template <typename T>
struct InvertedArgsOf {
  int64_t images;
  int32_t height, width, out_height, out_width;
  int32_t channels, hidden, out_channels;
  int32_t kernel[2], stride[2], padding[2], dilation[2];  // of the depthwise convolution
  const T* expand_weight;                                 // null: no expansion, hidden == channels
  const T *depthwise_weight, *project_weight;             // no projection: out_channels == hidden, no residual
  const float *expand_bias, *depthwise_bias, *project_bias;
  int32_t activation[3], final_activation;  // final: after the residual was added
  const T* in;            // [images * height * width] rows
  int64_t in_stride;      // elements from one row to the next
  T* out;                 // [images * out_height * out_width] rows
  int64_t out_stride;
  const T* residual;      // rows as `out`, or null; may be `out`, but not `in` where `in` is `out`
  int64_t residual_stride;
  FusedExpansion fusion;  // of float32; rank 0: none
  float* means;           // [images] rows of `hidden`, or null; only without projection. 0 where no pixel is open
  int64_t means_stride;
  bool slices;            // cut by hidden channels and without projection: `out` has of every image the channels of each thread
                          // together, [threads][pixels][channels of the thread]
  const uint8_t* need;         // [images * out_height * out_width] open pixels, or null: all
  const uint8_t* need_hidden;  // [images * height * width] what these read, or null: all
  bool fills;                  // closed pixels of `out` become closed_activation(residual); else they keep what they held
  int32_t closed_activation;
  const uint8_t* counted;      // the pixels that `means` are taken over where all are computed, or null: all
  const T* zeros;              // at least `hidden` zeros
  T* shared;                   // inverted_shared_bytes() for all threads together
  int32_t threads;
  int32_t band;                // output rows of a band, 0: chosen here
  Upcoming* upcoming;          // of the thread that runs a chunk, or null
};
using InvertedArgs = InvertedArgsOf<float>;
using InvertedArgsBfloat16 = InvertedArgsOf<Bfloat16>;

// Each thread takes whole panels of hidden channels: panels * share / threads and on.
template <typename T>
bool inverted_by_channels(const InvertedArgsOf<T>& args);
// Chunks of one phase are independent of each other; all chunks of a phase must be done before the next phase starts.
template <typename T>
int inverted_phases(const InvertedArgsOf<T>& args);
template <typename T>
int64_t inverted_chunks(const InvertedArgsOf<T>& args, int phase);
// `scratch`: inverted_scratch_bytes() for each thread, aligned to 64 bytes.
template <typename T>
void inverted_run_chunk(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* scratch);
template <typename T>
int64_t inverted_scratch_bytes(const InvertedArgsOf<T>& args);
template <typename T>
int64_t inverted_shared_bytes(const InvertedArgsOf<T>& args);
