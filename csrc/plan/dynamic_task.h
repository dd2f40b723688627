// A step whose weights differ from image to image: which rows it computes, where things lie, and the ways to run it.
//
// Where the mixed weights of an image are small, all threads mix them once and then convolve with them. Where they are
// large, a thread mixes a panel in chunks that stay in its L2 cache and multiplies at once, for one image after the
// other, so that the experts are read from memory once for the whole batch.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels/depthwise.h"
#include "conv_rows.h"
#include "panels.h"
#include "run.h"

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t tiles_of_image(const Value& out) { return int64_t{(out.height + 1) / 2} * ((out.width + 1) / 2); }

// Which rows (or tiles) a step computes, image by image.
struct Images {
  const Position* list = nullptr;
  const int32_t* counts = nullptr;
  int64_t area = 0, all = 0;  // positions of an image; rows over the batch
  bool closed = false;

  int64_t count(int64_t image) const {
    if (!list) return area;
    return closed ? area - counts[image] : counts[image];
  }
  int64_t first(int64_t image) const {
    if (!list) return image * area;
    int64_t sum = 0;
    for (int64_t i = 0; i < image; ++i) sum += count(i);
    return sum;
  }
  int64_t most(int64_t images) const {
    int64_t most = 0;
    for (int64_t i = 0; i < images; ++i) most = std::max(most, count(i));
    return most;
  }
};

Images rows_of(const Run& run, const Step& step);

// Where things lie in a thread's scratch.
struct DynamicScratch {
  float *mixer, *weights, *sums, *bias;
  char* rest;

  DynamicScratch(char* base, const PanelShape& shape, int64_t sums_floats, int64_t* bytes = nullptr) {
    int64_t at = 0;
    const auto take = [&](int64_t floats) {
      auto* from = reinterpret_cast<float*>(base + at);
      at += ceil_of(floats * 4, 64) * 64;
      return from;
    };
    mixer = take(shape.scratch_floats());
    weights = take(shape.small ? 0 : kMostMixed * shape.panel_floats(shape.chunk));
    sums = take(sums_floats);
    bias = take(kPanel);
    rest = base + at;
    if (bytes) *bytes = at;
  }
};

class DynamicTask {
 public:
  // prepared: what a step made of its coefficients before. shared: what all threads have in common from there on.
  DynamicTask(Worker& worker, const Step& step, const PanelShape& shape, const Prepared& prepared, char* shared);

  // Barriers lie within; at most three phases of the step are used.
  void run() const;

  static int64_t sums_floats(const PanelShape& shape, const Value& out);
  static int64_t shared_bytes(const Plan& plan, const Step& step, const PanelShape& shape, int64_t images);

 private:
  bool use_winograd() const;
  PanelMixer mixer() const { return PanelMixer(run_, step_, shape_, prepared_, scratch_.mixer); }
  TileCall tile_call(int64_t panel) const;

  // Small weights: of every image and panel, then biases.
  float* shared_weights(int64_t image, int64_t panel) const {
    return shared_ + (image * shape_.panels + panel) * shape_.panel_floats(shape_.channels);
  }
  float* shared_bias(int64_t image, int64_t panel) const {
    return shared_weights(images_, 0) + (image * shape_.panels + panel) * kPanel;
  }
  void mix_all(bool winograd) const;
  void small_direct() const;
  void small_winograd() const;

  // Large weights.
  void large_direct() const;
  void large_winograd() const;
  void transform_inputs() const;
  template <typename F>
  void image_blocks(int64_t floats_of_image, F&& f) const;
  void foresee(int64_t panel, int64_t first, int64_t group, int64_t groups) const;
  template <typename F>
  void chunks(PanelMixer& own, int64_t panel, int64_t first_image, int64_t last_image, bool winograd, F&& f) const;
  void multiply(const ConvRows& place, int64_t panel, int64_t image, const float* weight, int64_t first_channel,
                int64_t channels, float* sums) const;
  void finish(const ConvRows& place, int64_t panel, int64_t image, const float* sums) const;

  void depthwise() const;
  DepthwiseArgs depthwise_args() const;

  Worker& worker_;
  const Run& run_;
  const Step& step_;
  const PanelShape& shape_;
  const Prepared& prepared_;
  const Conv& conv_;
  const Value& out_;
  const int64_t images_;
  float* const shared_;
  DynamicScratch scratch_;
  Images rows_, tiles_;
};
