// Weights of each sample, made one panel of outputs at a time: the mixture of a dynamic convolution's experts, or the
// scaled static weight of a channel fusion with its low-rank part.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels/gemm.h"
#include "../kernels/mixing.h"
#include "run.h"

// A small product by one thread: `count` rows of `depth` numbers, `row` apart, times weights [panels][depth][kPanel]. Row r of
// the `columns` results is out + r * out_row.
struct RowsTimesPanels {
  const float* rows;
  int64_t count, row, depth;
  const float* weight;
  int64_t columns;
  float* out;
  int64_t out_row;
  const float* bias = nullptr;  // [panels * kPanel], null: none
  bool add = false;             // to what `out` holds; of one panel

  void multiply() const;
};

// What follows from a step's geometry alone.
struct PanelShape {
  int64_t panels, per_group;   // all panels, and those of one group
  int64_t outputs, channels;   // of one group
  int64_t taps;
  int64_t rank;                // of what a channel fusion adds at the centre tap, 0: nothing
  int count;                   // experts
  bool depthwise, winograd;    // Winograd may be used
  bool small;                  // the mixed weights of an image stay in the cache
  int64_t chunk;               // input channels that are mixed at once

  PanelShape(const Plan& plan, const Step& step);
  int64_t points() const { return winograd ? 16 : taps; }
  // Floats of the mixed weights of one panel and `channels` channels, with room between the points.
  int64_t panel_floats(int64_t of_channels) const { return points() * (of_channels * kPanel + kPanel); }
  int64_t scratch_floats() const;
  // A 1x1 channel fusion, whose kernel is made in one pass.
  bool folds_alone() const { return rank && taps == 1 && chunk == channels; }
  int columns(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kPanel, outputs - panel % per_group * kPanel));
  }
  int64_t first_output(int64_t panel) const { return panel / per_group * outputs + panel % per_group * kPanel; }
};

// What a channel fusion makes of its coefficients before weights are mixed; nothing for experts. To the centre tap's weights
// of channel k and a panel's outputs it adds left[k] * right, or where `matrix` is given left[k] * (matrix * right).
struct Prepared {
  const float* scale = nullptr;   // [images][panels * kPanel]: shares of the outputs
  const float* shift = nullptr;   // [images][rank]: right^T * shift is added to the bias
  int64_t scale_step = 0, shift_step = 0;
  const float* left = nullptr;    // [images or 1][channels][rank]
  int64_t left_step = 0, left_row = 0;
  const float* matrix = nullptr;  // [images][rank][rank]
  int64_t matrix_step = 0;
  const float* right = nullptr;   // [panels][rank][kPanel]
  const float* offset = nullptr;  // [panels * kPanel]: added to the bias, not scaled
};

// Where mixed weights go. Direct: out + i * image_step + t * step + k * kPanel for tap t and channel k of image i.
// Winograd: the same with points instead of taps.
struct PanelPlace {
  float* out;
  int64_t image_step, step;
  bool winograd;
};

class PanelMixer {
 public:
  // scratch: scratch_floats() for each thread.
  PanelMixer(const Run& run, const Step& step, const PanelShape& shape, const Prepared& prepared, float* scratch);

  // Of channels [first, first + channels), at most shape.chunk, for at most kMostMixed images from `image` on. cold: the
  // experts were not used just now.
  void mix(int64_t panel, int64_t image, int images, int64_t first, int64_t channels, const PanelPlace& place, bool cold);
  // [kPanel], static and mixed.
  void bias(int64_t panel, int64_t image, float* out);

 private:
  void take_shares(int64_t panel, int64_t image, float* shares, bool scaled) const;
  const float* take_scale(int64_t panel, int64_t image, int images, int64_t first, int64_t channels);
  const int64_t* take_places(int64_t channels, int64_t step);
  void fuse(MixCall& call, int64_t panel, int64_t image, int64_t first, int64_t channels, const PanelPlace& place);
  void add_low_rank(int64_t panel, int64_t image, int64_t first, int64_t channels, float* out, int64_t step);
  void fuse_point(int64_t panel, int64_t image, int64_t first, int64_t channels, float* out);
  const float* right_of(int64_t panel, int64_t image);
  const float* row(int32_t value, int64_t image) const {
    return value < 0 ? nullptr : reinterpret_cast<const float*>(run_.data(value)) + image * run_.value(value).stride;
  }

  const Run& run_;
  const Step& step_;
  const PanelShape& shape_;
  const Prepared& prepared_;
  const Conv& conv_;
  float *shares_, *scale_, *fused_, *right_;
  int64_t* places_;
  int64_t placed_channels_ = -1, placed_step_ = -1;
};
