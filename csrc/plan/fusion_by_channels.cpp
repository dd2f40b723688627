// A 1x1 channel fusion of few images and positions, cut by its input channels.
//
// The step before is cut by channels, too, so that every thread finds in its own cache what it multiplies, and folds the
// weights of its channels only. What the channels of a thread give to all outputs then changes hands, and not the larger input.

#include "../kernels/pixel_sums.h"
#include "fusion.h"
#include "slices.h"

namespace {

constexpr int64_t kMostPositions = 256;
constexpr int64_t kAhead = 8;          // positions from those that are joined to those that are fetched
constexpr int64_t kFewChannels = 256;  // that are folded by every thread for itself (see steps_fusion.cpp)

int64_t panels_of(int64_t channels) { return ceil_of(channels, kPanel); }

// Floats of the sums of one position: the outputs, then what Q makes of it.
int64_t row_floats(const Fusion& fusion) {
  return (panels_of(fusion.conv.out_channels) + (fusion.folded ? 0 : fusion.rank_panels)) * kPanel;
}

// Where things lie in a thread's scratch.
struct Scratch {
  const void** from;
  void** to;
  float *fold, *weights;                    // folded
  float *matrix, *reduced, *latent, *added;  // factored: of up to kMaxRows positions

  Scratch(char* base, const Fusion& fusion, int64_t* bytes = nullptr) {
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* const here = base + at;
      at += ceil_of(size, 64) * 64;
      return here;
    };
    from = reinterpret_cast<const void**>(take(kMostPositions * int64_t{sizeof(void*)}));
    to = reinterpret_cast<void**>(take(kMostPositions * int64_t{sizeof(void*)}));
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * int64_t{sizeof(float)})); };
    const int64_t latents = kMaxRows * fusion.rank_panels * kPanel;
    fold = floats(fusion.folded ? ImageFold::floats(fusion) : 0);
    weights = floats(fusion.folded ? fusion.channels * kPanel : 0);
    matrix = floats(fusion.folded ? 0 : matrix_floats(fusion.rank));
    reduced = floats(fusion.folded ? 0 : latents);
    latent = floats(fusion.folded ? 0 : latents);
    added = floats(fusion.folded ? 0 : kMaxRows * fusion.outputs);
    if (bytes) *bytes = at;
  }
};

class ByChannels {
 public:
  ByChannels(Worker& worker, const Step& step, const Fusion& fusion)
      : worker_(worker), run_(worker.run), step_(step), fusion_(fusion), in_(run_.value(step.in)), out_(run_.value(step.out)),
        threads_(worker.threads), slices_(reads_slices(run_, worker.step, worker.threads)), positions_(int64_t{out_.height} * out_.width), row_(row_floats(fusion)), scratch_(worker.scratch, fusion),
        common_(reinterpret_cast<float*>(worker.shared)), sums_(common_ + run_.call.images * fusion.outputs) {}

  void run() const {
    const int64_t tasks = run_.call.images * threads_;
    worker_.deal(tasks, [&](int64_t task) { part(task / threads_, task % threads_); });
    worker_.barrier();
    worker_.deal(tasks, [&](int64_t task) {
      const int64_t image = task / threads_, share = task % threads_;
      const int64_t first = positions_ * share / threads_, last = positions_ * (share + 1) / threads_;
      if (fusion_.folded) join(image, first, last, nullptr);
      else join_factored(image, first, last);
    });
  }

 private:
  // Of an image: its bias where it is folded, else its scale.
  float* common(int64_t image) const { return common_ + image * fusion_.outputs; }
  float* sums(int64_t image, int64_t share) const { return sums_ + (image * threads_ + share) * positions_ * row_; }

  // What the channels of `share` give to all outputs.
  void part(int64_t image, int64_t share) const {
    const int64_t first = first_channel(fusion_.channels, share, threads_);
    const int64_t depth = first_channel(fusion_.channels, share + 1, threads_) - first;
    const int64_t stride = slices_ ? depth : in_.stride;
    const auto* from = reinterpret_cast<const float*>(run_.data(step_.in)) + image * positions_ * in_.stride;
    from += slices_ ? first * positions_ : first;
    for (int64_t i = 0; i < positions_; ++i) {
      scratch_.from[i] = from + i * stride;
      scratch_.to[i] = sums(image, share) + i * row_;
    }
    if (fusion_.folded) fold_part(image, share, first, depth);
    else factored_part(image, share, first, depth);
  }

  void fold_part(int64_t image, int64_t share, int64_t first, int64_t depth) const {
    ImageFold fold(run_, step_, fusion_, scratch_.fold);
    fold.take(image);
    for (int64_t panel = 0; panel < panels_of(fusion_.conv.out_channels); ++panel) {
      if (share == 0) fold.bias(panel, common(image) + panel * kPanel);
      fold.weights(panel, first, depth, scratch_.weights);
      multiply(scratch_.weights, depth, panel * kPanel, fusion_.conv.out_channels - panel * kPanel, false);
    }
  }

  void factored_part(int64_t image, int64_t share, int64_t first, int64_t depth) const {
    if (share == 0)
      take_scale(step_, Coefficients(run_, step_, fusion_, image).scale, fusion_.conv.out_channels, fusion_.outputs, common(image));
    const int64_t outputs = panels_of(fusion_.conv.out_channels);
    const bool heavy = outputs * depth * kPanel * 4 > kFetchBytes;
    const auto weight = [&](const Conv& conv, int64_t panel) {
      return static_cast<const float*>(conv.weight) + (panel * fusion_.channels + first) * kPanel;
    };
    for (int64_t panel = 0; panel < outputs; ++panel)
      multiply(weight(fusion_.conv, panel), depth, panel * kPanel, fusion_.conv.out_channels - panel * kPanel, heavy);
    for (int64_t panel = 0; panel < fusion_.rank_panels; ++panel)
      multiply(weight(fusion_.reduce, panel), depth, (outputs + panel) * kPanel, fusion_.rank - panel * kPanel, false);
  }

  void multiply(const float* weight, int64_t depth, int64_t column, int64_t columns, bool heavy) const {
    TileCall call{};
    call.taps_count = 1;
    call.channels = depth;
    call.weight = weight;
    call.bias = kNoBias;
    call.column = column;
    call.columns = static_cast<int>(std::min<int64_t>(kPanel, columns));
    call.row_step = slices_ ? depth : in_.stride;
    const int64_t tiles = ceil_of(positions_, kMaxRows);
    for (int64_t tile = 0; tile < tiles; tile += call.more + 1) {
      // All that are left at once, where every tile is like the one before.
      if (!heavy && positions_ % tiles == 0 && worker_.upcoming.empty()) call.more = static_cast<int>(tiles - tile) - 1;
      const int64_t start = positions_ * tile / tiles, end = positions_ * (tile + 1) / tiles;
      call.taps = scratch_.from + start;
      call.out = scratch_.to + start;
      worker_.upcoming.give(call, sizeof(float));
      if (heavy) fetch_ahead(call, tile, tiles, fusion_.channels * kPanel * 4);
      gemm_tile(kFloat32, static_cast<int>(end - start), call.columns)(call);
    }
  }

  // The positions [first, last); `added`: rows of what the low-rank part gives to them.
  void join(int64_t image, int64_t first, int64_t last, const float* added) const {
    Join join{};
    join.part = positions_ * row_;
    join.parts = threads_;
    join.bias = added ? fusion_.conv.bias : common(image);
    join.scale = added ? common(image) : nullptr;
    join.channels = fusion_.conv.out_channels;
    join.activation = step_.activation[0];
    join.final_activation = step_.final_activation;
    auto* const out = reinterpret_cast<float*>(run_.data(step_.out)) + image * positions_ * out_.stride;
    const float* residual = nullptr;
    int64_t step = 0;
    if (step_.in2 >= 0) {
      step = run_.value(step_.in2).stride;
      residual = reinterpret_cast<const float*>(run_.data(step_.in2)) + image * positions_ * step;
    }
    for (int64_t i = first; i < last; ++i) {
      join.sums = sums(image, 0) + i * row_;
      // Another core has written most of it.
      for (int64_t p = 0; p < threads_; ++p)
        for (int64_t c = 0; c < row_; c += 16) __builtin_prefetch(join.sums + p * join.part + kAhead * row_ + c);
      join.add = added ? added + (i - first) * fusion_.outputs : nullptr;
      join_pixel(join, residual ? residual + i * step : nullptr, out + i * out_.stride);
    }
  }

  void join_factored(int64_t image, int64_t first, int64_t last) const {
    take_panels(Coefficients(run_, step_, fusion_, image).matrix, fusion_.rank, scratch_.matrix);
    const int64_t rank = fusion_.rank, latent_row = fusion_.rank_panels * kPanel, outputs = panels_of(fusion_.conv.out_channels);
    Join reduced{};
    reduced.part = positions_ * row_;
    reduced.parts = threads_;
    reduced.bias = fusion_.reduce.bias;
    reduced.channels = fusion_.rank;
    for (; first < last; first += kMaxRows) {
      const int count = static_cast<int>(std::min<int64_t>(kMaxRows, last - first));
      for (int r = 0; r < count; ++r) {
        reduced.sums = sums(image, 0) + (first + r) * row_ + outputs * kPanel;
        join_pixel(reduced, nullptr, scratch_.reduced + r * latent_row);
      }
      RowsTimesPanels{scratch_.reduced, count, latent_row, rank, scratch_.matrix, rank, scratch_.latent, latent_row}.multiply();
      RowsTimesPanels{scratch_.latent, count, latent_row, rank, static_cast<const float*>(fusion_.expand.weight), outputs * kPanel,
                      scratch_.added, fusion_.outputs, fusion_.expand.bias}.multiply();
      join(image, first, first + count, scratch_.added);
    }
  }

  Worker& worker_;
  const Run& run_;
  const Step& step_;
  const Fusion& fusion_;
  const Value &in_, &out_;
  const int64_t threads_;
  const bool slices_;
  const int64_t positions_, row_;
  const Scratch scratch_;
  float *const common_, *const sums_;
};

// Whatever the number of images and threads.
bool may_be_cut(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  const Value &in = plan.values[step.in], &out = plan.values[step.out];
  const int64_t positions = int64_t{out.height} * out.width;
  const bool pointwise = conv.kernel[0] == 1 && conv.kernel[1] == 1 && in.height == out.height && in.width == out.width &&
                         conv.padding[0] == 0 && conv.padding[1] == 0;
  if (!pointwise || conv.groups != 1 || positions < kMaxRows || positions > kMostPositions) return false;
  if (conv.out_channels >= conv.in_channels) return false;
  return step.ints[3] != 0 || (Fusion(plan, step).matrix_first && conv.in_channels >= kFewChannels);
}

}  // namespace

bool cut_by_channels(const Plan& plan, const Step& step, int64_t images, int threads) {
  if (threads < 2 || images >= 2 * threads || !may_be_cut(plan, step)) return false;
  const int64_t panels = panels_of(plan.convs[step.conv[0]].in_channels);
  return panels >= 2 * threads && (panels % threads == 0 || panels >= 8 * threads);
}

void fusion_by_channels(Worker& worker, const Step& step, const Fusion& fusion) { ByChannels(worker, step, fusion).run(); }

int64_t scratch_by_channels(const Plan& plan, const Step& step) {
  if (!may_be_cut(plan, step)) return 0;
  int64_t bytes = 0;
  Scratch(nullptr, Fusion(plan, step), &bytes);
  return bytes;
}

int64_t shared_by_channels(const Plan& plan, const Step& step, int64_t images, int threads) {
  if (!cut_by_channels(plan, step, images, threads)) return 0;
  const Fusion fusion(plan, step);
  const Value& out = plan.values[step.out];
  return images * (fusion.outputs + threads * int64_t{out.height} * out.width * row_floats(fusion)) * 4 + kSlack;
}
