// Masked blocks of random plans: shortcut + mask * branch. A part of random_plan.h, which includes it.

#pragma once

#include "random_plan.h"

// The mask that one grid needs for what reads it.
inline int32_t RandomPlan::needed(int32_t grid, int32_t conv_id, Size in) {
  const int32_t from = b.grid(in.h, in.w);
  Step& step = b.step(kDilate, -1, -1, conv_id);
  step.grid = grid, step.grid2 = from;
  return from;
}

inline int32_t RandomPlan::decide(Size out, const Window& w) {
  const Size in = size(current_);
  const int64_t depth = int64_t{w.kernel} * w.kernel * in.c;
  const bool squeezes = s_.chance(50), inside = squeezes && w.stride == 1 && w.kernel <= 3 && s_.chance(50);
  Conv gate{};
  gate.out_channels = gate.groups = 1;
  gate.weight = b.keep(weights(1, depth + (squeezes ? in.c : 0))), gate.bias = b.keep(s_.noise(inside ? 1 + w.kernel * w.kernel : 1));
  const int32_t id = b.place(gate, in.c, w.kernel, w.stride, w.padding, w.dilation);
  int32_t logits = column(out.h, out.w);
  const int32_t sums = squeezes ? column(in.h, 1) : -1;
  Step& step = b.step(kGate, current_, logits, id);
  step.ints[0] = squeezes, step.ints[1] = inside, step.aux[0] = sums;
  const float threshold = s_.pick({-1.0f, -0.3f, 0.0f, 0.3f, 1.0f, -INFINITY, INFINITY});
  const bool coarse = out.h % 2 == 0 && out.w % 2 == 0 && s_.chance(30);
  const int32_t pooled = coarse ? column(out.h / 2, out.w / 2) : logits, half = coarse ? b.place(Conv{}, 1, 2, 2, 0, 1) : -1;
  if (coarse) b.step(kAvgPool, logits, pooled, half);
  const int32_t grid = b.grid(at(pooled).height, at(pooled).width);
  Step& decision = b.step(kThreshold, pooled, -1);
  decision.grid = grid, decision.floats[0] = threshold;
  gates.push_back(coarse ? needed(grid, half, out) : grid);
  return gates.back();
}

inline Step& RandomPlan::masked_conv(int32_t in, int32_t out, int32_t id, int32_t grid, int32_t partial) {
  const int32_t before = activation();
  const float above = s_.pick({2.0f, 2.0f, 0.5f});
  if (s_.chance(60)) winograd(id);
  if (b.convs[id].winograd) b.grids[grid].tiles = 1;
  Step& step = b.step(kConv, in, out, id);
  step.grid = grid, step.grid2 = partial, step.activation[0] = before;
  step.run_all_above = above;
  return step;
}

// shortcut + mask * branch, where every row of the result is defined.
inline void RandomPlan::masked() {
  const Size in = size(current_);
  const bool same = s_.chance(60);
  Window w = window(in.h, in.w, same);
  if (!same && s_.chance(50)) w = {3, 2, 1, 1};
  if (w.of(in.h) < 1 || w.of(in.w) < 1) w = {1, 1, 0, 1};
  const Size out{w.of(in.h), w.of(in.w), same || s_.chance(30) ? in.c : channels()};
  const int32_t grid = decide(out, w), after = activation();
  const bool own = out.h == in.h && out.w == in.w && out.c == in.c;
  const int32_t shortcut = own ? current_ : project(out, w, grid, after);
  const bool split = split_;
  const bool inside = split || s_.chance(50);
  // In place only where the branch has made all that it reads of the input before its last step.
  const int32_t branch = s_.below(own && inside ? 4 : 8);
  const int32_t to = inside ? shortcut : make(out);
  const bool fills = branch == 5 && !split && s_.chance(60);
  if (!fills && !split && (!inside || after != kNone)) close(shortcut, to, grid, after);
  run_branch(branch, to, w, grid, out);
  Step& last = b.steps.back();
  if (fills) last.ints[1] = after == kNone ? 1 : 2;
  last.in2 = shortcut, last.final_activation = after, last.run_all_above = 2;
  if (inside && !own) drop(current_), current_ = to;
  else if (!inside) {
    if (!own) drop(shortcut);
    replace(to);
  }
  if (s_.chance(30)) mask_value(grid, out);
  if (s_.chance(20)) squeeze(grid);
  if (s_.chance(20)) pointwise(grid);
}

// A shortcut's convolution: at once, or closed rows with the last activation and open ones without.
inline int32_t RandomPlan::project(Size out, const Window& w, int32_t grid, int32_t after) {
  const Size in = size(current_);
  const bool deep = in.c == out.c && s_.chance(50);
  const int32_t to = make(out), kind = deep ? kDepthwise : kConv;
  const int32_t id = deep ? depthwise(in.c, w) : conv(in.c, out.c, 1, {w.kernel, w.stride, w.padding, w.dilation});
  split_ = s_.chance(40);
  if (!split_) {
    b.step(kind, current_, to, id);
    return to;
  }
  b.grids[grid].closed = 1;
  Step& closed = b.step(kind, current_, to, id);
  closed.grid = grid, closed.closed = 1, closed.activation[0] = after;
  b.step(kind, current_, to, id).grid = grid;
  return to;
}

inline void RandomPlan::close(int32_t from, int32_t to, int32_t grid, int32_t after) {
  b.grids[grid].closed = 1;
  Step& step = b.step(kActivate, from, to);
  step.grid = grid, step.closed = 1, step.activation[0] = after;
}

inline void RandomPlan::run_branch(int32_t kind, int32_t to, const Window& w, int32_t grid, Size out) {
  split_ = false;
  const Size in = size(current_);
  const Window one{1, 1, 0, 1};
  const int32_t hidden = channels();
  switch (kind) {
    case 0: {  // two convolutions of the window, or one and a depthwise one
      const bool deep = s_.chance(40);
      const int32_t last = deep ? depthwise(out.c, w) : conv(hidden, out.c, 1, w), width = deep ? out.c : hidden;
      const int32_t partial = needed(grid, last, in), middle = make({in.h, in.w, width});
      const Window before = window(in.h, in.w, true);
      masked_conv(current_, middle, conv(in.c, width, 1, before), partial, -1);
      if (deep) b.step(kDepthwise, middle, to, last).grid = grid;
      else masked_conv(middle, to, last, grid, partial);
      drop(middle);
      break;
    }
    case 1: {  // bottleneck
      const int32_t spatial = conv(hidden, hidden, 1, w), partial = needed(grid, spatial, in);
      const int32_t first = make({in.h, in.w, hidden}), second = make({out.h, out.w, hidden});
      masked_conv(current_, first, conv(in.c, hidden, 1, one), partial, -1);
      masked_conv(first, second, spatial, grid, partial).run_all_above = 2;
      masked_conv(second, to, conv(hidden, out.c, 1, one), grid, grid);
      drop(first), drop(second);
      break;
    }
    case 2: {  // the same with a depthwise convolution
      const int32_t spatial = depthwise(hidden, w), partial = needed(grid, spatial, in);
      const int32_t first = make({in.h, in.w, hidden}), second = make({out.h, out.w, hidden}), act = activation();
      masked_conv(current_, first, conv(in.c, hidden, 1, one), partial, -1);
      Step& step = b.step(kDepthwise, first, second, spatial);
      step.grid = grid, step.activation[0] = act;
      masked_conv(second, to, conv(hidden, out.c, 1, one), grid, -1);
      drop(first), drop(second);
      break;
    }
    case 3: {  // the same in one step, and its mean over open rows
      const int32_t spatial = depthwise(hidden, w), partial = needed(grid, spatial, in);
      const int32_t middle = make({out.h, out.w, hidden}), mean = make({1, 1, hidden});
      const float above = s_.pick({2.0f, 0.5f});
      Step& step = expanded(middle, mean, spatial);
      step.grid = grid, step.grid2 = partial, step.run_all_above = above;
      Step& scale = b.step(kMultiply, middle, middle);
      scale.in2 = mean, scale.grid = grid;
      masked_conv(middle, to, conv(hidden, out.c, 1, one), grid, grid);
      drop(middle), drop(mean);
      break;
    }
    case 4: masked_conv(current_, to, conv(in.c, out.c, 1, w), grid, -1); break;
    case 5: {
      const int32_t middle = inverted(current_, to, w), step = static_cast<int32_t>(b.steps.size()) - 1;
      // The needed rows come before what reads them.
      const int32_t partial = needed(grid, middle, in);
      std::swap(b.steps[step], b.steps[step + 1]);
      const bool all = b.steps.back().conv[0] < 0 && s_.chance(50);
      b.steps.back().grid = grid, b.steps.back().grid2 = all ? -1 : partial;
      break;
    }
    case 6: mixed(current_, to, w, grid); break;
    default: fused(current_, to, w, grid); break;
  }
}

inline void RandomPlan::mask_value(int32_t grid, Size out) {
  const int32_t mask = column(out.h, out.w), act = activation();
  b.step(kMaskValue, -1, mask).grid = grid;
  Step& step = b.step(kMultiply, current_, current_);
  step.in2 = mask, step.activation[0] = act;
}
