// What the ways of running a channel fusion share: its geometry, and what the coefficients of an image come to. Source: DCD,
// arXiv 2103.08756, equation 6.

#pragma once

#include "dynamic_task.h"

struct Fusion {
  const Conv &conv, &reduce, &expand;  // the static weight, Q, P
  int64_t outputs, rank, rank_panels, channels;
  bool folded, matrix_first;           // matrix_first: the matrix joins P, panel by panel, and not Q

  Fusion(const Plan& plan, const Step& step);
};

// Floats of a matrix [rank][rank] as panels.
inline int64_t matrix_floats(int64_t rank) { return ceil_of(rank, kPanel) * rank * kPanel; }
inline int64_t rounded_floats(int64_t floats) { return ceil_of(floats, 16) * 16; }

struct Coefficients {
  const float* scale;   // [out_channels]
  const float* matrix;  // [rank][rank]: row m holds what latent channel m gives to every latent channel

  Coefficients(const Run& run, const Step& step, const Fusion& fusion, int64_t image);
};

// relu6(z + 3) / 3 of the `count` scales, or the numbers themselves; zeros up to `padded`.
void take_scale(const Step& step, const float* from, int64_t count, int64_t padded, float* to);
// [rank][rank] as panels of 32 columns, zero padded.
void take_panels(const float* matrix, int64_t rank, float* to);

// The kernel that one image gets from a 1x1 fusion, made by one thread for itself, some of its rows at a time.
class ImageFold {
 public:
  static int64_t floats(const Fusion& fusion);
  // scratch: floats() of the thread.
  ImageFold(const Run& run, const Step& step, const Fusion& fusion, float* scratch);

  void take(int64_t image);
  // Of the channels [first, first + channels), [channels][kPanel].
  void weights(int64_t panel, int64_t first, int64_t channels, float* out) const;
  // [kPanel]
  void bias(int64_t panel, float* out) const;

 private:
  const float* right(int64_t panel) const { return static_cast<const float*>(fusion_.expand.weight) + panel * fusion_.rank * kPanel; }

  const Run& run_;
  const Step& step_;
  const Fusion& fusion_;
  float *const scale_, *const shift_, *const matrix_;
  float* const factor_;  // the matrix times P, [panels][rank][kPanel], or Q times the matrix, rows of rounded_floats(rank)
};

// A 1x1 fusion of few images and positions is cut by its input channels, which the step before was cut by.
bool cut_by_channels(const Plan& plan, const Step& step, int64_t images, int threads);
// What the thread `share` of them takes.
inline int64_t first_channel(int64_t channels, int64_t share, int64_t threads) {
  return std::min(channels, ceil_of(channels, kPanel) * share / threads * kPanel);
}
void fusion_by_channels(Worker& worker, const Step& step, const Fusion& fusion);
int64_t scratch_by_channels(const Plan& plan, const Step& step);
int64_t shared_by_channels(const Plan& plan, const Step& step, int64_t images, int threads);
