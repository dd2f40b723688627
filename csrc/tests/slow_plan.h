// What a step must compute, one element at a time, from what its operands held before.

#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "plan_builder.h"

// The memory of a run as a test sees it: a copy, or the arena and the tensors themselves.
struct Memory {
  std::vector<float> arena;
  std::vector<std::vector<float>> externals;
  int64_t images;

  static int64_t element_bytes(const Value& v) { return v.dtype == kBfloat16 ? 2 : 4; }
  char* element(const Value& v, int64_t row, int64_t channel) {
    float* base = v.external >= 0 ? externals[v.external].data() : arena.data() + v.offset / 4 * images;
    return reinterpret_cast<char*>(base) + (v.first + row * v.stride + channel) * element_bytes(v);
  }
  float* row(const Value& v, int64_t row) { return reinterpret_cast<float*>(element(v, row, 0)); }  // of float32
  float at(const Value& v, int64_t row, int64_t channel) {
    const char* from = element(v, row, channel);
    return v.dtype == kBfloat16 ? from_bfloat16(*reinterpret_cast<const uint16_t*>(from)) : *reinterpret_cast<const float*>(from);
  }
};

struct Mask {
  std::vector<uint8_t> need;  // [N * h * w]
  int64_t open() const { return std::count(need.begin(), need.end(), 1); }
};

// The rows that a step writes, `channels` numbers each from `channel` on, and how large the sums behind them were.
struct Written {
  int32_t value = -1, channel = 0, channels = 0, step = 1;
  std::vector<uint8_t> rows;    // 1: must be as wanted; 0: must stay; 2: may hold anything
  std::vector<int32_t> filled;  // channels of each row that are written, the others stay; empty: all of them
  std::vector<double> want;
  double scale = 1e-6;
  double error = 2e-5;          // that is let pass, as a part of the scale
  bool spoilt = false;          // a mask was decided from logits that are NaN
};

inline double activated(double v, int32_t activation) {
  const auto clamp = [](double x, double most) { return x < 0 ? 0 : x > most ? most : x; };
  switch (kind_of(activation)) {
    case kRelu: return v < 0 ? 0 : v;
    case kRelu6: return clamp(v, 6);
    case kSilu: return v / (1 + std::exp(-v));
    case kHardswish: return v * clamp(v + 3, 6) / 6;
    case kSigmoid: return 1 / (1 + std::exp(-v));
    case kHardsigmoid: return clamp(v + 3, 6) / 6;
    case kGelu: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case kLeakyRelu: return v < 0 ? v * slope_of(activation) : v;
    case kTanh: return std::tanh(v);
    case kElu: return v < 0 ? std::expm1(v) : v;
    case kMish: return v * std::tanh(std::log1p(std::exp(std::min(v, 500.0))));
    case kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    default: return v;
  }
}

class SlowPlan {
 public:
  SlowPlan(const PlanBuilder& plan, Memory& memory, const std::vector<int32_t>& planes,
           const std::map<int32_t, std::vector<uint8_t>>& forced)
      : plan_(plan), memory_(memory), planes_(planes), forced_(forced), masks_(plan.grids.size()) {}

  const Mask& mask(int32_t grid) const { return masks_[grid]; }

  Written step(const Step& s) {
    Written out;
    if (s.kind == kThreshold) out.spoilt = threshold(s);
    if (s.kind == kDilate) dilate(s);
    if (s.out < 0) return out;
    const Value& to = value(s.out);
    out.value = s.out, out.channels = to.channels;
    out.rows = rows_of(s);
    if (s.kind == kCopy) {
      out.channel = s.ints[0];
      out.step = std::max(s.ints[2], 1);
      out.channels = std::min((value(s.in).channels - s.ints[1] - 1) / std::max(s.ints[3], 1), (to.channels - s.ints[0] - 1) / out.step) + 1;
    }
    out.want.assign(out.rows.size() * out.channels, 0);
    // These take 1 from a sum near 1, so that their error is that of 1.
    for (const int32_t a : {s.activation[0], s.activation[1], s.activation[2], s.final_activation})
      if (a == kTanh || a == kElu) out.scale = std::max(out.scale, 1.0);
    if (s.kind == kNarrow) out.filled.assign(out.rows.size(), 0);
    if (s.kind == kGate) means_ = gate_means(s);
    if (rounds(s)) out.error = 0.02;
    if (s.kind == kDynamicConv) mix(s);
    for (int64_t row = 0; row < static_cast<int64_t>(out.rows.size()); ++row)
      if (out.rows[row] == 1) compute(s, row, out.want.data() + row * out.channels, out);
    return out;
  }

 private:
  struct Place {
    int64_t image, y, x;
  };

  const Value& value(int32_t id) const { return plan_.values[id]; }
  const Conv& conv(int32_t id) const { return plan_.convs[id]; }
  Place place(const Value& v, int64_t row) const {
    return {row / (int64_t{v.height} * v.width), row / v.width % v.height, row % v.width};
  }
  // One element of an operand; NaN-proof zeros outside of the map.
  double at(int32_t id, int64_t image, int64_t y, int64_t x, int64_t c) const {
    const Value& v = value(id);
    if (y < 0 || y >= v.height || x < 0 || x >= v.width) return 0;
    if (v.external >= 0 && planes_[v.external])
      return memory_.externals[v.external][((image * v.channels + c) * v.height + y) * v.width + x];
    return memory_.at(v, (image * v.height + y) * v.width + x, c);
  }

  std::vector<uint8_t> rows_of(const Step& s) const {
    const Value& to = value(s.out);
    std::vector<uint8_t> rows(memory_.images * to.height * to.width, 1);
    if (s.grid < 0 || s.kind == kMean || s.kind == kMaskValue || s.kind == kNarrow) return rows;
    const std::vector<uint8_t>& need = masks_[s.grid].need;
    for (size_t i = 0; i < rows.size(); ++i)
      if (need[i] == (s.closed ? 1 : 0)) rows[i] = fills(s) ? 1 : s.run_all_above < 1 ? 2 : 0;
    return rows;
  }

  // Rounds on the way: a gate's weights, patches and weights of Winograd, hidden channels, a picture.
  bool rounds(const Step& s) const {
    if (s.kind == kStem) return value(s.out).dtype == kBfloat16;
    const bool inside = s.kind == kGate || s.kind == kInverted || (s.kind == kConv && conv(s.conv[0]).winograd);
    return inside && value(s.in).dtype == kBfloat16;
  }

  // Closed rows get what is added to the others.
  static bool fills(const Step& s) { return s.kind == kInverted && s.ints[1]; }

  bool threshold(const Step& s) {
    bool spoilt = false;
    const Grid& grid = plan_.grids[s.grid];
    std::vector<uint8_t>& need = masks_[s.grid].need;
    const auto forced = forced_.find(s.grid);
    const Value& logits = value(s.in);
    const int64_t area = int64_t{grid.height} * grid.width, groups = logits.height * logits.width == 1 ? area : 1;
    need.resize(memory_.images * area);
    for (size_t i = 0; i < need.size(); ++i) {
      const float logit = memory_.row(logits, i / groups)[i % groups];
      need[i] = forced != forced_.end() ? forced->second[i] : logit >= s.floats[0];
      if (s.grid2 >= 0 && !masks_[s.grid2].need[i]) need[i] = 0;
      else spoilt |= forced == forced_.end() && std::isnan(logit);
    }
    return spoilt;
  }
  void dilate(const Step& s) {
    const Grid &out = plan_.grids[s.grid], &in = plan_.grids[s.grid2];
    const Conv& c = conv(s.conv[0]);
    std::vector<uint8_t>& need = masks_[s.grid2].need;
    const auto forced = forced_.find(s.grid2);
    need.assign(memory_.images * in.height * in.width, 0);
    if (forced != forced_.end()) need = forced->second;
    else
      for (int64_t p = 0; p < static_cast<int64_t>(masks_[s.grid].need.size()); ++p) {
        if (!masks_[s.grid].need[p]) continue;
        const int64_t image = p / (int64_t{out.height} * out.width);
        for (int i = 0; i < c.kernel[0]; ++i)
          for (int j = 0; j < c.kernel[1]; ++j) {
            const int64_t y = p / out.width % out.height * c.stride[0] - c.padding[0] + int64_t{i} * c.dilation[0];
            const int64_t x = p % out.width * c.stride[1] - c.padding[1] + int64_t{j} * c.dilation[1];
            if (y >= 0 && y < in.height && x >= 0 && x < in.width) need[(image * in.height + y) * in.width + x] = 1;
          }
      }
  }

  // Element [o][k][tap] of packed weights.
  static double weight(const Conv& c, int64_t o, int64_t k, int64_t tap, int32_t dtype = kFloat32) {
    const int64_t outs = c.out_channels / c.groups, per = c.in_channels / c.groups, panels = (outs + 31) / 32;
    const int64_t panel = o / outs * panels + o % outs / 32, taps = int64_t{c.kernel[0]} * c.kernel[1];
    if (dtype == kBfloat16)
      return from_bfloat16(static_cast<const uint16_t*>(c.weight)[(((panel * taps + tap) * ((per + 1) / 2) + k / 2) * 32 + o % outs % 32) * 2 + k % 2]);
    return static_cast<const float*>(c.weight)[((panel * taps + tap) * per + k) * 32 + o % outs % 32];
  }
  // A stem's in bfloat16 has lines as taps, and what it reads of a line as their channels.
  static double stem_weight(const Conv& c, int64_t o, int64_t k, int64_t tap) {
    Conv lines = c;
    lines.in_channels *= c.kernel[1], lines.kernel[1] = 1;
    return weight(lines, o, tap % c.kernel[1] * c.in_channels + k, tap / c.kernel[1], kBfloat16);
  }
  static double depthwise_weight(const Conv& c, int64_t o, int tap, int32_t dtype) {
    if (dtype != kBfloat16) return static_cast<const float*>(c.weight)[int64_t{tap} * c.out_channels + o];
    const int64_t rows = c.kernel[0], columns = c.kernel[1], row = tap / columns, column = tap % columns;
    const int64_t pairs = rows / 2 * columns + rows % 2 * ((columns + 1) / 2);
    const bool alone = row / 2 * 2 + 1 == rows;  // a last odd row, whose columns pair up
    const int64_t pair = row / 2 * columns + (alone ? column / 2 : column), side = alone ? column % 2 : row % 2;
    const int64_t lane = o % 8 / 4 * 16 + o % 32 / 8 * 4 + o % 4;
    return from_bfloat16(static_cast<const uint16_t*>(c.weight)[((o / 32 * pairs + pair) * 32 + lane) * 2 + side]);
  }
  static double bias(const Conv& c, int64_t o) {
    const int64_t outs = c.out_channels / c.groups;
    return c.bias[(o / outs * ((outs + 31) / 32) + o % outs / 32) * 32 + o % outs % 32];
  }

  // Sum over the taps of `f(y, x, tap)`, for output position (y, x).
  template <typename F>
  static void taps(const Conv& c, int64_t y, int64_t x, F&& f) {
    for (int i = 0; i < c.kernel[0]; ++i)
      for (int j = 0; j < c.kernel[1]; ++j)
        f(y * c.stride[0] - c.padding[0] + int64_t{i} * c.dilation[0],
          x * c.stride[1] - c.padding[1] + int64_t{j} * c.dilation[1], i * c.kernel[1] + j);
  }

  void compute(const Step& s, int64_t row, double* want, Written& out) {
    const Value& to = value(s.out);
    const Place p = place(to, row);
    const int64_t channels = out.channels;
    double scale = 0;
    switch (s.kind) {
      case kConv: case kStem: case kDynamicConv: convolve(s, p, want, scale); break;
      case kDepthwise: depthwise(s, p, want, scale); break;
      case kInverted: inverted(s, p, want, scale); break;
      case kChannelFusion: fusion(s, p, want, scale); break;
      case kFusionFactors: factors(s, p.image, want, scale); break;
      case kRouter: router(s, p.image, want, scale); break;
      case kNarrow: out.filled[row] = static_cast<int32_t>(narrow(s, p, want, scale)); break;
      case kMaxPool: case kAvgPool: pool(s, p, want); break;
      case kMean: mean(s, p, want, scale); break;
      case kAdd: case kMultiply:
        for (int64_t c = 0; c < channels; ++c) {
          const Value& b = value(s.in2);
          const bool one = b.height * b.width == 1;
          const double left = at(s.in, p.image, p.y, p.x, c);
          const double right = at(s.in2, p.image, one ? 0 : p.y, one ? 0 : p.x, b.channels == 1 ? 0 : c);
          const double share = s.aux[0] >= 0 ? at(s.aux[0], p.image, p.y, p.x, 0) : s.ints[0] ? -1 : 1;
          const double term = share == 0 ? 0 : share * right;
          // Rows of weight 0 that have their activation stay.
          const bool stays = s.kind == kAdd && s.ints[1] && share == 0;
          want[c] = activated(s.kind == kAdd ? left + term : left * right, stays ? int32_t{kNone} : s.activation[0]);
          scale = std::max({scale, std::fabs(left), s.kind == kAdd ? std::fabs(term) : std::fabs(right)});
        }
        break;
      case kLayout: case kActivate:
        for (int64_t c = 0; c < channels; ++c)
        {
          const double x = at(s.in, p.image, p.y, p.x, c), scaled = x * s.floats[0];
          if (s.kind == kActivate && s.ints[0] == 2) {
            want[c] = x < 0 ? x * conv(s.conv[0]).bias[c] : x;
            continue;
          }
          const bool affine = s.kind == kActivate && s.ints[0];
          // What an activation makes of large numbers may be as small as its own error.
          if (s.kind == kActivate) scale = std::max(scale, std::fabs(x));
          if (affine) scale = std::max({scale, std::fabs(scaled), std::fabs(double(s.floats[1]))});
          want[c] = activated(affine ? scaled + s.floats[1] : x, s.kind == kLayout ? int32_t{kNone} : s.activation[0]);
        }
        break;
      case kGate: {
        const Conv& c = conv(s.conv[0]);
        double sum = c.bias[0] + means_[p.image];
        const Value& in = value(s.in);
        taps(c, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
          if (s.ints[1] && y >= 0 && y < in.height && x >= 0 && x < in.width) sum += c.bias[1 + tap];
          for (int64_t k = 0; k < c.in_channels; ++k)
            sum += at(s.in, p.image, y, x, k) * static_cast<const float*>(c.weight)[tap * c.in_channels + k];
        });
        want[0] = sum;
        scale = 10;
        break;
      }
      case kMaskValue:
        for (int64_t c = 0; c < channels; ++c) want[c] = masks_[s.grid].need[row * channels + c];
        break;
      case kLayerNorm: norm(s, p, want); scale = 10; break;
      case kSoftmax:
        for (int64_t start = 0; start < channels; start += s.ints[0]) {
          double most = -INFINITY, sum = 0;
          for (int64_t c = start; c < start + s.ints[0]; ++c) most = std::max(most, at(s.in, p.image, p.y, p.x, c) * s.floats[0]);
          for (int64_t c = start; c < start + s.ints[0]; ++c) sum += want[c] = std::exp(at(s.in, p.image, p.y, p.x, c) * s.floats[0] - most);
          for (int64_t c = start; c < start + s.ints[0]; ++c) want[c] /= sum;
        }
        break;
      case kResample: resample(s, p, want); break;
      case kCopy:
        for (int64_t c = 0; c < channels; ++c) want[c] = at(s.in, p.image, p.y, p.x, c * std::max(s.ints[3], 1) + s.ints[1]);
        break;
      default: break;
    }
    for (int64_t c = 0; c < channels; ++c)
      if (std::fabs(want[c]) > scale) scale = std::fabs(want[c]);
    out.scale = std::max(out.scale, scale);
  }

  void resample(const Step& s, const Place& p, double* want) const {
    const Conv& c = conv(s.conv[0]);
    const Value& to = value(s.out);
    const auto* table = static_cast<const float*>(c.weight);
    const int64_t lines = std::max(s.ints[0], 1), columns = std::max(s.ints[1], 1);
    const int64_t part = (p.y + s.ints[2]) % lines * columns + (p.x + s.ints[3]) % columns;
    for (int64_t i = p.y * c.kernel[0]; i < (p.y + 1) * c.kernel[0]; ++i)
      for (int64_t j = p.x * c.kernel[1]; j < (p.x + 1) * c.kernel[1]; ++j) {
        const float *down = table + 2 * i, *across = table + 2 * (int64_t{to.height} * c.kernel[0] + j);
        const double factor = double(down[1]) * across[1];
        if (factor == 0) continue;
        for (int64_t k = 0; k < to.channels; ++k)
          want[k] += factor * at(s.in, p.image, static_cast<int64_t>(down[0]), static_cast<int64_t>(across[0]), part * to.channels + k);
      }
  }

  // t = activation[0](sum); t += in2; final_activation(t).
  double finish(const Step& s, const Place& p, int64_t c, double sum, int32_t activation, double& scale) const {
    scale = std::max(scale, std::fabs(sum));
    sum = activated(sum, activation);
    if (s.in2 >= 0) sum += at(s.in2, p.image, p.y, p.x, c);
    return activated(sum, s.final_activation);
  }

  void convolve(const Step& s, const Place& p, double* want, double& scale) {
    const Conv& c = conv(s.conv[0]);
    const int64_t per = c.in_channels / c.groups, outs = c.out_channels / c.groups;
    const int32_t dtype = value(s.in).dtype;
    const bool lines = s.kind == kStem && value(s.out).dtype == kBfloat16;
    for (int64_t o = 0; o < c.out_channels; ++o) {
      double sum = s.kind == kDynamicConv ? mixed_bias(s, p.image, o) : bias(c, o), size = 0;
      taps(c, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
        for (int64_t k = 0; k < per; ++k) {
          const double w = s.kind == kDynamicConv ? mixed_weight(s, p.image, o, k, tap)
                           : lines            ? stem_weight(c, o, k, tap)
                                              : weight(c, o, k, tap, dtype);
          const double term = at(s.in, p.image, y, x, o / outs * per + k) * w;
          sum += term, size += std::fabs(term);
        }
      });
      scale = std::max(scale, size);
      want[o] = finish(s, p, o, sum, s.activation[0], scale);
    }
  }

  void depthwise(const Step& s, const Place& p, double* want, double& scale) {
    const Conv& c = conv(s.conv[0]);
    for (int64_t o = 0; o < c.out_channels; ++o) {
      double sum = c.bias[o];
      taps(c, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
        sum += at(s.in, p.image, y, x, o) * depthwise_weight(c, o, tap, value(s.in).dtype);
      });
      want[o] = finish(s, p, o, sum, s.activation[0], scale);
    }
  }

  void inverted(const Step& s, const Place& p, double* want, double& scale) {
    const Conv& middle = conv(s.conv[1]);
    const Value &in = value(s.in), &to = value(s.out);
    if (fills(s) && !masks_[s.grid].need[(p.image * to.height + p.y) * to.width + p.x]) {
      for (int64_t c = 0; c < to.channels; ++c)
        want[c] = activated(at(s.in2, p.image, p.y, p.x, c), s.ints[1] == 2 ? s.final_activation : int32_t{kNone});
      return;
    }
    const int64_t hidden = middle.out_channels, channels = in.channels;
    std::vector<double> sums(hidden);
    for (int64_t o = 0; o < hidden; ++o) sums[o] = middle.bias[o];
    taps(middle, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
      if (y < 0 || y >= in.height || x < 0 || x >= in.width) return;
      for (int64_t o = 0; o < hidden; ++o) {
        double v = s.conv[0] < 0 ? at(s.in, p.image, y, x, o) : expansion(s, p.image, o, -1);
        if (s.conv[0] >= 0) {
          for (int64_t k = 0; k < channels; ++k) v += at(s.in, p.image, y, x, k) * expansion(s, p.image, o, k);
          if (s.ints[0] == 2) v = v * scalar(s.aux[0], p.image, o) + latents(s, p.image, y * in.width + x, o);
          v = activated(v, s.activation[0]);
        }
        sums[o] += v * depthwise_weight(middle, o, tap, in.dtype);
      }
    });
    if (s.conv[2] < 0 || s.ints[0]) {
      for (int64_t o = 0; o < hidden; ++o) want[o] = activated(sums[o], s.activation[1]), scale = std::max(scale, std::fabs(sums[o]));
      return;
    }
    const Conv& project = conv(s.conv[2]);
    for (int64_t o = 0; o < project.out_channels; ++o) {
      double sum = bias(project, o), size = 0;
      for (int64_t k = 0; k < hidden; ++k) {
        const double term = activated(sums[k], s.activation[1]) * weight(project, o, k, 0, in.dtype);
        sum += term, size += std::fabs(term);
      }
      scale = std::max(scale, size);
      want[o] = finish(s, p, o, sum, s.activation[2], scale);
    }
  }

  // Weights that depend on the image (slow_dynamic.h).
  double latents(const Step& s, int64_t image, int64_t pixel, int64_t o) const;
  double expansion(const Step& s, int64_t image, int64_t o, int64_t k) const;
  void factors(const Step& s, int64_t image, double* want, double& scale);
  std::vector<double> layer(const Step& s, int i, const std::vector<double>& x, double& scale) const;
  void router(const Step& s, int64_t image, double* want, double& scale) const;
  void fusion(const Step& s, const Place& p, double* want, double& scale);
  void mix(const Step& s);
  double share(const Step& s, int64_t image, int64_t o, int64_t e) const;
  static double expert(const Conv& c, int64_t o, int64_t k, int64_t t, int64_t e, int64_t experts);
  double mixed_weight(const Step& s, int64_t image, int64_t o, int64_t k, int64_t t) const;
  double mixed_bias(const Step& s, int64_t image, int64_t o) const;

  // The channels that a narrow step writes, and how many they are (slow_narrow.h).
  std::vector<int64_t> open_channels(const Step& s, int64_t image, int64_t channels, bool decided) const;
  int64_t narrow(const Step& s, const Place& p, double* want, double& scale) const;
  int64_t narrow_inverted(const Step& s, const Place& p, double* want, double& scale) const;

  void pool(const Step& s, const Place& p, double* want) {
    const Conv& c = conv(s.conv[0]);
    const Value& in = value(s.in);
    for (int64_t k = 0; k < in.channels; ++k) {
      double most = -INFINITY, sum = 0;
      int64_t inside = 0, window = 0;
      taps(c, p.y, p.x, [&](int64_t y, int64_t x, int) {
        window += y < in.height + c.padding[0] && x < in.width + c.padding[1];
        if (y < 0 || y >= in.height || x < 0 || x >= in.width) return;
        const double v = at(s.in, p.image, y, x, k);
        most = v > most || std::isnan(v) ? v : most;
        sum += v, ++inside;
      });
      want[k] = s.kind == kMaxPool ? most : sum / double(s.ints[0] ? window : inside);
    }
  }

  void mean(const Step& s, const Place& p, double* want, double& scale) {
    const Value &in = value(s.in), &out = value(s.out);
    const auto last = [](int64_t bin, int64_t size, int64_t bins) { return ((bin + 1) * size + bins - 1) / bins; };
    for (int64_t c = 0; c < in.channels; ++c) {
      double sum = 0, size = 0;
      int64_t count = 0;
      for (int64_t y = p.y * in.height / out.height; y < last(p.y, in.height, out.height); ++y)
        for (int64_t x = p.x * in.width / out.width; x < last(p.x, in.width, out.width); ++x) {
          if (s.grid >= 0 && !masks_[s.grid].need[(p.image * in.height + y) * in.width + x]) continue;
          const double term = at(s.in, p.image, y, x, c);
          sum += term, size += std::fabs(term), ++count;
        }
      want[c] = count ? sum / double(count) : 0;
      if (count && size / double(count) > scale) scale = size / double(count);
    }
  }

  std::vector<double> gate_means(const Step& s) const {
    const Conv& c = conv(s.conv[0]);
    const Value& in = value(s.in);
    std::vector<double> means(memory_.images);
    if (!s.ints[0]) return means;
    const float* linear = static_cast<const float*>(c.weight) + c.kernel[0] * c.kernel[1] * c.in_channels;
    for (int64_t n = 0; n < memory_.images; ++n) {
      for (int64_t q = 0; q < int64_t{in.height} * in.width; ++q)
        for (int64_t k = 0; k < in.channels; ++k) means[n] += at(s.in, n, q / in.width, q % in.width, k) * linear[k];
      means[n] /= double(in.height) * in.width;
    }
    return means;
  }

  void norm(const Step& s, const Place& p, double* want) {
    const Conv& c = conv(s.conv[0]);
    double mean = 0, square = 0;
    for (int64_t k = 0; k < c.in_channels; ++k) mean += at(s.in, p.image, p.y, p.x, k) / c.in_channels;
    for (int64_t k = 0; k < c.in_channels; ++k) square += std::pow(at(s.in, p.image, p.y, p.x, k) - mean, 2) / c.in_channels;
    for (int64_t k = 0; k < c.in_channels; ++k)
      want[k] = (at(s.in, p.image, p.y, p.x, k) - mean) / std::sqrt(square + s.floats[0]) * static_cast<const float*>(c.weight)[k] +
                c.bias[k];
  }

  double scalar(int32_t id, int64_t image, int64_t index) const { return memory_.row(value(id), image)[index]; }

  const PlanBuilder& plan_;
  Memory& memory_;
  const std::vector<int32_t>& planes_;
  const std::map<int32_t, std::vector<uint8_t>>& forced_;
  std::vector<Mask> masks_;
  std::vector<double> means_, mixed_;
};

#include "slow_dynamic.h"
#include "slow_narrow.h"
