// Steps of random plans whose weights depend on the image: mixed kernels, channel fusions and what routes them. A part of
// random_plan.h, which includes it.

#pragma once

#include "random_plan.h"

// Numbers for each image from all positions of a value, through a few layers.
inline int32_t RandomPlan::routed(int32_t of, int32_t count) {
  const Size in = size(of);
  const int32_t width = s_.pick({1, 4, 9, 33, 40, 100}), taps = in.h * in.w;
  const int32_t first = b.place(b.packed(weights(width, int64_t{in.c} * taps), s_.noise(width), width, 1, in.c, taps, kFloat32), in.c, in.h, 1, 0, 1);
  b.convs[first].kernel[1] = in.w;
  const int32_t gate = s_.chance(60) ? conv(width, width, 1, {1, 1, 0, 1}) : -1, last = conv(width, count, 1, {1, 1, 0, 1});
  const int32_t made = make({1, 1, count}), acts[2] = {activation(), activation()};
  Step& step = b.step(kRouter, of, made, first);
  step.conv[1] = gate, step.conv[2] = last;
  step.activation[0] = acts[0], step.activation[1] = acts[1], step.activation[2] = kSigmoid;
  return made;
}

// The same from the mean of a value, through a convolution or more.
inline int32_t RandomPlan::from_mean(int32_t of, int32_t count) {
  if (s_.chance(20)) return routed(of, count);
  const int32_t c = size(of).c, mean = make({1, 1, c}), made = make({1, 1, count}), how = conv(c, count, 1, {1, 1, 0, 1});
  b.step(kMean, of, mean);
  b.step(kConv, mean, made, how).activation[0] = kSigmoid;
  drop(mean);
  return made;
}

// The factors of a channel fusion from the channels of `current_`, whose coefficients follow from the mean.
inline int32_t RandomPlan::factors(int32_t outputs, int32_t rank, bool folded) {
  const Size in = size(current_);
  const int32_t inputs = in.c, rows = folded ? 1 + inputs : in.h * in.w;
  const int32_t coefficients = from_mean(current_, outputs + rank * rank), reduce = conv(inputs, rank, 1, {1, 1, 0, 1});
  if (folded) b.convs[reduce].weight = b.keep(weights(inputs, rank));
  const int32_t out = make({1, 1, (outputs + 31) / 32 * 32 + rows * ((rank + 15) / 16 * 16)});
  Step& step = b.step(kFusionFactors, folded ? -1 : current_, out);
  step.conv[1] = reduce, step.aux[0] = coefficients, step.ints[4] = s_.chance(50);
  drop(coefficients);
  return out;
}

// The step of an expansion, now and then folded for each image, and a depthwise convolution from `current_` to `to`.
inline Step& RandomPlan::expanded(int32_t to, int32_t mean, int32_t middle) {
  const int32_t inputs = size(current_).c, hidden = size(to).c, rank = s_.pick({1, 3, 16, 20, 33}), form = s_.below(4);
  const int32_t own = form % 3 ? factors(hidden, rank, form == 1) : -1, first = conv(inputs, hidden, 1, {1, 1, 0, 1});
  const int32_t add = own >= 0 ? conv(rank, hidden, 1, {1, 1, 0, 1}) : -1;
  const int32_t acts[2] = {activation(), activation()};
  if (own >= 0) drop(own);
  Step& step = b.step(kInverted, current_, to, first);
  step.conv[1] = middle, step.conv[2] = add, step.activation[0] = acts[0], step.activation[1] = acts[1];
  step.aux[0] = own, step.aux[1] = mean, step.ints[0] = own >= 0 ? form : 0;
  return step;
}

// Such a step; now and then its result times its own mean.
inline void RandomPlan::unprojected() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, false);
  const int32_t hidden = s_.pick({4, 16, 33, 48, 70, 130, 256, 300});
  const int32_t to = make({w.of(in.h), w.of(in.w), hidden}), mean = s_.chance(60) ? make({1, 1, hidden}) : -1;
  expanded(to, mean, depthwise(hidden, w));
  replace(to);
  if (mean < 0) return;
  if (s_.chance(40)) {
    b.step(kMultiply, to, to).in2 = mean;
    drop(mean);
    return;
  }
  // A projection that is fused for each image, from the mean; nobody else looks at what lies between.
  const int32_t outs = s_.pick({3, 24, 33, 64}), made = make({size(to).h, size(to).w, outs}), low = s_.pick({1, 3, 16, 20, 33});
  const int32_t coefficients = make({1, 1, outs + low * low}), how = conv(hidden, outs + low * low, 1, {1, 1, 0, 1});
  b.step(kConv, mean, coefficients, how).activation[0] = kSigmoid;
  drop(mean);
  fused(to, made, {1, 1, 0, 1}, -1, low, coefficients);
  replace(made);
  sliced = true;
}

// A convolution whose kernel is mixed for each image, with coefficients that another convolution makes from the mean.
inline int32_t RandomPlan::mixed(int32_t in, int32_t out, const Window& w, int32_t grid) {
  const Size from = size(in), to = size(out);
  const bool single = from.c == to.c && from.c > 1 && s_.chance(40);
  const int32_t groups = single ? from.c : 1, experts = s_.pick({1, 2, 3, 4, 6});
  const bool each = s_.chance(30);
  const int64_t taps = int64_t{w.kernel} * w.kernel, per = from.c / groups, outs = to.c / groups;
  const int64_t panels = single ? (to.c + 31) / 32 : (outs + 31) / 32 * groups;
  Conv c{};
  c.out_channels = to.c, c.groups = groups;
  c.weight = b.keep(weights(panels * (single ? 1 : per) * taps * experts * 32, 1));
  c.bias = b.keep(s_.noise(panels * 32));
  const int32_t id = b.place(c, from.c, w.kernel, w.stride, w.padding, w.dilation);
  const int32_t biases = s_.chance(50) ? b.place(c, from.c, 1, 1, 0, 1) : -1;
  if (biases >= 0) b.convs[biases].weight = b.keep(s_.noise(panels * experts * 32));
  const int32_t mean = make({1, 1, from.c});
  const auto coefficients = [&](int32_t count) {
    const int32_t made = make({1, 1, count}), how = conv(from.c, count, 1, {1, 1, 0, 1});
    b.step(kConv, mean, made, how).activation[0] = kSigmoid;
    return made;
  };
  b.step(kMean, in, mean);
  const int32_t routing = experts == 1 && s_.chance(50) ? -1 : coefficients(experts * (each ? to.c : 1)), of_taps = s_.chance(30) ? coefficients(taps) : -1;
  const int32_t of_in = !single && s_.chance(30) ? coefficients(from.c) : -1, of_out = s_.chance(30) ? coefficients(to.c) : -1;
  const bool fast = w.kernel == 3 && w.stride == 1 && w.dilation == 1 && groups == 1 && s_.chance(60);
  Step& step = b.step(kDynamicConv, in, out, id);
  step.conv[1] = biases, step.aux[0] = routing, step.aux[1] = of_taps, step.aux[2] = of_in, step.aux[3] = of_out;
  step.ints[0] = experts, step.ints[1] = each, step.ints[2] = fast, step.grid = grid;
  if (fast && grid >= 0) b.grids[grid].tiles = 1;
  for (const int32_t v : {mean, routing, of_taps, of_in, of_out})
    if (v >= 0) drop(v);
  return id;
}

// A channel fusion in either form, with coefficients from the mean.
inline void RandomPlan::fused(int32_t in, int32_t out, const Window& w, int32_t grid) {
  const int32_t rank = s_.pick({1, 3, 16, 20, 33});
  fused(in, out, w, grid, rank, from_mean(in, size(out).c + rank * rank));
}

inline void RandomPlan::fused(int32_t in, int32_t out, const Window& w, int32_t grid, int32_t rank, int32_t coefficients) {
  const Size from = size(in), to = size(out);
  const bool factored = s_.chance(50);
  int32_t groups = factored ? s_.pick({1, 1, 2, 3}) : 1;
  if (from.c % groups || to.c % groups || from.c == groups) groups = 1;
  const int64_t taps = int64_t{w.kernel} * w.kernel;
  const int32_t id = conv(from.c, to.c, groups, w), reduce = conv(from.c, rank, 1, {1, 1, 0, 1});
  Conv expand = b.packed(weights(to.c, rank), s_.noise(to.c), to.c, groups, rank, 1, kFloat32);
  expand.groups = 1;
  const int32_t last = b.place(expand, rank, 1, 1, 0, 1);
  if (!factored) {
    b.convs[id].weight = b.keep(weights((to.c + 31) / 32 * 32, from.c * taps));
    b.convs[reduce].weight = b.keep(weights(from.c, rank));
  }
  const bool fast = w.kernel == 3 && w.stride == 1 && w.dilation == 1 && groups == 1 && s_.chance(60);
  const int32_t before = activation();
  Step& step = b.step(kChannelFusion, in, out, id);
  step.conv[1] = reduce, step.conv[2] = last, step.aux[0] = coefficients, step.activation[0] = before;
  step.ints[0] = step.ints[1] = 1, step.ints[2] = fast, step.ints[3] = factored, step.ints[4] = s_.chance(50), step.grid = grid;
  if (fast && grid >= 0) b.grids[grid].tiles = 1;
  drop(coefficients);
}

inline void RandomPlan::dynamic() {
  const Size in = size(current_);
  const Window w = window(in.h, in.w, false);
  const int32_t to = make({w.of(in.h), w.of(in.w), s_.chance(50) ? in.c : channels()});
  if (s_.chance(50)) fused(current_, to, w, -1);
  else mixed(current_, to, w, -1);
  replace(to);
}
