// The small network behind a mean: a router, or the two layers of squeeze and excite.
//
// Its layers are too small to be shared one by one: every thread computes the hidden layer for itself where that takes no
// longer than meeting the others would, and a part of the outputs. Up to kMaxRows images go together, so that weights are
// read once for them.

#include <algorithm>

#include "../kernels/gemm.h"
#include "../kernels/rowwise.h"
#include "fusion.h"

namespace {

constexpr double kOwnMacs = 64e3;  // of a hidden layer that every thread computes for itself
constexpr int64_t kAhead = 4096;   // bytes of weights from those in use to those that are fetched

int64_t panels_of(const Conv& conv) { return (conv.out_channels + kPanel - 1) / kPanel; }

int64_t panel_bytes(const Conv& conv) {
  return int64_t{conv.kernel[0]} * conv.kernel[1] * conv.in_channels * kPanel * int64_t{sizeof(float)};
}
int64_t blocks_of(const Conv& last, int threads) { return std::min<int64_t>(panels_of(last), int64_t{4} * threads); }

// All threads together compute the hidden layer.
bool is_shared(const Conv& squeeze, int64_t images, int threads) {
  const double macs = double(images) * squeeze.kernel[0] * squeeze.kernel[1] * squeeze.in_channels * squeeze.out_channels;
  return threads > 1 && panels_of(squeeze) > 1 && macs > kOwnMacs;
}

class Router {
 public:
  Router(Worker& worker, const Step& step)
      : worker_(worker), run_(worker.run), step_(step), in_(run_.value(step.in)), out_(run_.value(step.out)),
        squeeze_(run_.conv(step.conv[0])), last_(run_.conv(step.conv[2])), images_(run_.call.images),
        groups_((images_ + kMaxRows - 1) / kMaxRows), row_(panels_of(squeeze_) * kPanel),
        taps_(reinterpret_cast<const void**>(worker.scratch)),
        hidden_(reinterpret_cast<float*>(worker.scratch + taps_bytes(squeeze_))), gates_(hidden_ + kMaxRows * row_) {}

  static int64_t taps_bytes(const Conv& squeeze) {
    const int64_t taps = int64_t{squeeze.kernel[0]} * squeeze.kernel[1];
    return (taps * kMaxRows * int64_t{sizeof(void*)} + 63) / 64 * 64;
  }
  static int64_t scratch_bytes(const Conv& squeeze) {
    return taps_bytes(squeeze) + 2 * kMaxRows * panels_of(squeeze) * kPanel * int64_t{sizeof(float)};
  }

  void run() {
    shares_ = is_shared(squeeze_, images_, worker_.threads);
    if (shares_) {
      const int64_t panels = panels_of(squeeze_);
      worker_.deal(groups_ * panels, [&](int64_t task) {
        const int64_t group = task / panels;
        squeeze(group, task % panels, task % panels + 1, shared(group));
      });
      worker_.barrier();
    }
    const int64_t panels = panels_of(last_), blocks = blocks_of(last_, worker_.threads);
    worker_.deal(groups_ * blocks, [&](int64_t task) {
      const int64_t group = task / blocks, block = task % blocks;
      take_hidden(group);
      layer(last_, group, hidden_, panels * block / blocks, panels * (block + 1) / blocks, step_.activation[2],
            reinterpret_cast<float*>(run_.data(step_.out)) + group * kMaxRows * out_.stride, out_.stride);
    });
  }

 private:
  int rows(int64_t group) const { return static_cast<int>(std::min<int64_t>(kMaxRows, images_ - group * kMaxRows)); }
  float* shared(int64_t group) const { return reinterpret_cast<float*>(worker_.shared) + group * kMaxRows * row_; }

  // Columns beyond the outputs hold anything.
  void multiply(TileCall& call, const Conv& conv, int64_t group, int64_t first, int64_t last, float* to, int64_t step) const {
    const int64_t depth = call.taps_count * call.channels;
    void* outs[kMaxRows];
    for (int r = 0; r < rows(group); ++r) outs[r] = to + r * step;
    call.out = outs;
    call.ahead[0] = call.ahead[1] = kAhead;
    for (int64_t panel = first; panel < last; ++panel) {
      call.weight = static_cast<const float*>(conv.weight) + panel * depth * kPanel;
      call.bias = conv.bias + panel * kPanel;
      call.column = panel * kPanel;
      call.columns = static_cast<int>(std::min<int64_t>(kPanel, conv.out_channels - panel * kPanel));
      gemm_tile(kFloat32, rows(group), call.columns)(call);
    }
  }
  // The panels [first, last) of the hidden layer.
  void squeeze(int64_t group, int64_t first, int64_t last, float* to) const {
    const int64_t taps = int64_t{in_.height} * in_.width;
    const auto* from = reinterpret_cast<const float*>(run_.data(step_.in)) + group * kMaxRows * taps * in_.stride;
    for (int64_t r = 0; r < rows(group); ++r)
      for (int64_t t = 0; t < taps; ++t) taps_[t * kMaxRows + r] = from + (r * taps + t) * in_.stride;
    TileCall call{};
    call.taps = taps_;
    call.taps_count = static_cast<int>(taps);
    call.channels = squeeze_.in_channels;
    call.activation = step_.activation[0];
    multiply(call, squeeze_, group, first, last, to, row_);
  }
  void layer(const Conv& conv, int64_t group, const float* from, int64_t first, int64_t last, int activation, float* to,
             int64_t step) const {
    for (int r = 0; r < rows(group); ++r) taps_[r] = from + r * row_;
    TileCall call{};
    call.taps = taps_;
    call.taps_count = 1;
    call.channels = conv.in_channels;
    call.activation = activation;
    multiply(call, conv, group, first, last, to, step);
  }
  // The hidden layer of some images, times its gate.
  void take_hidden(int64_t group) {
    if (group == ready_) return;
    ready_ = group;
    const int64_t width = squeeze_.out_channels;
    if (shares_)
      for (int r = 0; r < rows(group); ++r) std::copy_n(shared(group) + r * row_, width, hidden_ + r * row_);
    else squeeze(group, 0, panels_of(squeeze_), hidden_);
    if (step_.conv[1] < 0) return;
    const Conv& gate = run_.conv(step_.conv[1]);
    layer(gate, group, hidden_, 0, panels_of(gate), step_.activation[1], gates_, row_);
    for (int r = 0; r < rows(group); ++r)
      row_kernels(kFloat32).pair(Pairing::kMultiply, hidden_ + r * row_, gates_ + r * row_, false, width, kNone,
                                 hidden_ + r * row_);
  }

  Worker& worker_;
  const Run& run_;
  const Step& step_;
  const Value &in_, &out_;
  const Conv &squeeze_, &last_;
  const int64_t images_, groups_, row_;
  const void** const taps_;
  float *const hidden_, *const gates_;
  int64_t ready_ = -1;  // whose hidden layer is there
  bool shares_ = false;
};

}  // namespace

int64_t scratch_router(const Plan& plan, const Step& step) { return Router::scratch_bytes(plan.convs[step.conv[0]]); }

int64_t shared_router(const Plan& plan, const Step& step, int64_t images) {
  const int64_t rows = (images + kMaxRows - 1) / kMaxRows * kMaxRows;
  return rows * panels_of(plan.convs[step.conv[0]]) * kPanel * int64_t{sizeof(float)};
}

namespace {

// The panels [first, last) of a layer.
void foresee(Upcoming& upcoming, const Conv& conv, int64_t first, int64_t last) {
  upcoming.add(static_cast<const char*>(conv.weight) + first * panel_bytes(conv), (last - first) * panel_bytes(conv));
}

bool is_light(int kind) {
  return kind == kMean || kind == kDepthwise || kind == kMultiply || kind == kActivate || kind == kFusionFactors;
}

// What every thread reads of a gate.
void foresee_gate(Upcoming& upcoming, const Region& panel) { upcoming.add(panel.data(), panel.bytes()); }

// What a thread reads of a router.
void foresee_router(Upcoming& upcoming, const Run& run, const Step& step, int id, int threads) {
  const Conv &squeeze = run.conv(step.conv[0]), &last = run.conv(step.conv[2]);
  const int64_t hidden = panels_of(squeeze), panels = panels_of(last), blocks = blocks_of(last, threads);
  const bool shared = is_shared(squeeze, run.call.images, threads);
  foresee(upcoming, squeeze, shared ? hidden * id / threads : 0, shared ? hidden * (id + 1) / threads : hidden);
  if (step.conv[1] >= 0) foresee(upcoming, run.conv(step.conv[1]), 0, panels_of(run.conv(step.conv[1])));
  foresee(upcoming, last, panels * (blocks * id / threads) / blocks, panels * (blocks * (id + 1) / threads) / blocks);
}

bool folds(const Step& step) { return step.kind == kInverted ? step.ints[0] == 1 : step.kind == kChannelFusion && !step.ints[3]; }

// What little is multiplied with: Q before Phi is applied, and P where kernels are folded.
void foresee_low_rank(Upcoming& upcoming, const Run& run, const Step& step, int id, int threads) {
  if (step.kind == kFusionFactors || step.kind == kChannelFusion) {
    const Conv& reduce = run.conv(step.conv[1]);
    const bool fused = step.kind == kChannelFusion, by_row = fused ? folds(step) : step.in < 0;
    const bool cut = fused && cut_by_channels(run.plan, step, run.call.images, threads);
    const int64_t rows = reduce.in_channels, row = reduce.out_channels;
    const int64_t first = cut ? first_channel(rows, id, threads) : 0, last = cut ? first_channel(rows, id + 1, threads) : rows;
    if (by_row) upcoming.add(static_cast<const float*>(reduce.weight) + first * row, (last - first) * row * int64_t{sizeof(float)});
    else if (!fused || run.rows(step.out) <= kMaxRows) foresee(upcoming, reduce, 0, panels_of(reduce));
  }
  if (!folds(step)) return;
  const Conv& expand = run.conv(step.conv[2]);
  const int64_t panels = panels_of(expand);
  const bool shared = step.kind == kInverted;
  foresee(upcoming, expand, shared ? panels * id / threads : 0, shared ? panels * (id + 1) / threads : panels);
}

// Static 1x1 weights that a thread begins to fold for a few images: too few products lie between them to wait for memory.
void foresee_folded(Upcoming& upcoming, const Run& run, const Step& step, int id, int threads) {
  if (!folds(step)) return;
  const Conv& conv = run.conv(step.conv[0]);
  if (conv.kernel[0] * conv.kernel[1] != 1) return;
  if (step.kind == kChannelFusion && cut_by_channels(run.plan, step, run.call.images, threads)) {
    const int64_t from = first_channel(conv.in_channels, id, threads), to = first_channel(conv.in_channels, id + 1, threads);
    for (int64_t panel = 0; panel < panels_of(conv); ++panel)
      upcoming.add(static_cast<const float*>(conv.weight) + (panel * conv.in_channels + from) * kPanel,
                   (to - from) * kPanel * int64_t{sizeof(float)});
    return;
  }
  const int64_t rows = panels_of(conv) * conv.in_channels;
  const int64_t first = rows * id / threads, last = rows * (id + 1) / threads;
  upcoming.add(static_cast<const float*>(conv.weight) + first * kPanel, (last - first) * kPanel * int64_t{sizeof(float)});
}

void foresee_fusion(Upcoming& upcoming, const Run& run, const Step& step, int id, int threads) {
  foresee_low_rank(upcoming, run, step, id, threads);
  foresee_folded(upcoming, run, step, id, threads);
}

}  // namespace

Upcoming upcoming_weights(const Run& run, int32_t index, int id, int threads) {
  Upcoming upcoming;
  bool routed = false;
  for (int32_t i = index + 1; i < run.last; ++i) {
    const Step& step = run.plan.steps[i];
    if (step.kind == kRouter && routed) break;
    if (step.kind == kRouter) foresee_router(upcoming, run, step, id, threads);
    else if (routed && run.call.images < 2 * threads) foresee_fusion(upcoming, run, step, id, threads);
    else if (step.kind == kGate) foresee_gate(upcoming, run.plan.gate_panels[i]);
    routed = routed || step.kind == kRouter;
    if (step.kind != kRouter && !is_light(step.kind)) break;
  }
  return upcoming;
}

void step_router(Worker& worker, const Step& step) { Router(worker, step).run(); }
