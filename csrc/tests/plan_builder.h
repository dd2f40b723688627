// Builds small plans for tests and keeps their memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "../plan/plan.h"

// The nearest bfloat16, ties to even, as its 16 bits.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct PlanBuilder {
  std::vector<Value> values;
  std::vector<Conv> convs;
  std::vector<Grid> grids;
  std::vector<Step> steps;
  std::deque<std::vector<float>> floats;
  std::deque<std::vector<uint16_t>> halves;
  int64_t arena = 0;
  int32_t externals = 0;

  int32_t value(int32_t h, int32_t w, int32_t c, bool external = false, int32_t stride = 0, int32_t dtype = kFloat32) {
    Value v{};
    v.height = h, v.width = w, v.channels = c, v.stride = stride ? stride : c, v.dtype = dtype, v.external = -1;
    if (external) {
      v.external = externals++;
    } else {
      v.offset = arena;
      arena += (int64_t{h} * w * v.stride * 4 + 63) / 64 * 64;
    }
    values.push_back(v);
    return static_cast<int32_t>(values.size()) - 1;
  }
  int32_t grid(int32_t h, int32_t w, bool closed = false) {
    grids.push_back({h, w, closed, 0});
    return static_cast<int32_t>(grids.size()) - 1;
  }
  float* keep(std::vector<float> data) {
    floats.push_back(std::move(data));
    return floats.back().data();
  }
  // A panel's weights [depth][32] with every row of `channels` in pairs, in bfloat16.
  uint16_t* keep_pairs(const std::vector<float>& packed, int64_t channels) {
    const int64_t even = (channels + 1) / 2 * 2, rows = static_cast<int64_t>(packed.size()) / 32;
    std::vector<uint16_t> pairs(rows / channels * even * 32);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < 32; ++c)
        pairs[(row / channels * even + row % channels / 2 * 2) * 32 + 2 * c + row % channels % 2] = to_bfloat16(packed[row * 32 + c]);
    halves.push_back(std::move(pairs));
    return halves.back().data();
  }
  // weight [O][per][taps] in panels of 32 outputs a group, with the bias padded.
  Conv packed(const std::vector<float>& weight, const std::vector<float>& bias, int32_t out, int32_t groups, int64_t per,
              int64_t taps, int32_t dtype) {
    const int64_t outs = out / groups, panels = (outs + 31) / 32;
    std::vector<float> rows(groups * panels * taps * per * 32), padded(groups * panels * 32);
    for (int64_t o = 0; o < out; ++o) {
      const int64_t g = o / outs, panel = g * panels + o % outs / 32, column = o % outs % 32;
      padded[panel * 32 + column] = bias[o];
      for (int64_t k = 0; k < per; ++k)
        for (int64_t t = 0; t < taps; ++t)
          rows[((panel * taps + t) * per + k) * 32 + column] = weight[(o * per + k) * taps + t];
    }
    Conv c{};
    c.weight = dtype == kFloat32 ? static_cast<const void*>(keep(rows)) : keep_pairs(rows, per);
    c.bias = keep(padded), c.out_channels = out, c.groups = groups;
    return c;
  }
  int32_t place(Conv c, int32_t in, int32_t kernel, int32_t stride, int32_t padding, int32_t dilation) {
    c.in_channels = in;
    for (int i = 0; i < 2; ++i) c.kernel[i] = kernel, c.stride[i] = stride, c.padding[i] = padding, c.dilation[i] = dilation;
    convs.push_back(c);
    return static_cast<int32_t>(convs.size()) - 1;
  }
  // weight [O][I / groups][kh][kw], packed as plan.h says.
  int32_t conv(const std::vector<float>& weight, const std::vector<float>& bias, int32_t in, int32_t out, int32_t groups,
               int32_t kernel, int32_t stride, int32_t padding, int32_t dilation = 1, int32_t dtype = kFloat32) {
    return place(packed(weight, bias, out, groups, in / groups, int64_t{kernel} * kernel, dtype), in, kernel, stride, padding,
                 dilation);
  }
  // A stem in bfloat16: weight [O][I][ky][kx] with ky as the taps and (kx, channel) as their channels.
  int32_t stem_bfloat16(const std::vector<float>& weight, const std::vector<float>& bias, int32_t in, int32_t out,
                        int32_t kernel, int32_t stride, int32_t padding) {
    std::vector<float> turned(weight.size());
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i)
        for (int64_t t = 0; t < kernel; ++t)
          for (int64_t k = 0; k < kernel; ++k)
            turned[((o * kernel + k) * in + i) * kernel + t] = weight[((o * in + i) * kernel + t) * kernel + k];
    return place(packed(turned, bias, out, 1, int64_t{in} * kernel, kernel, kBfloat16), in, kernel, stride, padding, 1);
  }
  // weight [C][kernel][kernel] as pairs of taps, see plan.h.
  int32_t depthwise_bfloat16(const std::vector<float>& weight, const std::vector<float>& bias, int32_t channels, int32_t kernel,
                             int32_t stride, int32_t padding, int32_t dilation) {
    const int64_t taps = int64_t{kernel} * kernel, panels = (channels + 31) / 32;
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t row = 0; row + 1 < kernel; row += 2)
      for (int64_t k = 0; k < kernel; ++k) pairs.push_back({row * kernel + k, (row + 1) * kernel + k});
    for (int64_t k = 0; kernel % 2 && k < kernel; k += 2) pairs.push_back({taps - kernel + k, k + 1 < kernel ? taps - kernel + k + 1 : -1});
    std::vector<uint16_t> packed(panels * pairs.size() * 64);
    std::vector<float> padded(bias);
    padded.resize(panels * 32);
    for (int64_t c = 0; c < channels; ++c)
      for (size_t p = 0; p < pairs.size(); ++p) {
        const int64_t lane = c % 32 / 4 % 2 * 16 + c % 32 / 8 * 4 + c % 4;
        uint16_t* to = packed.data() + ((c / 32 * pairs.size() + p) * 32 + lane) * 2;
        to[0] = to_bfloat16(weight[c * taps + pairs[p].first]);
        to[1] = pairs[p].second < 0 ? 0 : to_bfloat16(weight[c * taps + pairs[p].second]);
      }
    halves.push_back(std::move(packed));
    Conv c{};
    c.weight = halves.back().data(), c.bias = keep(padded), c.out_channels = c.groups = channels;
    return place(c, channels, kernel, stride, padding, dilation);
  }
  Step& step(int32_t kind, int32_t in, int32_t out, int32_t conv = -1) {
    Step s{};
    s.kind = kind, s.in = in, s.in2 = -1, s.out = out, s.grid = s.grid2 = -1, s.run_all_above = 2;
    for (int i = 0; i < 3; ++i) s.conv[i] = -1;
    for (int i = 0; i < 4; ++i) s.aux[i] = -1;
    s.conv[0] = conv;
    steps.push_back(s);
    return steps.back();
  }
  void* create(std::string* reason = nullptr) {
    PlanData data{};
    data.abi = kPlanAbi, data.value_count = values.size(), data.conv_count = convs.size(), data.grid_count = grids.size();
    data.step_count = steps.size(), data.external_count = externals, data.arena_bytes = arena;
    data.values = values.data(), data.convs = convs.data(), data.grids = grids.data(), data.steps = steps.data();
    char error[256] = "";
    void* plan = dynaconv_plan_create(&data, error, sizeof error);
    if (!plan && reason) *reason = error;
    else if (!plan) std::fprintf(stderr, "refused: %s\n", error);
    return plan;
  }
};

// How many random cases a test draws of `all`: DYNACONV_TEST_SHARE=4 asks for a quarter of them.
inline int cases(int all) {
  const char* share = std::getenv("DYNACONV_TEST_SHARE");
  return all / (share ? std::max(1, std::atoi(share)) : 1);
}

inline std::vector<float> noise(std::mt19937& random, int64_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> data(count);
  for (float& v : data) v = normal(random);
  return data;
}
