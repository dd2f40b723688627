// What a narrow step must compute: the sums of its step over open channels alone, read from and written to the first channels
// of every row. A part of slow_plan.h, which includes it.

#pragma once

#include "slow_plan.h"

// The open ones among `channels`; all of them where the decision is not about them.
inline std::vector<int64_t> SlowPlan::open_channels(const Step& s, int64_t image, int64_t channels, bool decided) const {
  const int64_t groups = plan_.grids[s.grid].width;
  std::vector<int64_t> open;
  for (int64_t c = 0; c < channels; ++c)
    if (!decided || masks_[s.grid].need[image * groups + c * groups / channels]) open.push_back(c);
  return open;
}

inline int64_t SlowPlan::narrow(const Step& s, const Place& p, double* want, double& scale) const {
  if (s.ints[0] == kInverted) return narrow_inverted(s, p, want, scale);
  const Conv& c = conv(s.conv[0]);
  const std::vector<int64_t> ins = open_channels(s, p.image, c.in_channels, s.ints[1]);
  const std::vector<int64_t> outs = open_channels(s, p.image, c.out_channels, s.ints[2]);
  const int64_t per = c.in_channels / c.groups, group_outs = c.out_channels / c.groups;
  for (size_t j = 0; j < outs.size(); ++j) {
    const int64_t o = outs[j], first = o / group_outs * per;
    double sum = s.ints[0] == kDepthwise ? c.bias[o] : bias(c, o), size = 0;
    taps(c, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
      for (size_t i = 0; i < ins.size(); ++i) {
        if (ins[i] < first || ins[i] >= first + per) continue;
        const double w = s.ints[0] == kDepthwise ? static_cast<const float*>(c.weight)[tap * c.out_channels + o] : weight(c, o, ins[i] - first, tap);
        const double term = at(s.in, p.image, y, x, static_cast<int64_t>(i)) * w;
        sum += term, size += std::fabs(term);
      }
    });
    scale = std::max(scale, size);
    want[j] = finish(s, p, static_cast<int64_t>(j), sum, s.activation[0], scale);
  }
  return static_cast<int64_t>(outs.size());
}

inline int64_t SlowPlan::narrow_inverted(const Step& s, const Place& p, double* want, double& scale) const {
  const Conv &expand = conv(s.conv[0]), &middle = conv(s.conv[1]), &project = conv(s.conv[2]);
  const Value& in = value(s.in);
  std::vector<double> sums(project.out_channels), sizes(project.out_channels);
  for (const int64_t h : open_channels(s, p.image, middle.out_channels, true)) {
    double hidden = middle.bias[h];
    taps(middle, p.y, p.x, [&](int64_t y, int64_t x, int tap) {
      if (y < 0 || y >= in.height || x < 0 || x >= in.width) return;
      double v = bias(expand, h);
      for (int64_t k = 0; k < in.channels; ++k) v += at(s.in, p.image, y, x, k) * weight(expand, h, k, 0);
      hidden += activated(v, s.activation[0]) * static_cast<const float*>(middle.weight)[tap * middle.out_channels + h];
    });
    for (int64_t o = 0; o < project.out_channels; ++o) {
      const double term = activated(hidden, s.activation[1]) * weight(project, o, h, 0);
      sums[o] += term, sizes[o] += std::fabs(term);
    }
  }
  for (int64_t o = 0; o < project.out_channels; ++o) {
    scale = std::max(scale, sizes[o]);
    want[o] = finish(s, p, o, bias(project, o) + sums[o], s.activation[2], scale);
  }
  return project.out_channels;
}
