// Blocks of random plans that give something up for good: channels that a gate closes for an image, and positions that halt. A
// part of random_plan.h, which includes it.

#pragma once

#include "random_plan.h"

// A decision about `groups` channels of every image.
inline int32_t RandomPlan::decide_channels(int32_t groups) {
  const int32_t logits = from_mean(current_, groups), grid = b.grid(1, groups);
  Step& step = b.step(kThreshold, logits, -1);
  step.grid = grid, step.floats[0] = s_.pick({0.3f, 0.5f, 0.5f, 0.6f, -INFINITY, INFINITY});
  drop(logits);
  gates.push_back(grid);
  if (!s_.chance(20)) return grid;
  // The decision as numbers, which somebody else wants.
  const int32_t values = make({1, 1, groups});
  b.step(kMaskValue, -1, values).grid = grid;
  drop(values);
  return grid;
}

inline Step& RandomPlan::narrow(int32_t kind, int32_t in, int32_t out, int32_t id, int32_t grid, bool ins, bool outs) {
  const int32_t before = activation(), after = activation();
  if (kind == kConv && s_.chance(60)) winograd(id);
  Step& step = b.step(kNarrow, in, out, id);
  step.ints[0] = kind, step.ints[1] = ins, step.ints[2] = outs, step.grid = grid;
  step.activation[0] = before, step.final_activation = after;
  return step;
}

// Open channels from open channels: a depthwise convolution, one in groups, or one that adds all up.
inline int32_t RandomPlan::narrow_middle(int32_t from, int32_t groups, int32_t grid, const Window& w) {
  const Size in = size(from);
  const Size out{w.of(in.h), w.of(in.w), in.c};
  switch (s_.below(3)) {
    case 0: {
      const int32_t to = make(out);
      if (in.c == 1) narrow(kConv, from, to, conv(1, 1, 1, w), grid, true, true);
      else narrow(kDepthwise, from, to, depthwise(in.c, w), grid, true, true);
      return to;
    }
    case 1: {  // twice as many outputs, lest it be depthwise
      const int32_t to = make({out.h, out.w, 2 * in.c});
      const int32_t parts = in.c / groups % 2 == 0 && s_.chance(50) ? 2 * groups : groups;
      narrow(kConv, from, to, conv(in.c, 2 * in.c, parts, w), grid, true, true);
      return to;
    }
    default: {
      const int32_t to = make({out.h, out.w, groups * s_.pick({1, 3, 8, 17})});
      narrow(kConv, from, to, conv(in.c, size(to).c, 1, w), grid, true, true);
      return to;
    }
  }
}

// From all channels to the open ones, and back.
inline void RandomPlan::narrow_convs(int32_t groups, int32_t grid) {
  const Size in = size(current_);
  const Window first = window(in.h, in.w, s_.chance(50));
  int32_t hidden = make({first.of(in.h), first.of(in.w), groups * s_.pick({1, 2, 4, 5, 8, 16, 33})});
  narrow(kConv, current_, hidden, conv(in.c, size(hidden).c, 1, first), grid, false, true);
  if (s_.chance(50)) {
    const int32_t middle = narrow_middle(hidden, groups, grid, window(size(hidden).h, size(hidden).w, s_.chance(70)));
    drop(hidden);
    hidden = middle;
  }
  const Size mid = size(hidden);
  const bool same = mid.h == in.h && mid.w == in.w && s_.chance(70);
  const Window last = window(mid.h, mid.w, same);
  const bool inside = same && s_.chance(50);
  const int32_t to = inside ? current_ : make({last.of(mid.h), last.of(mid.w), same ? in.c : channels()});
  Step& step = narrow(kConv, hidden, to, conv(mid.c, size(to).c, 1, last), grid, true, false);
  if (same) step.in2 = current_;
  drop(hidden);
  if (!inside) replace(to);
}

inline void RandomPlan::narrow_inverted(int32_t groups, int32_t grid) {
  const Size in = size(current_);
  const bool same = s_.chance(50);
  const Window w = window(in.h, in.w, same), one{1, 1, 0, 1};
  const int32_t hidden = groups * s_.pick({1, 2, 4, 16, 17, 33}), to = make({w.of(in.h), w.of(in.w), same ? in.c : channels()});
  const int32_t expand = conv(in.c, hidden, 1, one), middle = depthwise(hidden, w), project = conv(hidden, size(to).c, 1, one);
  if (hidden == 1) b.convs[middle].groups = 1;
  Step& step = narrow(kInverted, current_, to, expand, grid, false, false);
  step.conv[1] = middle, step.conv[2] = project, step.activation[1] = s_.below(kActivations);
  if (same && s_.chance(60)) step.in2 = current_;
  replace(to);
}

inline void RandomPlan::channel_gate() {
  const int32_t groups = s_.pick({1, 2, 3, 4, 8}), grid = decide_channels(groups);
  if (s_.chance(30)) narrow_inverted(groups, grid);
  else narrow_convs(groups, grid);
}

// How sure every position is that it may halt: of 0 to 1.
inline int32_t RandomPlan::scores() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, true);
  const bool squeezes = s_.chance(60), inside = squeezes && w.kernel <= 3 && s_.chance(60);
  const int32_t taps = w.kernel * w.kernel;
  Conv gate{};
  gate.out_channels = gate.groups = 1;
  gate.weight = b.keep(weights(1, int64_t{taps} * in.c + (squeezes ? in.c : 0))), gate.bias = b.keep(s_.noise(inside ? 1 + taps : 1));
  const int32_t id = b.place(gate, in.c, w.kernel, w.stride, w.padding, w.dilation);
  const int32_t logits = column(in.h, in.w), sums = squeezes ? column(in.h, 1) : -1, score = s_.chance(50) ? logits : column(in.h, in.w);
  Step& step = b.step(kGate, current_, logits, id);
  step.ints[0] = squeezes, step.ints[1] = inside, step.aux[0] = sums;
  Step& act = b.step(kActivate, logits, score);
  act.ints[0] = 1, act.floats[0] = s_.pick({1.0f, 0.25f, -2.0f}), act.floats[1] = s_.pick({0.0f, -1.0f, 3.0f});
  act.activation[0] = s_.pick({int32_t{kSigmoid}, int32_t{kSigmoid}, int32_t{kNone}, int32_t{kHardsigmoid}});
  return score;
}

// Two decisions, the second within the first: who was awake, and whose remainder is left after `score` was taken off.
inline int32_t RandomPlan::still_awake(int32_t score) {
  const Size in = size(current_);
  const int32_t before = b.grid(in.h, in.w), after = b.grid(in.h, in.w), rest = column(in.h, in.w);
  const auto decide = [&](int32_t of, int32_t grid, int32_t within) {
    Step& step = b.step(kThreshold, of, -1);
    step.grid = grid, step.grid2 = within, step.floats[0] = s_.pick({0.1f, 0.3f, 0.5f, -INFINITY, INFINITY});
    gates.push_back(grid);
  };
  decide(score, before, -1);
  b.step(kMaskValue, -1, rest).grid = before;
  const int32_t left = s_.chance(50) ? rest : column(in.h, in.w);
  Step& step = b.step(kAdd, rest, left);
  step.in2 = score, step.ints[0] = 1;
  decide(left, after, before);
  return after;
}

// A unit of a halting network: what is awake goes on, and a sum takes its result times a weight that is 0 for all others.
inline void RandomPlan::halting() {
  const Size in = size(current_);
  const int32_t score = scores(), awake = still_awake(score), weight = column(in.h, in.w);
  const int32_t unit = make(in), id = conv(in.c, in.c, 1, window(in.h, in.w, true));
  masked_conv(current_, unit, id, awake, -1);
  b.step(kMaskValue, -1, weight).grid = awake;
  b.step(kMultiply, weight, weight).in2 = score;
  const bool inside = s_.chance(50), filled = inside && s_.chance(40);
  const int32_t to = inside ? current_ : make(in), act = inside && !filled && s_.chance(70) ? int32_t{kNone} : activation();
  if (filled) close(current_, to, awake, act);
  Step& step = b.step(kAdd, current_, to);
  step.in2 = unit, step.aux[0] = weight, step.activation[0] = act, step.ints[1] = filled;
  drop(unit);
  if (!inside) replace(to);
}
