// Draws small valid plans: chains of every kind of step, masked blocks, results in place, memory that is used again.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "plan_builder.h"
#include "random_source.h"

class RandomPlan {
 public:
  PlanBuilder b;
  std::vector<int32_t> planes;  // of each external: 1 when the image is given as planes
  std::vector<int32_t> gates;   // grids whose decision a call may replace
  bool sliced = false;          // some value may lie otherwise in the arena where nobody looks between two steps

  explicit RandomPlan(Source& source) : s_(source) {
    begin();
    const int blocks = 1 + s_.below(5);
    for (int i = 0; i < blocks; ++i) block();
    end();
  }

 private:
  struct Size {
    int32_t h, w, c;
  };
  struct Window {
    int32_t kernel, stride, padding, dilation;
    int32_t of(int32_t in) const { return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; }
  };

  // Copies, since the tables grow.
  Value at(int32_t id) const { return b.values[id]; }
  Size size(int32_t id) const { return {at(id).height, at(id).width, at(id).channels}; }
  int32_t channels() {
    // Many channels on few rows are cut otherwise than few on many.
    if (current_ >= 0 && at(current_).height * at(current_).width <= 12 && s_.chance(20)) return s_.pick({64, 96, 130, 160});
    return s_.pick({1, 2, 3, 5, 8, 8, 16, 16, 17, 24, 33, 40});
  }
  int32_t activation() { return s_.chance(40) ? int32_t{kNone} : s_.below(kActivations); }

  // Memory: now and then the place of a value that nobody reads any more.
  int32_t make(Size size) {
    const bool single = size.h * size.w * size.c == 1;
    const int32_t first = single || s_.chance(80) ? 0 : s_.pick({1, 3, 16});
    const int32_t stride = first + size.c + (single ? 0 : s_.pick({0, 0, 0, 1, 16}));
    const int64_t bytes = (int64_t{size.h} * size.w * stride * 4 + 63) / 64 * 64;
    for (size_t i = 0; i < dead_.size() && s_.chance(70); ++i) {
      if (dead_[i].second < bytes) continue;
      const int64_t arena = b.arena;
      const int32_t id = b.value(size.h, size.w, size.c, false, stride);
      b.arena = arena, b.values[id].offset = dead_[i].first, b.values[id].first = first;
      dead_.erase(dead_.begin() + static_cast<int64_t>(i));
      return id;
    }
    const int32_t id = b.value(size.h, size.w, size.c, false, stride);
    b.values[id].first = first;
    return id;
  }
  // Some channels of a value, as a value.
  int32_t part(int32_t of, int32_t first, int32_t count) {
    b.values.push_back(at(of));
    b.values.back().first += first, b.values.back().channels = count;
    return static_cast<int32_t>(b.values.size()) - 1;
  }
  int32_t column(int32_t h, int32_t w) { return b.value(h, w, 1); }
  int32_t outside(Size size, bool as_planes = false) {
    planes.push_back(as_planes);
    return b.value(size.h, size.w, size.c, true);
  }
  void drop(int32_t id) {
    const Value v = at(id);
    if (v.external < 0) dead_.push_back({v.offset, (int64_t{v.height} * v.width * v.stride * 4 + 63) / 64 * 64});
  }

  std::vector<float> weights(int64_t outs, int64_t depth) {
    return s_.noise(outs * depth, 1 / std::sqrt(static_cast<float>(depth)));
  }
  int32_t conv(int32_t in, int32_t out, int32_t groups, const Window& w) {
    const int64_t taps = int64_t{w.kernel} * w.kernel;
    return b.conv(weights(out, in / groups * taps), s_.noise(out), in, out, groups, w.kernel, w.stride, w.padding, w.dilation);
  }
  int32_t depthwise(int32_t c, const Window& w) {
    const int32_t id = b.place(Conv{}, c, w.kernel, w.stride, w.padding, w.dilation);
    b.convs[id].weight = b.keep(weights(c, int64_t{w.kernel} * w.kernel)), b.convs[id].bias = b.keep(s_.noise(c));
    b.convs[id].out_channels = b.convs[id].groups = c;
    return id;
  }
  // Transformed with arithmetic that has nothing in common with the library's.
  void winograd(int32_t id) {
    Conv& c = b.convs[id];
    if (c.kernel[0] != 3 || c.stride[0] != 1 || c.dilation[0] != 1 || c.groups != 1) return;
    const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    const int64_t in = c.in_channels, panels = (c.out_channels + 31) / 32;
    std::vector<float> packed(panels * 16 * in * 32);
    for (int64_t o = 0; o < panels * 32; ++o)
      for (int64_t k = 0; k < in; ++k)
        for (int p = 0; p < 16; ++p) {
          double sum = 0;
          for (int t = 0; t < 9; ++t)
            sum += g[p / 4][t / 3] * g[p % 4][t % 3] *
                   static_cast<const float*>(c.weight)[((o / 32 * 9 + t) * in + k) * 32 + o % 32];
          packed[((o / 32 * 16 + p) * in + k) * 32 + o % 32] = static_cast<float>(sum);
        }
    c.winograd = b.keep(packed);
  }
  Window window(int32_t h, int32_t w, bool same) {
    Window at{s_.pick({1, 3, 3, 5, 7, 2}), same ? 1 : s_.pick({1, 1, 2, 3}), 0, 1};
    if (same && at.kernel == 2) at.kernel = 3;
    if (at.kernel > 2 && s_.chance(20)) at.dilation = 2;
    at.padding = same ? at.dilation * (at.kernel / 2) : s_.below(at.dilation * (at.kernel / 2) + 1);
    if (at.of(h) < 1 || at.of(w) < 1 || at.dilation * (at.kernel - 1) + 1 > std::min(h, w) + 2 * at.padding) return {1, 1, 0, 1};
    return at;
  }

  void begin() {
    const Size image{1 + s_.below(11), 1 + s_.below(11), s_.pick({1, 3, 3, 4, 8})};
    const bool as_planes = s_.chance(60);
    const int32_t in = outside(image, as_planes);
    if (s_.chance(50)) {
      Window w = window(image.h, image.w, false);
      w.dilation = 1, w.padding = std::min(w.padding, w.kernel / 2);
      const int32_t out = channels();
      current_ = make({w.of(image.h), w.of(image.w), out});
      const int32_t id = conv(image.c, out, 1, w);
      b.step(kStem, in, current_, id).activation[0] = activation();
    } else {
      current_ = make(image);
      b.step(kLayout, in, current_);
    }
  }
  void end() {
    if (!s_.chance(60)) return;
    const int32_t out = outside(size(current_));
    b.step(kActivate, current_, out).activation[0] = activation();
    current_ = out;
  }

  void block() {
    const int32_t kind = s_.below(16);
    switch (kind) {
      case 0: case 1: plain_conv(); break;
      case 2: plain_depthwise(); break;
      case 3: plain_inverted(); break;
      case 4: pool(); break;
      case 5: squeeze(-1); break;
      case 6: pointwise(); break;
      case 7: concatenate(); break;
      case 8: dynamic(); break;
      case 9: unprojected(); break;
      case 10: channel_gate(); break;
      case 11: halting(); break;
      default: masked(); break;
    }
  }
  void replace(int32_t out) {
    drop(current_);
    current_ = out;
  }

  void plain_conv() {
    const Size in = size(current_);
    const Window w = window(in.h, in.w, false);
    int32_t groups = s_.pick({1, 1, 1, 2, 3, in.c});
    if (in.c % groups) groups = 1;
    const int32_t out = groups * std::min(channels(), groups > 4 ? 2 : 160);
    const int32_t id = conv(in.c, out, groups, w);
    if (s_.chance(60)) winograd(id);
    const int32_t to = make({w.of(in.h), w.of(in.w), out});
    const bool add = to != current_ && size(to).h == in.h && size(to).w == in.w && out == in.c && s_.chance(50);
    const int32_t before = activation(), after = add || s_.chance(20) ? activation() : int32_t{kNone};
    Step& step = b.step(kConv, current_, to, id);
    step.activation[0] = before, step.final_activation = after;
    if (add) step.in2 = current_;
    replace(to);
  }

  void plain_depthwise() {
    const Size in = size(current_);
    const Window w = window(in.h, in.w, false);
    const int32_t id = depthwise(in.c, w), to = make({w.of(in.h), w.of(in.w), in.c});
    const bool add = size(to).h == in.h && size(to).w == in.w && s_.chance(40);
    const int32_t before = activation(), after = activation();
    Step& step = b.step(kDepthwise, current_, to, id);
    step.activation[0] = before, step.final_activation = after;
    if (add) step.in2 = current_;
    replace(to);
  }

  // The step of an inverted residual from `in` to `out`; its depthwise convolution.
  int32_t inverted(int32_t in, int32_t out, const Window& w) {
    const int32_t c = size(in).c, hidden = s_.chance(25) ? c : s_.pick({4, 16, 33, 48, 70, 130});
    const Window one{1, 1, 0, 1};
    const int32_t first = hidden == c && s_.chance(70) ? -1 : conv(c, hidden, 1, one), middle = depthwise(hidden, w);
    const int32_t last = conv(hidden, size(out).c, 1, one);
    int32_t acts[4];
    for (int32_t& a : acts) a = activation();
    Step& step = b.step(kInverted, in, out, first);
    step.conv[1] = middle, step.conv[2] = last;
    for (int i = 0; i < 3; ++i) step.activation[i] = acts[i];
    step.final_activation = acts[3];
    return middle;
  }
  // Numbers for each image from all positions of a value, through a few layers.
  int32_t routed(int32_t of, int32_t count) {
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
  int32_t from_mean(int32_t of, int32_t count) {
    if (s_.chance(20)) return routed(of, count);
    const int32_t c = size(of).c, mean = make({1, 1, c}), made = make({1, 1, count}), how = conv(c, count, 1, {1, 1, 0, 1});
    b.step(kMean, of, mean);
    b.step(kConv, mean, made, how).activation[0] = kSigmoid;
    drop(mean);
    return made;
  }
  // The factors of a channel fusion from the channels of `current_`, whose coefficients follow from the mean.
  int32_t factors(int32_t outputs, int32_t rank, bool folded) {
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
  Step& expanded(int32_t to, int32_t mean, int32_t middle) {
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
  void unprojected() {
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
  void plain_inverted() {
    const Size in = size(current_);
    const bool same = s_.chance(50);
    const Window w = window(in.h, in.w, same);
    const int32_t to = make({w.of(in.h), w.of(in.w), same ? in.c : channels()});
    inverted(current_, to, w);
    if (size(to).h == in.h && size(to).w == in.w && size(to).c == in.c && s_.chance(60)) b.steps.back().in2 = current_;
    replace(to);
  }

  void pool() {
    const Size in = size(current_);
    const Window w = window(in.h, in.w, false);
    int32_t out[2] = {w.of(in.h), w.of(in.w)};
    const int32_t of[2] = {in.h, in.w}, reach = w.dilation * (w.kernel - 1) + 1;
    // With ceil_mode a last window starts inside but hangs over.
    for (int i = 0; i < 2; ++i)
      if (s_.chance(50) && (of[i] + 2 * w.padding - reach) % w.stride && out[i] * w.stride < of[i] + w.padding) ++out[i];
    const int32_t to = make({out[0], out[1], in.c}), kind = s_.pick({int32_t{kMaxPool}, int32_t{kAvgPool}});
    const int32_t id = b.place(Conv{}, in.c, w.kernel, w.stride, w.padding, w.dilation), padded = s_.below(2);
    Step& step = b.step(kind, current_, to, id);
    step.ints[0] = padded;
    replace(to);
  }

  // Squeeze and excite; the mean over the open rows of a grid where one is given.
  void squeeze(int32_t grid) {
    const Size in = size(current_);
    const int32_t mean = make({1, 1, in.c}), scale = make({1, 1, in.c});
    b.step(kMean, current_, mean).grid = grid;
    const int32_t id = conv(in.c, in.c, 1, {1, 1, 0, 1});
    b.step(kConv, mean, scale, id).activation[0] = kSigmoid;
    const bool partly = grid >= 0 && s_.chance(50), inside = partly || s_.chance(50);
    const int32_t to = inside ? current_ : make(in), act = activation();
    Step& step = b.step(s_.pick({int32_t{kMultiply}, int32_t{kAdd}}), current_, to);
    step.in2 = scale, step.activation[0] = act, step.grid = partly ? grid : -1;
    step.ints[0] = step.kind == kAdd && s_.chance(30);
    drop(mean), drop(scale);
    if (!inside) replace(to);
  }

  // One operation on every row, or on those of a grid.
  void pointwise(int32_t grid = -1) {
    const Size in = size(current_);
    const bool inside = grid >= 0 || s_.chance(50);
    const int32_t to = inside ? current_ : make(in);
    const int32_t kind = s_.pick({int32_t{kActivate}, int32_t{kLayerNorm}, int32_t{kSoftmax}, int32_t{kAdd}, int32_t{kMultiply}});
    int32_t id = -1;
    if (kind == kLayerNorm) {
      Conv norm{};
      norm.out_channels = in.c, norm.groups = 1;
      norm.weight = b.keep(s_.noise(in.c)), norm.bias = b.keep(s_.noise(in.c));
      id = b.place(norm, in.c, 1, 1, 0, 1);
    }
    const int32_t act = activation(), group = in.c % 4 == 0 && s_.chance(50) ? 4 : in.c;
    Step& step = b.step(kind, current_, to, id);
    step.activation[0] = kind == kActivate || kind == kAdd || kind == kMultiply ? act : int32_t{kNone};
    if (kind == kAdd || kind == kMultiply) step.in2 = current_;
    if (kind == kSoftmax) step.ints[0] = group, step.floats[0] = 0.5f;
    if (kind == kLayerNorm) step.floats[0] = 1e-5f;
    if (kind != kSoftmax) step.grid = grid;
    if (!inside) replace(to);
  }

  void concatenate() {
    const Size in = size(current_);
    if (s_.chance(40)) {
      // The second part is computed where it belongs, and read from there.
      const int32_t more = channels(), to = make({in.h, in.w, in.c + more}), other = part(to, in.c, more);
      const int32_t id = conv(in.c, more, 1, {1, 1, 0, 1});
      b.step(kConv, current_, other, id).activation[0] = kRelu;
      b.step(kActivate, current_, part(to, 0, in.c)).activation[0] = kSigmoid;
      b.step(kMultiply, other, other).in2 = other;
      return replace(to);
    }
    const int32_t more = channels(), other = make({in.h, in.w, more});
    const int32_t id = conv(in.c, more, 1, {1, 1, 0, 1});
    b.step(kConv, current_, other, id).activation[0] = kRelu;
    const int32_t to = make({in.h, in.w, in.c + more}), skip = s_.below(more);
    b.step(kCopy, current_, to);
    b.step(kCopy, other, to).ints[0] = in.c;
    if (skip) b.steps.back().ints[0] = in.c + skip, b.steps.back().ints[1] = skip;
    // What a copy leaves out must be there all the same.
    if (skip) b.step(kCopy, other, to).ints[0] = in.c;
    drop(other);
    if (s_.chance(30)) {
      replace(to);
      return shuffle();
    }
    replace(to);
  }

  // Channels of two halves by turns (of an odd number the first half is larger), or back.
  void shuffle() {
    const Size in = size(current_);
    const int32_t to = make(in), half = (in.c + 1) / 2;
    const bool back = s_.chance(30);
    b.step(kCopy, current_, to);
    for (int32_t i = 0; i < 2 && i < in.c; ++i) {
      Step& step = b.step(kCopy, current_, to);
      step.ints[0] = back ? i * half : i, step.ints[1] = back ? i : i * half;
      step.ints[2] = back ? 1 : 2, step.ints[3] = back ? 2 : 1;
    }
    replace(to);
  }

  // A convolution whose kernel is mixed for each image, with coefficients that another convolution makes from the mean.
  int32_t mixed(int32_t in, int32_t out, const Window& w, int32_t grid) {
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
  void fused(int32_t in, int32_t out, const Window& w, int32_t grid) {
    const int32_t rank = s_.pick({1, 3, 16, 20, 33});
    fused(in, out, w, grid, rank, from_mean(in, size(out).c + rank * rank));
  }
  void fused(int32_t in, int32_t out, const Window& w, int32_t grid, int32_t rank, int32_t coefficients) {
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
  void dynamic() {
    const Size in = size(current_);
    const Window w = window(in.h, in.w, false);
    const int32_t to = make({w.of(in.h), w.of(in.w), s_.chance(50) ? in.c : channels()});
    if (s_.chance(50)) fused(current_, to, w, -1);
    else mixed(current_, to, w, -1);
    replace(to);
  }

  // The mask that one grid needs for what reads it.
  int32_t needed(int32_t grid, int32_t conv_id, Size in) {
    const int32_t from = b.grid(in.h, in.w);
    Step& step = b.step(kDilate, -1, -1, conv_id);
    step.grid = grid, step.grid2 = from;
    return from;
  }
  int32_t decide(Size out, const Window& w) {
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

  Step& masked_conv(int32_t in, int32_t out, int32_t id, int32_t grid, int32_t partial) {
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
  void masked() {
    const Size in = size(current_);
    const bool same = s_.chance(60);
    Window w = window(in.h, in.w, same);
    if (!same && s_.chance(50)) w = {3, 2, 1, 1};
    if (w.of(in.h) < 1 || w.of(in.w) < 1) w = {1, 1, 0, 1};
    const Size out{w.of(in.h), w.of(in.w), same ? in.c : channels()};
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
  int32_t project(Size out, const Window& w, int32_t grid, int32_t after) {
    const Size in = size(current_);
    const int32_t to = make(out), id = conv(in.c, out.c, 1, {w.kernel, w.stride, w.padding, w.dilation});
    split_ = s_.chance(40);
    if (!split_) {
      b.step(kConv, current_, to, id);
      return to;
    }
    b.grids[grid].closed = 1;
    Step& closed = b.step(kConv, current_, to, id);
    closed.grid = grid, closed.closed = 1, closed.activation[0] = after;
    b.step(kConv, current_, to, id).grid = grid;
    return to;
  }
  void close(int32_t from, int32_t to, int32_t grid, int32_t after) {
    b.grids[grid].closed = 1;
    Step& step = b.step(kActivate, from, to);
    step.grid = grid, step.closed = 1, step.activation[0] = after;
  }

  void run_branch(int32_t kind, int32_t to, const Window& w, int32_t grid, Size out) {
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

  void mask_value(int32_t grid, Size out) {
    const int32_t mask = column(out.h, out.w), act = activation();
    b.step(kMaskValue, -1, mask).grid = grid;
    Step& step = b.step(kMultiply, current_, current_);
    step.in2 = mask, step.activation[0] = act;
  }

  // Blocks whose channels or positions are given up for good (random_gated.h).
  int32_t decide_channels(int32_t groups);
  Step& narrow(int32_t kind, int32_t in, int32_t out, int32_t id, int32_t grid, bool ins, bool outs);
  int32_t narrow_middle(int32_t from, int32_t groups, int32_t grid, const Window& w);
  void narrow_convs(int32_t groups, int32_t grid);
  void narrow_inverted(int32_t groups, int32_t grid);
  void channel_gate();
  int32_t scores();
  int32_t still_awake(int32_t score);
  void halting();

  Source& s_;
  int32_t current_ = -1;
  bool split_ = false;
  std::vector<std::pair<int64_t, int64_t>> dead_;
};

#include "random_gated.h"
