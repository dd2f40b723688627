// What steps must compute whose weights depend on the image. A part of slow_plan.h, which includes it.

#pragma once

#include "slow_plan.h"

// What the latent row of a pixel gives to an output.
inline double SlowPlan::latents(const Step& s, int64_t image, int64_t pixel, int64_t o) const {
  const Conv& add = conv(s.conv[2]);
  const int64_t rank = add.in_channels, row = (add.out_channels + 31) / 32 * 32 + pixel * ((rank + 15) / 16 * 16);
  double sum = bias(add, o);
  for (int64_t l = 0; l < rank; ++l) sum += scalar(s.aux[0], image, row + l) * weight(add, o, l, 0);
  return sum;
}

// Weight of an expansion, or its bias for k = -1.
inline double SlowPlan::expansion(const Step& s, int64_t image, int64_t o, int64_t k) const {
  const double own = k < 0 ? bias(conv(s.conv[0]), o) : weight(conv(s.conv[0]), o, k, 0, value(s.in).dtype);
  if (s.ints[0] != 1) return own;
  const Conv& add = conv(s.conv[2]);
  const int64_t rank = add.in_channels, left = (add.out_channels + 31) / 32 * 32 + (1 + k) * ((rank + 15) / 16 * 16);
  double sum = own * scalar(s.aux[0], image, o) + (k < 0 ? bias(add, o) : 0.0);
  for (int64_t l = 0; l < rank; ++l) sum += scalar(s.aux[0], image, left + l) * weight(add, o, l, 0);
  return sum;
}

// Zeros fill the rows up.
inline void SlowPlan::factors(const Step& s, int64_t image, double* want, double& scale) {
  const Conv& reduce = conv(s.conv[1]);
  const int64_t rank = reduce.out_channels, outputs = value(s.aux[0]).channels - rank * rank, row = (rank + 15) / 16 * 16;
  for (int64_t o = 0; o < (outputs + 31) / 32 * 32; ++o) {
    const double given = o < outputs ? scalar(s.aux[0], image, o) : s.ints[4] ? -3 : 0;
    want[o] = s.ints[4] ? std::min(std::max(given + 3, 0.0), 6.0) / 3 : given;
    scale = std::max(scale, std::fabs(want[o]));
  }
  const bool factored = s.in >= 0;
  const int64_t rows = factored ? int64_t{value(s.in).height} * value(s.in).width : 1 + int64_t{reduce.in_channels};
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> given(rank), sizes(rank);
    for (int64_t m = 0; m < rank; ++m) {
      given[m] = r && !factored ? double(static_cast<const float*>(reduce.weight)[(r - 1) * rank + m]) : double(reduce.bias[m]);
      sizes[m] = std::fabs(given[m]);
      for (int64_t k = 0; factored && k < reduce.in_channels; ++k) {
        const double term = at(s.in, image, r / value(s.in).width, r % value(s.in).width, k) * weight(reduce, m, k, 0);
        given[m] += term, sizes[m] += std::fabs(term);
      }
    }
    for (int64_t l = 0; l < rank; ++l) {
      double sum = 0, size = 0;
      for (int64_t m = 0; m < rank; ++m) {
        const double share = scalar(s.aux[0], image, outputs + m * rank + l);
        sum += given[m] * share, size += sizes[m] * std::fabs(share);
      }
      want[(outputs + 31) / 32 * 32 + r * row + l] = sum;
      scale = std::max(scale, size);
    }
  }
}

// A linear layer of a router, of all positions of `x`.
inline std::vector<double> SlowPlan::layer(const Step& s, int i, const std::vector<double>& x, double& scale) const {
  const Conv& c = conv(s.conv[i]);
  std::vector<double> y(c.out_channels);
  const auto taps = static_cast<int64_t>(x.size()) / c.in_channels;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    double sum = bias(c, o), size = std::fabs(sum);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t k = 0; k < c.in_channels; ++k) {
        const double term = x[t * c.in_channels + k] * weight(c, o, k, t);
        sum += term, size += std::fabs(term);
      }
    scale = std::max(scale, size);
    y[o] = activated(sum, s.activation[i]);
  }
  return y;
}

inline void SlowPlan::router(const Step& s, int64_t image, double* want, double& scale) const {
  const Value& in = value(s.in);
  std::vector<double> x;
  for (int64_t q = 0; q < int64_t{in.height} * in.width; ++q)
    for (int64_t c = 0; c < in.channels; ++c) x.push_back(at(s.in, image, q / in.width, q % in.width, c));
  std::vector<double> hidden = layer(s, 0, x, scale);
  if (s.conv[1] >= 0) {
    const std::vector<double> gates = layer(s, 1, hidden, scale);
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] *= gates[i];
  }
  const std::vector<double> y = layer(s, 2, hidden, scale);
  std::copy(y.begin(), y.end(), want);
}

inline void SlowPlan::fusion(const Step& s, const Place& p, double* want, double& scale) {
  const Conv &c = conv(s.conv[0]), &reduce = conv(s.conv[1]), &expand = conv(s.conv[2]);
  const int64_t rank = reduce.out_channels, per = c.in_channels / c.groups, outs = c.out_channels / c.groups;
  const bool factored = s.ints[3] != 0;
  const int64_t y0 = p.y * c.stride[0] - c.padding[0] + int64_t{c.kernel[0] / 2} * c.dilation[0];
  const int64_t x0 = p.x * c.stride[1] - c.padding[1] + int64_t{c.kernel[1] / 2} * c.dilation[1];
  std::vector<double> latent(rank), sizes(rank);
  for (int64_t m = 0; m < rank; ++m) {
    double reduced = reduce.bias[m], size = std::fabs(reduced);
    for (int64_t k = 0; k < c.in_channels; ++k) {
      const double w = factored ? weight(reduce, m, k, 0) : double(static_cast<const float*>(reduce.weight)[k * rank + m]);
      const double term = at(s.in, p.image, y0, x0, k) * w;
      reduced += term, size += std::fabs(term);
    }
    for (int64_t l = 0; l < rank; ++l) {
      const double share = scalar(s.aux[0], p.image, c.out_channels + m * rank + l);
      latent[l] += reduced * share, sizes[l] += size * std::fabs(share);
    }
  }
  Conv grouped = expand;  // its panels follow the groups of the outputs
  grouped.groups = c.groups, grouped.in_channels = expand.in_channels * c.groups;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    double sum = bias(c, o), size = std::fabs(sum), low = bias(grouped, o);
    taps(c, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
      for (int64_t k = 0; k < per; ++k) {
        const double term = at(s.in, p.image, y, x, o / outs * per + k) * (factored ? weight(c, o, k, tap) : expert(c, o, k, tap, 0, 1));
        sum += term, size += std::fabs(term);
      }
    });
    const double given = scalar(s.aux[0], p.image, o), share = s.ints[4] ? std::min(std::max(given + 3, 0.0), 6.0) / 3 : given;
    size *= std::fabs(share);
    for (int64_t l = 0; l < rank; ++l) {
      low += latent[l] * weight(grouped, o, l, 0);
      size += sizes[l] * std::fabs(weight(grouped, o, l, 0));
    }
    scale = std::max(scale, size);
    want[o] = finish(s, p, o, share * sum + low, s.activation[0], scale);
  }
}

// Kernels of every image: [image][o][k][tap].
inline void SlowPlan::mix(const Step& s) {
  const Conv& c = conv(s.conv[0]);
  const int64_t per = c.in_channels / c.groups, count = int64_t{c.kernel[0]} * c.kernel[1], experts = s.ints[0];
  mixed_.assign(memory_.images * c.out_channels * per * count, 0);
  int64_t index = 0;
  for (int64_t n = 0; n < memory_.images; ++n)
    for (int64_t o = 0; o < c.out_channels; ++o)
      for (int64_t k = 0; k < per; ++k)
        for (int64_t t = 0; t < count; ++t, ++index) {
          for (int64_t e = 0; e < experts; ++e) mixed_[index] += share(s, n, o, e) * expert(c, o, k, t, e, experts);
          if (s.aux[1] >= 0) mixed_[index] *= scalar(s.aux[1], n, t);
          if (s.aux[2] >= 0) mixed_[index] *= scalar(s.aux[2], n, o / (c.out_channels / c.groups) * per + k);
          if (s.aux[3] >= 0) mixed_[index] *= scalar(s.aux[3], n, o);
        }
}

inline double SlowPlan::share(const Step& s, int64_t image, int64_t o, int64_t e) const {
  if (s.aux[0] < 0) return 1;
  return scalar(s.aux[0], image, s.ints[1] ? o * s.ints[0] + e : e);
}

inline double SlowPlan::expert(const Conv& c, int64_t o, int64_t k, int64_t t, int64_t e, int64_t experts) {
  const int64_t outs = c.out_channels / c.groups, per = c.in_channels / c.groups, panels = (outs + 31) / 32;
  const int64_t count = int64_t{c.kernel[0]} * c.kernel[1];
  const auto* weight = static_cast<const float*>(c.weight);
  if (c.groups > 1 && per == 1 && outs == 1) return weight[((o / 32 * count + t) * experts + e) * 32 + o % 32];
  const int64_t panel = o / outs * panels + o % outs / 32;
  return weight[(((panel * per + k) * count + t) * experts + e) * 32 + o % outs % 32];
}

inline double SlowPlan::mixed_weight(const Step& s, int64_t image, int64_t o, int64_t k, int64_t t) const {
  const Conv& c = conv(s.conv[0]);
  const int64_t per = c.in_channels / c.groups;
  return mixed_[((image * c.out_channels + o) * per + k) * c.kernel[0] * c.kernel[1] + t];
}

inline double SlowPlan::mixed_bias(const Step& s, int64_t image, int64_t o) const {
  const Conv& c = conv(s.conv[0]);
  const int64_t outs = c.out_channels / c.groups;
  const bool single = c.groups > 1 && outs == 1 && c.in_channels == c.groups;
  const int64_t panel = single ? o / 32 : o / outs * ((outs + 31) / 32) + o % outs / 32, column = single ? o % 32 : o % outs % 32;
  double sum = c.bias[panel * 32 + column];
  if (s.conv[1] < 0) return sum;
  const auto* biases = static_cast<const float*>(conv(s.conv[1]).weight);
  for (int64_t e = 0; e < s.ints[0]; ++e) sum += share(s, image, o, e) * biases[(panel * s.ints[0] + e) * 32 + column];
  return sum;
}
