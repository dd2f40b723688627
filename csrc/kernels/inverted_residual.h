// The fused inverted residual: expand (1x1), depthwise, project (1x1). The hidden tensor never leaves the cache.
//
// A thread walks output rows in bands. For a band it expands the missing hidden rows into a ring with a border of zeros,
// one panel of 32 hidden channels after the other, convolves each panel while it is in the L1 cache into a small buffer,
// and projects that buffer into the output rows. Small images are cut by hidden channels instead, in two phases.

#pragma once

#include <cstdint>

// Weights as in csrc/plan/plan.h: panels for expand and project, [taps][hidden] for depthwise.
struct InvertedArgs {
  int64_t images;
  int32_t height, width, out_height, out_width;
  int32_t channels, hidden, out_channels;
  int32_t kernel[2], stride[2], padding[2], dilation[2];  // of the depthwise convolution
  const float *expand_weight, *expand_bias;               // null: no expansion, hidden == channels
  const float *depthwise_weight, *depthwise_bias;
  const float *project_weight, *project_bias;
  int32_t activation[3], final_activation;  // final: after the residual was added
  const float* in;        // [images * height * width] rows
  int64_t in_stride;      // elements from one row to the next
  float* out;             // [images * out_height * out_width] rows
  int64_t out_stride;
  const float* residual;  // rows as `out`, or null; may be `out`, but not `in` where `in` is `out`
  int64_t residual_stride;
  const uint8_t* need;         // [images * out_height * out_width] open pixels, or null: all
  const uint8_t* need_hidden;  // [images * height * width] what these read, or null: all
  const float* zeros;          // at least `hidden` zeros
  float* shared;               // inverted_shared_bytes() for all threads together
  int32_t threads;
  int32_t band;                // output rows of a band, 0: chosen here
};

// Chunks of one phase are independent of each other; all chunks of a phase must be done before the next phase starts.
int inverted_phases(const InvertedArgs& args);
int64_t inverted_chunks(const InvertedArgs& args, int phase);
// `scratch`: inverted_scratch_bytes() for each thread, aligned to 64 bytes.
void inverted_run_chunk(const InvertedArgs& args, int phase, int64_t chunk, void* scratch);
int64_t inverted_scratch_bytes(const InvertedArgs& args);
int64_t inverted_shared_bytes(const InvertedArgs& args);
