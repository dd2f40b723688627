// The part that a fused inverted residual with a projection and one without share: the walk of a thread over hidden pixels, from
// the input to behind the depthwise convolution.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../plan/plan.h"
#include "depthwise.h"
#include "gemm.h"
#include "inverted_residual.h"

namespace inverted {

template <typename T>
constexpr int kDtypeOf = sizeof(T) == 4 ? kFloat32 : kBfloat16;

// Cut by hidden channels, every thread projects its own: then sums change hands and not the much larger hidden tensor.
template <typename T>
constexpr bool kOwnSums = sizeof(T) == 4;

inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Where things lie in a thread's scratch.
template <typename T>
struct Layout {
  int64_t panels;         // of hidden channels
  int64_t span;           // hidden rows that one output row reads
  int64_t slots, pitch;   // of the ring: rows, and pixels of a row with its border
  int64_t left;           // pixels of the border before a row
  int64_t panel_size;     // elements of the ring
  int64_t hidden_stride;  // of the buffer behind the depthwise convolution
  int64_t band;

  // By hidden channels the ring holds one panel of a whole image. own_channels: of the thread, where its results lie together.
  Layout(const InvertedArgsOf<T>& args, bool by_panels, int64_t own_channels = 0);

 private:
  int64_t chosen_band(const InvertedArgsOf<T>& args) const;
};

// Pixels of up to a band as pointers, cut into tiles of nearly equal rows.
struct List {
  const void** from;
  void** to;
  const void** add;
  int64_t count;

  int64_t tiles() const { return (count + kMaxRows - 1) / kMaxRows; }
  int64_t start(int64_t tile) const { return tile == 0 ? 0 : count * tile / tiles(); }
};

// Open pixels of one output row that lie side by side.
struct Span {
  int32_t y, first, last;
  int64_t index;  // of the first pixel in the buffer behind the depthwise convolution
};

template <typename T>
struct Scratch {
  T* ring;
  T* buffer;  // behind the depthwise convolution
  List expand, project;
  Span* spans;
  float* means;  // sums of the rows in hand
  float* folded;
  const void** latents;  // of the pixels that are expanded

  // Without memory it counts `bytes` only. shared: the buffer, where all threads have one.
  Scratch(const InvertedArgsOf<T>& args, const Layout<T>& layout, void* base, T* shared, int64_t* bytes = nullptr);
};

// What all tiles of a 1x1 convolution's panel share.
template <typename T>
TileCall panel_call(const T* weight, const float* bias, int64_t depth, int64_t panel, int64_t channels) {
  TileCall call{};
  call.taps_count = 1;
  call.channels = depth;
  call.weight = weight + panel * panel_elements(kDtypeOf<T>, 1, depth);
  call.bias = bias + panel * kPanel;
  call.columns = static_cast<int>(std::min<int64_t>(kPanel, channels - panel * kPanel));
  return call;
}

// What comes into the cache for the next tile while one multiplies, where its rows lie anywhere.
enum class Fetch { kNothing, kInputs, kResults };

// The tiles [from, to). `step`: elements from one row to the next, where none are nearer.
void multiply(const List& list, int64_t from, int64_t to, int dtype, int64_t step, TileCall call, bool residual, Fetch fetch,
              Upcoming* upcoming);

// One image in the hands of one thread.
template <typename T>
class HiddenWalk {
 public:
  HiddenWalk(const InvertedArgsOf<T>& args, const Layout<T>& layout, const Scratch<T>& scratch, int64_t image)
      : args_(args), layout_(layout), scratch_(scratch), image_(image) {}

 protected:
  // Lists the open pixels of the output rows [first, last) in spans; false where there are none.
  bool find_spans(int64_t first, int64_t last);
  // Those rows of all hidden panels; of the whole image, but only the hidden panels [first, last).
  void hidden_band(int64_t first, int64_t last);
  void hidden_panels(int64_t first, int64_t last);

  // The expansion's weights for this image: of every panel a row of bias, then one for each channel.
  float* folded(int64_t panel) const { return scratch_.folded + panel * (args_.channels + 1) * kPanel; }
  void fold_panel(int64_t panel, int64_t place) const;

  const InvertedArgsOf<T>& args_;
  const Layout<T>& layout_;
  Scratch<T> scratch_;
  const int64_t image_;
  int64_t spans_ = 0;
  int64_t first_panel_ = 0;  // of the buffer behind the depthwise convolution

 private:
  void find_hidden(int64_t first, int64_t last);
  void find_latents() const;
  // `place`: where the panel lies in the ring.
  void expand_panel(int64_t panel, int64_t place) const;
  void expand_factored(int64_t panel, int64_t place) const;
  void depthwise_panel(int64_t panel, int64_t place, const Span& span) const;
  void depthwise_span(const Span& span) const;
  void add_span(const Span& span, const DepthwiseRun& run, float* sums) const;
  const float* factors() const { return args_.fusion.factors + image_ * args_.fusion.factors_stride; }

  int64_t ready_ = 0;  // hidden rows of this image before this one are in the ring or were given up
};

// Zeros on both sides of every ring row; the border behind a row is the one before the next.
template <typename T>
void clear_borders(const Layout<T>& layout, T* ring, int64_t width, int64_t panels);

using RowRange = std::pair<int64_t, int64_t>;

// Calls f(image, from, to) for every image that has some of the output rows `rows` of the batch: those from `from` to `to`.
template <typename T, typename F>
void each_image(const InvertedArgsOf<T>& args, RowRange rows, F&& f) {
  const int64_t height = args.out_height;
  for (int64_t image = rows.first / height; image * height < rows.second; ++image)
    f(image, std::max(rows.first - image * height, int64_t{0}), std::min(rows.second - image * height, height));
}

// Chunks of both forms: some output rows of the batch; or of image chunk / threads a share of its hidden panels, in two phases
// where there is a projection.
template <typename T>
void projected_rows(const InvertedArgsOf<T>& args, RowRange rows, void* scratch);
template <typename T>
void projected_panels(const InvertedArgsOf<T>& args, int phase, int64_t chunk, void* scratch);
template <typename T>
int64_t shared_sums_bytes(const InvertedArgsOf<T>& args);
void unprojected_rows(const InvertedArgs& args, RowRange rows, int64_t chunk, void* scratch);
void unprojected_panels(const InvertedArgs& args, int64_t chunk, void* scratch);
// The mean of an image whose rows several chunks share.
void join_means(const InvertedArgs& args, int64_t image);
int64_t shared_means_bytes(const InvertedArgs& args);

}  // namespace inverted
