#include "stages.h"

#include <algorithm>
#include <array>
#include <limits>

#include "../kernels/gemm.h"
#include "run.h"

namespace {

constexpr int64_t kLightBytes = 128 << 10;  // of the weights of a small step that goes along with its neighbours
constexpr double kWeightShare = 1.5;        // of the weights to the maps of one image; heavier steps take the whole batch, so that they
                                            // read their weights or experts once

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

std::array<int32_t, 7> values_of(const Step& step) {
  return {step.in, step.in2, step.out, step.aux[0], step.aux[1], step.aux[2], step.aux[3]};
}

int64_t map_bytes(const Value& v) { return int64_t{v.height} * v.width * v.stride * element_bytes(v.dtype); }

int64_t weight_bytes(const Plan& plan, const Step& step) {
  int64_t bytes = 0;
  for (const int32_t id : step.conv) {
    if (id < 0) continue;
    const Conv& conv = plan.convs[id];
    if (!conv.weight && !conv.winograd) continue;
    const int64_t panels = (conv.out_channels / conv.groups + kPanel - 1) / kPanel * conv.groups;
    const int64_t taps = conv.winograd ? 16 : int64_t{conv.kernel[0]} * conv.kernel[1];
    const bool single = conv.groups == conv.in_channels && conv.groups > 1;
    const int64_t experts = step.kind == kDynamicConv ? std::max(step.ints[0], 1) : 1;
    bytes += 4 * taps * experts * (single ? conv.out_channels : panels * kPanel * (conv.in_channels / conv.groups));
  }
  return bytes;
}

enum class Size { kLarge, kLight, kOther };

// What every step touches, and whether it is large.
class Survey {
 public:
  Survey(const Plan& plan, int64_t images) : plan_(plan), images_(images) { find_groups(); }

  Size size(int32_t i) const {
    const Step& step = plan_.steps[i];
    if (step.kind == kNarrow) return Size::kOther;
    const int64_t maps = bytes(i), weights = weight_bytes(plan_, step);
    if (maps * images_ > plan_.limits.batch && double(weights) <= kWeightShare * double(maps)) return Size::kLarge;
    return weights <= kLightBytes ? Size::kLight : Size::kOther;
  }

  // Of the maps of one image.
  int64_t bytes(int32_t i) const {
    const auto ids = values_of(plan_.steps[i]);
    int64_t sum = 0;
    for (auto id = ids.begin(); id != ids.end(); ++id)
      if (*id >= 0 && std::find(ids.begin(), id, *id) == id) sum += map_bytes(plan_.values[*id]);
    return sum;
  }

  // Moves the ends of a stage until every mask is decided and used inside of it, or outside.
  void keep_masks_whole(int32_t& first, int32_t& last) const {
    for (bool again = true; again && first < last;) {
      again = false;
      for (size_t g = 0; g < grid_first_.size(); ++g) {
        const int32_t from = grid_first_[g], to = grid_last_[g];
        if (from >= last || to < first || (from >= first && to < last)) continue;
        if (from < first) first = to + 1;
        else last = from;
        again = true;
      }
    }
  }

  // Fills `inside`; false when two maps that outlive their window share memory, which other orders of steps would mix up.
  bool place(Stage& stage) const {
    stage.inside.assign(plan_.values.size(), false);
    std::vector<int32_t> crossing;
    for (int32_t v = 0; v < static_cast<int32_t>(plan_.values.size()); ++v) {
      const int32_t group = group_of(v);
      const bool touched = last_[group] >= stage.first && first_[group] < stage.last;
      if (plan_.values[v].external >= 0 || !touched) continue;
      stage.inside[v] = first_[group] >= stage.first && last_[group] < stage.last;
      if (!stage.inside[v]) crossing.push_back(v);
    }
    for (const int32_t a : crossing)
      for (const int32_t b : crossing)
        if (group_of(a) != group_of(b) && overlap(plan_.values[a], plan_.values[b])) return false;
    return true;
  }

 private:
  static bool overlap(const Value& a, const Value& b) {
    return a.external < 0 && b.external < 0 && a.offset < b.offset + map_bytes(b) && b.offset < a.offset + map_bytes(a);
  }
  // Different channels of the same rows.
  static bool parts(const Value& a, const Value& b) {
    const bool rows = a.offset == b.offset && a.stride == b.stride && a.height == b.height && a.width == b.width;
    return a.external < 0 && b.external < 0 && rows && (a.first != b.first || a.channels != b.channels);
  }
  int32_t group_of(int32_t v) const {
    while (group_[v] != v) v = group_[v];
    return v;
  }

  // Values that replace each other in place, or are parts of the same rows, stay together; first_ and last_ are of their first.
  void find_groups() {
    const auto count = static_cast<int32_t>(plan_.values.size());
    group_.resize(count);
    for (int32_t v = 0; v < count; ++v) group_[v] = v;
    first_.assign(count, kNever);
    last_.assign(count, -1);
    grid_first_.assign(plan_.grids.size(), kNever);
    grid_last_.assign(plan_.grids.size(), -1);
    const auto steps = static_cast<int32_t>(plan_.steps.size());
    for (int32_t i = 0; i < steps; ++i) {
      const Step& step = plan_.steps[i];
      for (const int32_t g : {step.grid, step.grid2}) {
        if (g < 0) continue;
        grid_first_[g] = std::min(grid_first_[g], i);
        grid_last_[g] = i;
      }
      for (const int32_t id : {step.in, step.in2})
        if (id >= 0 && step.out >= 0 && id != step.out && overlap(plan_.values[id], plan_.values[step.out]))
          group_[group_of(id)] = group_of(step.out);
    }
    for (int32_t a = 0; a < count; ++a)
      for (int32_t b = 0; b < a; ++b)
        if (group_of(a) != group_of(b) && parts(plan_.values[a], plan_.values[b])) group_[group_of(a)] = group_of(b);
    for (int32_t i = 0; i < steps; ++i) {
      for (const int32_t id : values_of(plan_.steps[i])) {
        if (id < 0) continue;
        const int32_t group = group_of(id);
        first_[group] = std::min(first_[group], i);
        last_[group] = i;
      }
    }
  }

  const Plan& plan_;
  const int64_t images_;
  std::vector<int32_t> group_, first_, last_, grid_first_, grid_last_;
};

// Calls f(first, last) for all longest stretches of steps that go together.
template <typename Goes, typename F>
void each_stretch(const Plan& plan, Goes&& goes, F&& f) {
  const auto steps = static_cast<int32_t>(plan.steps.size());
  for (int32_t first = 0, last; first < steps; first = last + 1) {
    for (last = first; last < steps && goes(last);) ++last;
    if (first < last) f(first, last);
  }
}

// What channel fusions and the steps around them are made of, without masks.
bool may_be_own(const Step& step) {
  if (step.grid >= 0 || step.grid2 >= 0) return false;
  switch (step.kind) {
    case kStem: case kInverted: case kMean: case kRouter: case kFusionFactors: case kChannelFusion: return true;
    default: return false;
  }
}

}  // namespace

std::vector<Stage> stages_of(const Plan& plan, int64_t images) {
  std::vector<Stage> stages;
  if (images < 2) return stages;
  const Survey survey(plan, images);
  const auto goes = [&](int32_t i) { return survey.size(i) != Size::kOther; };
  each_stretch(plan, goes, [&](int32_t first, int32_t last) {
    while (first < last && survey.size(first) != Size::kLarge) ++first;
    while (first < last && survey.size(last - 1) != Size::kLarge) --last;
    survey.keep_masks_whole(first, last);
    int large = 0;
    int64_t most = 1;
    for (int32_t i = first; i < last; ++i) {
      large += survey.size(i) == Size::kLarge;
      most = std::max(most, survey.bytes(i));
    }
    Stage stage{first, last, std::max<int64_t>(1, plan.limits.window / most), {}};
    if (large >= plan.limits.steps && stage.images < images && survey.place(stage)) stages.push_back(std::move(stage));
  });
  return stages;
}

std::vector<Stage> own_stages_of(const Plan& plan, int64_t images) {
  std::vector<Stage> stages;
  if (images < 2) return stages;
  const Survey survey(plan, images);
  const auto goes = [&](int32_t i) { return may_be_own(plan.steps[i]); };
  each_stretch(plan, goes, [&](int32_t start, int32_t end) {
    int fusions = 0;
    for (int32_t i = start; i < end; ++i) fusions += plan.steps[i].kind == kChannelFusion;
    if (fusions < plan.limits.steps) return;
    // Windows only grow along the way: wherever their size changes, all threads meet.
    const auto fitting = [&](int32_t first) {
      int64_t most = images;
      for (int32_t i = first; i < end; ++i) most = std::min(most, std::max<int64_t>(1, plan.limits.window / survey.bytes(i)));
      return most;
    };
    for (int32_t first = start; first < end;) {
      Stage stage{first, first + 1, fitting(first), {}};
      while (stage.last < end && fitting(stage.last) == stage.images) ++stage.last;
      first = stage.last;
      if (survey.place(stage)) stages.push_back(std::move(stage));
    }
  });
  return stages;
}
