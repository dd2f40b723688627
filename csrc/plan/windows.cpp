#include "windows.h"

#include <algorithm>
#include <utility>

namespace {

// The masks of some images of the batch.
Context window_of(const Plan& plan, const Context& batch, int64_t first, int64_t images) {
  Context window{first, images, batch.grids};
  for (size_t g = 0; g < plan.grids.size(); ++g) {
    const Grid& grid = plan.grids[g];
    const int64_t before = first * grid.height * grid.width;
    GridState& state = window.grids[g];
    state.need += before;
    if (state.open) state.open += before;
    if (state.closed) state.closed += before;
    if (state.tiles) state.tiles += first * ((grid.height + 1) / 2) * ((grid.width + 1) / 2);
    state.image_counts += first;
    state.tile_counts += first;
  }
  return window;
}

// Stages that a call holds whole go in windows, everything else for the whole batch.
class Runs {
 public:
  Runs(const Plan& plan, Arena& arena, const Call& call, Barrier& barrier, std::atomic<int32_t>& spoilt)
      : plan_(plan), arena_(arena), call_(call), barrier_(barrier), spoilt_(spoilt) {}

  std::vector<Run> all() {
    arena_.own_windows.clear();
    own_ = deals_evenly(call_.images, call_.threads);
    int32_t at = call_.first;
    for (const Stage* stage; (stage = next(at)); at = stage->last) {
      if (at < stage->first) add(arena_.batch, nullptr, at, stage->first);
      if (is_own(*stage)) add_own(*stage);
      else
        for (Context& window : arena_.windows[stage - arena_.stages.data()]) add(window, stage, stage->first, stage->last);
    }
    if (at < call_.last) add(arena_.batch, nullptr, at, call_.last);
    return std::move(runs_);
  }

 private:
  bool is_own(const Stage& stage) const {
    const auto& own = arena_.own_stages;
    return !own.empty() && &stage >= &own.front() && &stage <= &own.back();
  }
  // The stage that begins first from `at` on.
  const Stage* next(int32_t at) const {
    const Stage* found = nullptr;
    const auto look = [&](const Stage& stage) {
      if (stage.first >= at && stage.last <= call_.last && (!found || stage.first < found->first)) found = &stage;
    };
    for (const Stage& stage : arena_.own_stages)
      if (own_) look(stage);
    for (const Stage& stage : arena_.stages)
      if (!own_ || !meets_own(stage)) look(stage);
    return found;
  }
  bool meets_own(const Stage& stage) const {
    for (const Stage& own : arena_.own_stages)
      if (own.first < stage.last && stage.first < own.last) return true;
    return false;
  }
  Run& add(Context& context, const Stage* stage, int32_t first, int32_t last) {
    Call own = call_;
    own.images = context.images;
    runs_.push_back(Run{plan_, context, own, barrier_, spoilt_, nullptr, arena_, stage, first, last, false, arena_.window.data()});
    return runs_.back();
  }
  // Every thread's images in windows of equal size.
  void add_own(const Stage& stage) {
    const int64_t share = call_.images / call_.threads, windows = call_.threads * ((share + stage.images - 1) / stage.images);
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t first = call_.images * w / windows, last = call_.images * (w + 1) / windows;
      arena_.own_windows.push_back({first, last - first, {}});
      add(arena_.own_windows.back(), &stage, stage.first, stage.last).own = true;
    }
  }

  const Plan& plan_;
  Arena& arena_;
  const Call& call_;
  Barrier& barrier_;
  std::atomic<int32_t>& spoilt_;
  bool own_ = false;
  std::vector<Run> runs_;
};

}  // namespace

std::vector<Context> windows_of(const Plan& plan, const Context& batch, const Stage& stage, int64_t images) {
  std::vector<Context> windows;
  for (int64_t first = 0; first < images; first += stage.images)
    windows.push_back(window_of(plan, batch, first, std::min(stage.images, images - first)));
  return windows;
}

std::vector<Run> runs_of(const Plan& plan, Arena& arena, const Call& call, Barrier& barrier, std::atomic<int32_t>& spoilt) {
  return Runs(plan, arena, call, barrier, spoilt).all();
}

int64_t most_own_images(const Arena& arena, int64_t images, int threads) {
  int64_t most = 0;
  if (deals_evenly(images, threads))
    for (const Stage& stage : arena.own_stages) most = std::max(most, std::min(stage.images, images / threads));
  return most;
}

void count_open(const std::vector<Run>& runs, Arena& arena, const Call& call) {
  for (const Run& run : runs) {
    if (!run.stage) continue;
    for (int32_t i = run.first; i < run.last; ++i) {
      const Step& step = run.plan.steps[i];
      const int32_t grid = step.kind == kThreshold ? step.grid : step.kind == kDilate ? step.grid2 : -1;
      if (grid < 0) continue;
      int64_t& open = arena.batch.grids[grid].open_count;
      open = (run.context.first ? open : 0) + run.context.grids[grid].open_count;
    }
  }
  for (size_t g = 0; call.open_rows && g < arena.batch.grids.size(); ++g) call.open_rows[g] = arena.batch.grids[g].open_count;
}
