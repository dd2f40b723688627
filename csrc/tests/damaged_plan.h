// A plan in which some numbers are wrong, with weights and tensors that are exactly as large as what it says now.

#pragma once

#include <algorithm>
#include <climits>
#include <cstddef>
#include <memory>
#include <vector>

#include "plan_builder.h"
#include "random_source.h"

class DamagedPlan {
 public:
  PlanData data{};

  DamagedPlan(Source& source, const PlanBuilder& valid, std::vector<int32_t> planes)
      : values_(valid.values), convs_(valid.convs), grids_(valid.grids), steps_(valid.steps), planes_(std::move(planes)) {
    data.abi = kPlanAbi, data.value_count = count(values_), data.conv_count = count(convs_), data.grid_count = count(grids_);
    data.step_count = count(steps_), data.external_count = valid.externals, data.arena_bytes = valid.arena;
    if (source.chance(25)) halve();
    const int times = source.below(4);
    for (int i = 0; i < times; ++i) damage(source);
    give_weights(source);
    data.values = values_.data(), data.convs = convs_.data(), data.grids = grids_.data(), data.steps = steps_.data();
    if (source.chance(1)) data.steps = nullptr;
    if (source.chance(1)) data.values = nullptr;
  }

  // Some calls, most of them sensible. Plans that would take long or much memory are left alone.
  void run(Source& source, void* plan) {
    const int64_t most = dynaconv_plan_most_images(plan);
    for (const int64_t images : {int64_t{0}, int64_t{-1}, most + 1, int64_t{INT64_MAX}})
      if (void* context = dynaconv_plan_acquire(plan, images)) dynaconv_plan_release(plan, context), std::abort();
    if (!runnable_ || cost() > 3e7 || data.arena_bytes > (64 << 20)) return;
    const int64_t images = 1 + source.below(3);
    void* context = dynaconv_plan_acquire(plan, images);
    if (!context) return;
    for (int i = 0; i < 2; ++i) call(source, plan, context, images);
    dynaconv_plan_release(plan, context);
  }

 private:
  template <typename T>
  static int32_t count(const std::vector<T>& table) {
    return static_cast<int32_t>(table.size());
  }

  void number(Source& source, int32_t& field) {
    const int32_t old = field;
    switch (source.below(6)) {
      case 0: field = source.pick({-2, -1, 0, 1, 2, 3, 16, 31, 32, 33, 4096, 32767, 32768, INT_MAX, INT_MIN, INT_MAX - 1}); break;
      case 1: field = old == INT_MAX ? 0 : old + 1; break;
      case 2: field = old == INT_MIN ? 0 : old - 1; break;
      case 3: field = static_cast<int32_t>(static_cast<uint32_t>(old) ^ 1u << source.below(32)); break;
      case 4: field = source.below(8); break;
      default: field = static_cast<int32_t>(static_cast<uint32_t>(old) * 2); break;
    }
  }
  // Any 32 bits of a structure from `first` on.
  template <typename T>
  void some_number(Source& source, std::vector<T>& table, size_t first = 0) {
    if (table.empty()) return;
    char* entry = reinterpret_cast<char*>(&table[source.below(count(table))]);
    const size_t at = first + 4 * source.below(static_cast<int64_t>((sizeof(T) - first) / 4));
    int32_t field;
    std::memcpy(&field, entry + at, 4);
    number(source, field);
    std::memcpy(entry + at, &field, 4);
  }

  // bfloat16 wherever no step insists on float32. What such a plan computes is another test's concern.
  void halve() {
    std::vector<bool> single(values_.size());
    const auto keep = [&single](int32_t id) {
      if (id >= 0) single[id] = true;
    };
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      const bool alone = step->kind == kInverted && (step->conv[2] < 0 || step->ints[0]);
      const bool affine = step->kind == kActivate && step->ints[0] == 1;
      if (step->kind == kNarrow) keep(step->in2);
      const bool mixes = step->kind == kDynamicConv || step->kind == kSoftmax || step->kind == kFusionFactors || step->kind == kChannelFusion || step->kind == kRouter || step->kind == kNarrow || affine || alone, gates = step->kind == kGate;
      if (mixes || step->kind == kThreshold || (step->kind == kAvgPool && single[step->out])) keep(step->in);
      if (mixes || gates || step->kind == kMaskValue) keep(step->out);
      for (const int32_t id : step->aux) keep(id);
    }
    for (size_t i = 0; i < values_.size(); ++i)
      if (values_[i].external < 0 && !single[i]) values_[i].dtype = kBfloat16;
  }

  void damage(Source& source) {
    switch (source.below(10)) {
      case 0: case 1: some_number(source, values_); break;
      case 2: case 3: some_number(source, convs_, offsetof(Conv, in_channels)); break;
      case 4: some_number(source, grids_); break;
      case 5: case 6: case 7: some_number(source, steps_); break;
      case 8: order(source); break;
      default: header(source); break;
    }
  }
  void order(Source& source) {
    if (steps_.empty()) return;
    const int32_t a = source.below(count(steps_)), b = source.below(count(steps_));
    switch (source.below(3)) {
      case 0: std::swap(steps_[a], steps_[b]); break;
      case 1: steps_[a] = steps_[b]; break;
      default: steps_.erase(steps_.begin() + a), data.step_count = count(steps_);
    }
  }
  // Counts may only shrink: that a table is shorter than its count cannot be seen.
  void header(Source& source) {
    const auto less = [&source](int32_t& field) { field = source.chance(30) ? -1 - source.below(3) : source.below(std::max(field, 0) + int64_t{1}); };
    switch (source.below(8)) {
      case 0: number(source, data.abi); break;
      case 1: less(data.value_count); break;
      case 2: less(data.conv_count); break;
      case 3: less(data.grid_count); break;
      case 4: less(data.step_count); break;
      case 5: less(data.external_count); break;
      case 6: data.arena_bytes = source.pick({int64_t{-1}, int64_t{0}, int64_t{64}, INT64_MAX, INT64_MIN, data.arena_bytes / 2}); break;
      default:
        if (!convs_.empty()) {
          Conv& c = convs_[source.below(count(convs_))];
          switch (source.below(3)) {
            case 0: c.weight = nullptr; break;
            case 1: c.bias = nullptr; break;
            default: c.winograd = c.winograd ? nullptr : c.bias; break;
          }
        }
    }
  }

  // Floats (or pairs of bfloat16) that the kernels may read of each convolution.
  struct Need {
    double weight = 0, bias = 0, winograd = 0;
    void cover(double w, double b, double u = 0) {
      weight = std::max(weight, w), bias = std::max(bias, b), winograd = std::max(winograd, u);
    }
  };
  static double up(double a, double b) { return std::ceil(a / b) * b; }
  bool good(int32_t id) const { return id >= 0 && id < count(convs_); }
  bool half(int32_t id) const { return id >= 0 && id < count(values_) && values_[id].dtype == kBfloat16; }

  void panels(Need& need, const Conv& c, bool bfloat16, double experts) const {
    if (c.groups < 1) return;
    const double per = c.in_channels / c.groups, outs = up(c.out_channels / c.groups, 32) * c.groups;
    const double taps = double(c.kernel[0]) * c.kernel[1];
    if (experts > 0 && c.groups > 1 && c.groups == c.in_channels && c.groups == c.out_channels)
      return need.cover(up(c.groups, 32) * taps * experts, up(c.groups, 32));
    need.cover(outs * taps * (bfloat16 ? up(per, 2) / 2 : per) * std::max(1.0, experts), outs, outs * 16 * per);
  }
  static void columns(Need& need, const Conv& c, bool bfloat16) {
    const double taps = double(c.kernel[0]) * c.kernel[1], pairs = up(c.kernel[0], 2) * up(c.kernel[1], 2) / 2;
    if (bfloat16) need.cover(up(c.out_channels, 32) * pairs, up(c.out_channels, 32));
    else need.cover(taps * c.out_channels, c.out_channels);
  }
  void of_step(std::vector<Need>& needs, const Step& s) const {
    const bool bfloat16 = half(s.in) || (s.kind == kStem && half(s.out));
    const int32_t kind = s.kind == kNarrow ? s.ints[0] : s.kind;
    for (int i = 0; i < 3; ++i) {
      if (!good(s.conv[i])) continue;
      const Conv& c = convs_[s.conv[i]];
      Need& need = needs[s.conv[i]];
      const double taps = double(c.kernel[0]) * c.kernel[1];
      if (kind == kDynamicConv && i == 1 && good(s.conv[0])) {
        const Conv& of = convs_[s.conv[0]];
        if (of.groups > 0) need.cover((up(double(of.out_channels) / of.groups, 32) * of.groups) * std::max(1, s.ints[0]), 0);
      } else if (kind == kDynamicConv) panels(need, c, false, s.ints[0]);
      else if (kind == kFusionFactors && i == 1 && s.in < 0) need.cover(double(c.in_channels) * c.out_channels, c.out_channels);
      else if (kind == kChannelFusion && i == 1 && !s.ints[3]) need.cover(double(c.in_channels) * c.out_channels, c.out_channels);
      else if (kind == kChannelFusion && i == 2 && good(s.conv[0]) && convs_[s.conv[0]].groups > 0) {
        // The panels of P follow the groups of the outputs.
        const double groups = convs_[s.conv[0]].groups, outs = up(std::floor(c.out_channels / groups), 32) * groups;
        need.cover(outs * c.in_channels, outs);
      } else if (kind == kChannelFusion) panels(need, c, false, i == 0 && !s.ints[3]);
      else if (kind == kGate) need.cover((taps + 1) * c.in_channels, 1 + (s.ints[1] ? taps : 0));
      else if (kind == kLayerNorm) need.cover(c.in_channels, c.in_channels);
      else if (kind == kActivate) need.cover(0, c.in_channels);
      else if (kind == kResample) need.cover(2.0 * c.out_channels, 0);
      else if (kind == kDepthwise || (kind == kInverted && i == 1)) columns(need, c, bfloat16);
      else if (kind == kStem && bfloat16) need.cover(up(c.out_channels, 32) * c.kernel[0] * up(double(c.kernel[1]) * c.in_channels, 2) / 2, up(c.out_channels, 32));
      else if (kind == kConv || kind == kStem || kind == kInverted || kind == kRouter || kind == kFusionFactors) panels(need, c, bfloat16, 0);
    }
  }
  const float* memory(Source& source, double floats) {
    if (!(floats <= (4 << 20))) {
      runnable_ = false;
      floats = 0;
    }
    const auto size = static_cast<size_t>(std::max(0.0, floats));
    memory_.push_back(std::make_unique<float[]>(size));
    std::fill_n(memory_.back().get(), size, static_cast<float>(source.below(9) - 4) / 16);
    return memory_.back().get();
  }
  void give_weights(Source& source) {
    std::vector<Need> needs(convs_.size());
    for (const Step& s : steps_) of_step(needs, s);
    for (size_t i = 0; i < convs_.size(); ++i) {
      if (convs_[i].weight) convs_[i].weight = memory(source, needs[i].weight);
      if (convs_[i].bias) convs_[i].bias = memory(source, needs[i].bias);
      if (convs_[i].winograd) convs_[i].winograd = memory(source, needs[i].winograd);
    }
  }

  double cost() const {
    double sum = 0;
    for (int32_t i = 0; i < data.step_count; ++i) {
      const Step& s = steps_[i];
      for (const int32_t id : {s.in, s.in2, s.out}) {
        if (id < 0) continue;
        double each = values_[id].stride;
        for (const int32_t c : s.conv)
          if (c >= 0)
            each += double(convs_[c].kernel[0]) * convs_[c].kernel[1] *
                    std::max(1.0, double(convs_[c].in_channels) * convs_[c].out_channels / std::max(1, convs_[c].groups)) *
                    std::max(1, s.kind == kDynamicConv ? s.ints[0] : 1);
        sum += each * values_[id].height * values_[id].width;
      }
    }
    return sum;
  }

  void call(Source& source, void* plan, void* context, int64_t images) {
    std::vector<std::unique_ptr<float[]>> tensors(data.external_count);
    std::vector<void*> pointers(data.external_count);
    std::vector<int32_t> planes(data.external_count);
    for (int32_t i = 0; i < data.value_count; ++i) {
      const Value& v = values_[i];
      if (v.external < 0) continue;
      planes[v.external] = v.external < count(planes_) ? planes_[v.external] : 0;
      if (source.chance(2)) planes[v.external] = 1;
      const int64_t rows = images * v.height * v.width;
      const int64_t size = planes[v.external] ? rows * v.channels : (rows - 1) * v.stride + v.channels;
      const int64_t floats = v.dtype == kBfloat16 ? (size + 1) / 2 : size;
      if (floats > (16 << 20)) return;
      tensors[v.external] = std::make_unique<float[]>(floats);
      std::fill_n(tensors[v.external].get(), floats, source.pick({0.0f, 1.0f, -2.0f, 1e30f, NAN}));
      pointers[v.external] = source.chance(1) ? nullptr : tensors[v.external].get();
    }
    std::vector<std::vector<uint8_t>> masks(data.grid_count);
    std::vector<const uint8_t*> forced(data.grid_count);
    for (int32_t g = 0; g < data.grid_count; ++g) {
      if (!source.chance(40)) continue;
      masks[g].resize(images * grids_[g].height * grids_[g].width);
      const int percent = source.pick({0, 10, 50, 100});
      for (uint8_t& open : masks[g]) open = source.chance(percent) ? source.pick({1, 1, 255}) : 0;
      forced[g] = masks[g].data();
    }
    std::vector<int64_t> open(data.grid_count);
    std::vector<double> times(data.step_count);
    Call call{};
    call.images = source.chance(3) ? images + 1 : images, call.threads = source.chance(3) ? source.pick({0, -1, INT_MAX}) : 1 + source.below(3);
    call.last = data.step_count;
    if (source.chance(20)) call.first = source.below(data.step_count + 2) - 1, call.last = source.below(data.step_count + 2);
    call.externals = source.chance(1) ? nullptr : pointers.data(), call.external_planes = planes.data();
    call.forced = source.chance(50) ? forced.data() : nullptr, call.open_rows = open.data(), call.step_ns = times.data();
    char error[64];
    dynaconv_plan_run(plan, context, &call, error, sizeof error);
  }

  std::vector<Value> values_;
  std::vector<Conv> convs_;
  std::vector<Grid> grids_;
  std::vector<Step> steps_;
  std::vector<int32_t> planes_;
  std::vector<std::unique_ptr<float[]>> memory_;
  bool runnable_ = true;
};
