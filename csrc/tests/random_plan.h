// Draws small valid plans: chains of every kind of step, masked blocks, results in place, memory that is used again.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../kernels/isa.h"
#include "plan_builder.h"
#include "random_source.h"

class RandomPlan {
 public:
  PlanBuilder b;
  std::vector<int32_t> planes;  // of each external: 1 when the image is given as planes
  std::vector<int32_t> gates;   // grids whose decision a call may replace
  bool sliced = false;          // some value may lie otherwise in the arena where nobody looks between two steps

  bool finite = false;          // some step multiplies numbers beside those that it needs by 0: they must be numbers

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
  int32_t activation() {
    if (s_.chance(8)) return kLeakyRelu + ((1 + s_.below((1 << 24) - 1)) << kSlopeShift);
    return s_.chance(40) ? int32_t{kNone} : s_.below(kActivations);
  }

  // Memory: now and then the place of a value that nobody reads any more.
  int32_t make(Size size, int32_t dtype = kFloat32) {
    const bool single = size.h * size.w * size.c == 1;
    const int32_t first = single || s_.chance(80) ? 0 : s_.pick({1, 3, 16});
    const int32_t stride = first + size.c + (single ? 0 : s_.pick({0, 0, 0, 1, 16}));
    const int64_t bytes = (int64_t{size.h} * size.w * stride * 4 + 63) / 64 * 64;
    for (size_t i = 0; i < dead_.size() && s_.chance(70); ++i) {
      if (dead_[i].second < bytes) continue;
      const int64_t arena = b.arena;
      const int32_t id = b.value(size.h, size.w, size.c, false, stride);
      b.arena = arena, b.values[id].offset = dead_[i].first, b.values[id].first = first, b.values[id].dtype = dtype;
      dead_.erase(dead_.begin() + static_cast<int64_t>(i));
      return id;
    }
    const int32_t id = b.value(size.h, size.w, size.c, false, stride);
    b.values[id].first = first, b.values[id].dtype = dtype;
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
  int32_t conv(int32_t in, int32_t out, int32_t groups, const Window& w, int32_t dtype = kFloat32) {
    const int64_t taps = int64_t{w.kernel} * w.kernel;
    return b.conv(weights(out, in / groups * taps), s_.noise(out), in, out, groups, w.kernel, w.stride, w.padding, w.dilation, dtype);
  }
  int32_t depthwise(int32_t c, const Window& w, int32_t dtype = kFloat32) {
    finite |= dtype == kBfloat16;
    if (dtype == kBfloat16)
      return b.depthwise_bfloat16(weights(c, int64_t{w.kernel} * w.kernel), s_.noise(c), c, w.kernel, w.stride, w.padding, w.dilation);
    const int32_t id = b.place(Conv{}, c, w.kernel, w.stride, w.padding, w.dilation);
    b.convs[id].weight = b.keep(weights(c, int64_t{w.kernel} * w.kernel)), b.convs[id].bias = b.keep(s_.noise(c));
    b.convs[id].out_channels = b.convs[id].groups = c;
    return id;
  }
  // Transformed with arithmetic that has nothing in common with the library's.
  void winograd(int32_t id, int32_t dtype = kFloat32) {
    Conv& c = b.convs[id];
    if (c.kernel[0] != 3 || c.stride[0] != 1 || c.dilation[0] != 1 || c.groups != 1) return;
    const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    const int64_t in = c.in_channels, panels = (c.out_channels + 31) / 32;
    std::vector<float> packed(panels * 16 * in * 32);
    const auto weight = [&](int64_t o, int64_t k, int64_t t) {
      const int64_t tap = o / 32 * 9 + t, column = o % 32;
      if (dtype == kFloat32) return static_cast<const float*>(c.weight)[(tap * in + k) * 32 + column];
      return from_bfloat16(static_cast<const uint16_t*>(c.weight)[((tap * ((in + 1) / 2) + k / 2) * 32 + column) * 2 + k % 2]);
    };
    for (int64_t o = 0; o < panels * 32; ++o)
      for (int64_t k = 0; k < in; ++k)
        for (int p = 0; p < 16; ++p) {
          double sum = 0;
          for (int t = 0; t < 9; ++t)
            sum += g[p / 4][t / 3] * g[p % 4][t % 3] * weight(o, k, t);
          packed[((o / 32 * 16 + p) * in + k) * 32 + o % 32] = static_cast<float>(sum);
        }
    c.winograd = dtype == kFloat32 ? static_cast<const void*>(b.keep(packed)) : b.keep_pairs(packed, in);
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
      if (s_.chance(50)) w = {3, s_.pick({1, 2}), 1, 1};
      const bool half = has_bfloat16() && s_.chance(20);
      const int32_t out = make({w.of(image.h), w.of(image.w), channels()}, half ? kBfloat16 : kFloat32);
      // Of a picture in planes only some gates decide.
      const bool decides = !as_planes || (w.kernel == 3 && w.stride <= 2 && w.padding == 1);
      stem(in, out, w, decides && s_.chance(50));
      current_ = out;
      if (half) halves();
    } else {
      current_ = make(image);
      b.step(kLayout, in, current_);
    }
  }
  int32_t first(int32_t in, int32_t out, const Window& w, int32_t dtype) {
    if (dtype == kFloat32) return conv(in, out, 1, w);
    const int64_t depth = int64_t{w.kernel} * w.kernel * in;
    return b.stem_bfloat16(weights(out, depth), s_.noise(out), in, out, w.kernel, w.stride, w.padding);
  }
  // Everywhere, or once where a mask that is decided from the picture is closed, and once where it is open.
  void stem(int32_t in, int32_t out, const Window& w, bool masks) {
    current_ = in;
    const int32_t grid = masks ? decide(size(out), w) : -1;
    for (int32_t closed = masks; closed >= 0; --closed) {
      const int32_t id = first(size(in).c, size(out).c, w, at(out).dtype), act = activation();
      Step& step = b.step(kStem, in, out, id);
      step.grid = grid, step.closed = closed, step.activation[0] = act;
    }
  }
  void end() {
    if (!s_.chance(60)) return;
    const int32_t out = outside(size(current_));
    b.step(kActivate, current_, out).activation[0] = activation();
    current_ = out;
  }

  void block() {
    const int32_t kind = s_.below(19);
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
      case 13: resample(); break;
      case 14: slopes(); break;
      case 12: has_bfloat16() ? halves() : plain_conv(); break;
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

  // The step of an inverted residual from `in` to `out`, in their dtype; its depthwise convolution.
  int32_t inverted(int32_t in, int32_t out, const Window& w) {
    const int32_t c = size(in).c, dtype = at(in).dtype, hidden = s_.chance(25) ? c : s_.pick({4, 16, 33, 48, 70, 130});
    const Window one{1, 1, 0, 1};
    const int32_t first = hidden == c && s_.chance(70) ? -1 : conv(c, hidden, 1, one, dtype), middle = depthwise(hidden, w, dtype);
    const int32_t last = conv(hidden, size(out).c, 1, one, dtype);
    int32_t acts[4];
    for (int32_t& a : acts) a = activation();
    Step& step = b.step(kInverted, in, out, first);
    step.conv[1] = middle, step.conv[2] = last;
    for (int i = 0; i < 3; ++i) step.activation[i] = acts[i];
    step.final_activation = acts[3];
    return middle;
  }
  void plain_inverted() {
    const Size in = size(current_);
    const bool same = s_.chance(50);
    const Window w = window(in.h, in.w, same);
    const int32_t to = make({w.of(in.h), w.of(in.w), same ? in.c : channels()}, at(current_).dtype);
    inverted(current_, to, w);
    if (size(to).h == in.h && size(to).w == in.w && size(to).c == in.c && s_.chance(60)) b.steps.back().in2 = current_;
    replace(to);
  }

  void pool() {
    const Size in = size(current_);
    const int32_t dtype = at(current_).dtype;
    if (s_.chance(30)) {
      const int32_t to = make({1 + s_.below(in.h), 1 + s_.below(in.w), in.c}, dtype);
      b.step(kMean, current_, to);
      return replace(to);
    }
    const Window w = window(in.h, in.w, false);
    int32_t out[2] = {w.of(in.h), w.of(in.w)};
    const int32_t of[2] = {in.h, in.w}, reach = w.dilation * (w.kernel - 1) + 1;
    // With ceil_mode a last window starts inside but hangs over.
    for (int i = 0; i < 2; ++i)
      if (s_.chance(50) && (of[i] + 2 * w.padding - reach) % w.stride && out[i] * w.stride < of[i] + w.padding) ++out[i];
    const int32_t to = make({out[0], out[1], in.c}, dtype), kind = s_.pick({int32_t{kMaxPool}, int32_t{kAvgPool}});
    const int32_t id = b.place(Conv{}, in.c, w.kernel, w.stride, w.padding, w.dilation), padded = s_.below(2);
    Step& step = b.step(kind, current_, to, id);
    step.ints[0] = padded;
    replace(to);
  }

  // Other sizes, borders and orders of positions; blended, or with several positions in each row.
  void resample() {
    const Size in = size(current_);
    int32_t lines = s_.chance(40) ? s_.pick({1, 2, 3}) : 1, columns = s_.chance(40) ? s_.pick({1, 2, 3}) : 1;
    if (in.c % (lines * columns)) lines = columns = 1;
    const bool parts = lines * columns > 1;
    const int32_t out[2] = {1 + s_.below(14), 1 + s_.below(14)}, of[2] = {in.h, in.w};
    const int32_t taps[2] = {parts ? 1 : s_.pick({1, 1, 2, 3}), parts ? 1 : s_.pick({1, 1, 2, 3})};
    std::vector<float> table;
    for (int axis = 0; axis < 2; ++axis)
      for (int32_t i = 0; i < out[axis] * taps[axis]; ++i) {
        table.push_back(static_cast<float>(s_.below(of[axis] + 1) - 1));
        table.push_back(s_.chance(50) ? 1.0f : s_.noise(1)[0]);
      }
    Conv conv{};
    conv.out_channels = static_cast<int32_t>(table.size() / 2), conv.groups = 1, conv.weight = b.keep(table);
    const int32_t to = make({out[0], out[1], in.c / (lines * columns)}), id = b.place(conv, in.c, 1, 1, 0, 1);
    for (int i = 0; i < 2; ++i) b.convs[id].kernel[i] = taps[i];
    Step& step = b.step(kResample, current_, to, id);
    step.ints[0] = lines, step.ints[1] = columns, step.ints[2] = s_.below(lines), step.ints[3] = s_.below(columns);
    replace(to);
  }
  void slopes() {
    const Size in = size(current_);
    Conv each{};
    each.out_channels = in.c, each.groups = 1, each.bias = b.keep(s_.noise(in.c));
    const int32_t id = b.place(each, in.c, 1, 1, 0, 1);
    b.step(kActivate, current_, current_, id).ints[0] = 2;
  }

  // Squeeze and excite; the mean over the open rows of a grid where one is given.
  void squeeze(int32_t grid) {
    const Size in = size(current_);
    const int32_t dtype = at(current_).dtype, mean = make({1, 1, in.c}, dtype), scale = make({1, 1, in.c}, dtype);
    b.step(kMean, current_, mean).grid = grid;
    const int32_t id = conv(in.c, in.c, 1, {1, 1, 0, 1}, dtype);
    b.step(kConv, mean, scale, id).activation[0] = kSigmoid;
    const bool partly = grid >= 0 && s_.chance(50), inside = partly || s_.chance(50);
    const int32_t to = inside ? current_ : make(in, dtype), act = activation();
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

  // Weights that depend on the image (random_dynamic.h).
  int32_t routed(int32_t of, int32_t count);
  int32_t from_mean(int32_t of, int32_t count);
  int32_t factors(int32_t outputs, int32_t rank, bool folded);
  Step& expanded(int32_t to, int32_t mean, int32_t middle);
  void unprojected();
  int32_t mixed(int32_t in, int32_t out, const Window& w, int32_t grid);
  void fused(int32_t in, int32_t out, const Window& w, int32_t grid);
  void fused(int32_t in, int32_t out, const Window& w, int32_t grid, int32_t rank, int32_t coefficients);
  void dynamic();

  // Masked blocks (random_masked.h).
  int32_t needed(int32_t grid, int32_t conv_id, Size in);
  int32_t decide(Size out, const Window& w);
  Step& masked_conv(int32_t in, int32_t out, int32_t id, int32_t grid, int32_t partial);
  void masked();
  int32_t project(Size out, const Window& w, int32_t grid, int32_t after);
  void close(int32_t from, int32_t to, int32_t grid, int32_t after);
  void run_branch(int32_t kind, int32_t to, const Window& w, int32_t grid, Size out);
  void mask_value(int32_t grid, Size out);

  // Steps in bfloat16 (random_halves.h).
  void half_conv();
  void half_pointwise();
  void half_masked();
  void half_inverted();
  void halves();

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

#include "random_dynamic.h"
#include "random_gated.h"
#include "random_halves.h"
#include "random_masked.h"
