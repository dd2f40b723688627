// Mixing of experts, one panel of outputs at a time: a weight of each sample is a weighted sum of the experts' weights.
// Source: CondConv, arXiv 1904.04971, equation 1.

#pragma once

#include <cstdint>

constexpr int kMostMixed = 4;  // images for which experts are read once

// A row is one weight (an input channel and a tap) of each of the panel's outputs. For images i and outputs c < kPanel
//   mixed[i][row][c] = scale[i * rows + row] * sum over experts e of shares[i][e][c] * experts[row][e][c].
struct MixCall {
  const float* experts;   // [rows][count][kPanel]
  int64_t rows;
  int count;
  const float* shares;    // [images][count][kPanel]
  int images;             // 1 .. kMostMixed
  const float* scale;     // [images][rows], or null: 1
  float* out;
  int64_t image_step;     // floats
  const int64_t* places;  // mix: [rows] where in `out` each row goes, or null: one after the other
  int64_t point_step;     // mix_winograd: floats
};

// out[row][c] = shares[c] * weights[row][c] + sum over l < rank of left[row * left_row + l] * right[l][c], for outputs c < kPanel.
struct FuseCall {
  const float* weights;  // [rows][kPanel]
  int64_t rows;
  const float* shares;   // [kPanel]
  const float* left;
  int64_t left_row, rank;
  const float* right;    // [rank][kPanel]
  float* out;            // [rows][kPanel]
};

struct MixKernels {
  // out[i * image_step + places[row] + c] = mixed[i][row][c].
  void (*mix)(const MixCall& call);
  // Rows are nine taps of one channel after the other; writes the 16 points of Winograd's G g G^T for channel k, each of them
  // twice or four times as large where G has halves (WinogradKernels::input_halved makes up for it):
  // out[i * image_step + point * point_step + k * kPanel + c].
  void (*mix_winograd)(const MixCall& call);
  void (*fuse)(const FuseCall& call);
};

const MixKernels& mix_kernels();

// Reads experts in the order in which they lie, one float of each line. The processor fetches ahead of those who ask in
// order, which mixing does not; with this before it experts come from memory twice as fast.
inline void bring_near(const float* experts, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) {
    const float value = experts[i];
#ifdef __GNUC__
    asm volatile("" : : "m"(value));
#else
    static_cast<void>(value);
#endif
  }
}
