// Steps of random plans in bfloat16, between two conversions. A part of random_plan.h, which includes it.

#pragma once

#include "random_plan.h"

// A convolution or a depthwise one, now and then with a shortcut or float32 sums.
inline void RandomPlan::half_conv() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, s_.chance(40));
  const bool deep = s_.chance(40);
  int32_t groups = s_.pick({1, 1, 2, 3});
  if (in.c % groups) groups = 1;
  // Winograd pays for many channels.
  const int32_t out = deep ? in.c : s_.chance(30) ? 48 : groups * channels();
  const int32_t id = deep ? depthwise(in.c, w, kBfloat16) : conv(in.c, out, groups, w, kBfloat16);
  const bool add = w.of(in.h) == in.h && w.of(in.w) == in.w && out == in.c && s_.chance(50);
  const int32_t to = make({w.of(in.h), w.of(in.w), out}, deep || add || s_.chance(80) ? kBfloat16 : kFloat32);
  if (!deep && at(to).dtype == kBfloat16 && s_.chance(50)) winograd(id, kBfloat16);
  const int32_t before = activation(), after = activation();
  Step& step = b.step(deep ? kDepthwise : kConv, current_, to, id);
  step.activation[0] = before, step.final_activation = after;
  if (add) step.in2 = current_;
  replace(to);
}

inline void RandomPlan::half_pointwise() {
  const Size in = size(current_);
  const bool inside = s_.chance(50);
  const int32_t to = inside ? current_ : make(in, kBfloat16), act = activation();
  Step& step = b.step(s_.pick({int32_t{kActivate}, int32_t{kAdd}, int32_t{kMultiply}}), current_, to);
  step.activation[0] = act;
  if (step.kind != kActivate) step.in2 = current_;
  if (!inside) replace(to);
}

// Two masked convolutions that are added in place; the mask is decided from bfloat16, too.
inline void RandomPlan::half_masked() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, true), before = window(in.h, in.w, true);
  const int32_t grid = decide(in, w);
  const bool deep = s_.chance(40);
  const int32_t hidden = deep ? in.c : s_.chance(30) ? 48 : channels(), first = conv(in.c, hidden, 1, before, kBfloat16);
  const int32_t last = deep ? depthwise(in.c, w, kBfloat16) : conv(hidden, in.c, 1, w, kBfloat16);
  const auto transform = [&](int32_t id, int32_t of) {
    if (s_.chance(50)) winograd(id, kBfloat16);
    if (b.convs[id].winograd) b.grids[of].tiles = 1;
  };
  const int32_t partial = needed(grid, last, in), middle = make({in.h, in.w, hidden}, kBfloat16);
  const int32_t acts[2] = {activation(), activation()};
  const float above = s_.pick({2.0f, 0.5f});
  transform(first, partial);
  if (!deep) transform(last, grid);
  Step& one = b.step(kConv, current_, middle, first);
  one.grid = partial, one.activation[0] = acts[0], one.run_all_above = above;
  Step& two = b.step(deep ? kDepthwise : kConv, middle, current_, last);
  two.grid = grid, two.grid2 = deep ? -1 : partial, two.in2 = current_, two.activation[0] = acts[1];
  drop(middle);
}

// An inverted residual under a mask, whose closed rows become the shortcut or stay it.
inline void RandomPlan::half_inverted() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, true);
  const int32_t grid = decide(in, w), to = make(in, kBfloat16), after = activation();
  const int32_t middle = inverted(current_, to, w);
  const auto step = b.steps.size() - 1;
  // The needed rows come before what reads them.
  const int32_t partial = needed(grid, middle, in);
  std::swap(b.steps[step], b.steps[step + 1]);
  Step& last = b.steps.back();
  last.grid = grid, last.grid2 = last.conv[0] < 0 && s_.chance(50) ? -1 : partial;
  last.in2 = current_, last.final_activation = after, last.ints[1] = after == kNone ? 1 : 2;
  replace(to);
}

// From rows in float32, or in bfloat16 already, to rows in float32.
inline void RandomPlan::halves() {
  if (at(current_).dtype == kFloat32) {
    const int32_t half = make(size(current_), kBfloat16), act = activation();
    b.step(kActivate, current_, half).activation[0] = act;
    replace(half);
  }
  const int steps = 1 + s_.below(3);
  for (int i = 0; i < steps && at(current_).dtype == kBfloat16; ++i) {
    switch (s_.below(8)) {
      case 0: half_pointwise(); break;
      case 1: half_masked(); break;
      case 2: half_inverted(); break;
      case 3: plain_inverted(); break;
      case 4: pool(); break;
      case 5: squeeze(-1); break;
      default: half_conv(); break;
    }
  }
  if (at(current_).dtype == kFloat32) return;
  const int32_t single = make(size(current_));
  b.step(kActivate, current_, single);
  replace(single);
}
