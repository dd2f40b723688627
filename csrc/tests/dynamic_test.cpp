// Convolutions with mixed kernels against a plain loop: coefficients of every form, biases, masks, groups, depthwise, both
// ways of cutting the work, with and without Winograd.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan_builder.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, out, groups, kernel, stride, padding, dilation, experts, threads;
  double density;  // < 0: no mask
  bool per_output, mixed_bias, taps, channels, outputs, shortcut, winograd;
};

struct Data {
  std::vector<float> x, experts, biases, fixed, routing, taps, channels, outputs, add;
};

bool is_depthwise(const Case& c) { return c.groups > 1 && c.groups == c.in && c.groups == c.out; }

// [groups][panels][in / groups][taps][experts][32]; depthwise: [panels][taps][experts][32].
std::vector<float> pack(const Case& c, const std::vector<float>& experts, bool depthwise) {
  const int groups = depthwise ? 1 : c.groups;
  const int64_t per = depthwise ? 1 : c.in / c.groups, outs = c.out / groups, panels = (outs + 31) / 32, taps = c.kernel * c.kernel;
  std::vector<float> packed(groups * panels * per * taps * c.experts * 32);
  for (int e = 0; e < c.experts; ++e)
    for (int64_t o = 0; o < c.out; ++o)
      for (int64_t k = 0; k < per; ++k)
        for (int64_t t = 0; t < taps; ++t)
          packed[((((o / outs * panels + o % outs / 32) * per + k) * taps + t) * c.experts + e) * 32 + o % outs % 32] =
              experts[((e * c.out + o) * per + k) * taps + t];
  return packed;
}

std::vector<float> plain(const Case& c, const Data& d, int32_t oh, int32_t ow) {
  const int per = c.in / c.groups, outs = c.out / c.groups, taps = c.kernel * c.kernel;
  std::vector<float> y(int64_t{c.n} * oh * ow * c.out);
  for (int n = 0; n < c.n; ++n) {
    for (int o = 0; o < c.out; ++o) {
      std::vector<double> weight(per * taps);
      double bias = d.fixed[o];
      for (int e = 0; e < c.experts; ++e) {
        const double share = c.per_output ? d.routing[(int64_t{n} * c.out + o) * c.experts + e] : d.routing[n * c.experts + e];
        if (c.mixed_bias) bias += share * d.biases[e * c.out + o];
        for (int k = 0; k < per; ++k)
          for (int t = 0; t < taps; ++t)
            weight[k * taps + t] += share * d.experts[((int64_t{e} * c.out + o) * per + k) * taps + t] *
                                    (c.taps ? d.taps[n * taps + t] : 1) * (c.outputs ? d.outputs[n * c.out + o] : 1) *
                                    (c.channels ? d.channels[n * c.in + o / outs * per + k] : 1);
      }
      for (int oy = 0; oy < oh; ++oy)
        for (int ox = 0; ox < ow; ++ox) {
          double sum = bias;
          for (int t = 0; t < taps; ++t) {
            const int yy = oy * c.stride - c.padding + t / c.kernel * c.dilation, xx = ox * c.stride - c.padding + t % c.kernel * c.dilation;
            if (yy < 0 || yy >= c.h || xx < 0 || xx >= c.w) continue;
            const float* from = &d.x[((int64_t{n} * c.h + yy) * c.w + xx) * c.in + o / outs * per];
            for (int k = 0; k < per; ++k) sum += from[k] * weight[k * taps + t];
          }
          y[((int64_t{n} * oh + oy) * ow + ox) * c.out + o] = static_cast<float>(sum);
        }
    }
  }
  return y;
}

// The values of x that no open output reads become NaN.
void spoil(const Case& c, const std::vector<float>& scores, int32_t oh, int32_t ow, std::vector<float>& x) {
  std::vector<uint8_t> read(int64_t{c.n} * c.h * c.w);
  for (int64_t p = 0; p < static_cast<int64_t>(scores.size()); ++p) {
    if (scores[p] < 0) continue;
    for (int t = 0; t < c.kernel * c.kernel; ++t) {
      const int64_t yy = p / ow % oh * c.stride - c.padding + t / c.kernel * c.dilation, xx = p % ow * c.stride - c.padding + t % c.kernel * c.dilation;
      if (yy >= 0 && yy < c.h && xx >= 0 && xx < c.w) read[(p / (oh * ow) * c.h + yy) * c.w + xx] = 1;
    }
  }
  for (int64_t p = 0; p < static_cast<int64_t>(read.size()); ++p)
    if (!read[p]) std::fill_n(x.begin() + p * c.in, c.in, NAN);
}

Data draw(const Case& c, std::mt19937& random, int32_t oh, int32_t ow) {
  Data d;
  const int64_t taps = c.kernel * c.kernel;
  d.x = noise(random, int64_t{c.n} * c.h * c.w * c.in);
  d.experts = noise(random, int64_t{c.experts} * c.out * c.in / c.groups * taps, 0.3f);
  d.biases = noise(random, int64_t{c.experts} * c.out), d.fixed = noise(random, c.out);
  d.routing = noise(random, int64_t{c.n} * c.experts * (c.per_output ? c.out : 1));
  d.taps = noise(random, c.n * taps), d.channels = noise(random, int64_t{c.n} * c.in), d.outputs = noise(random, int64_t{c.n} * c.out);
  d.add = noise(random, int64_t{c.n} * oh * ow * c.out);
  return d;
}

int32_t make_convs(PlanBuilder& b, const Case& c, const Data& d) {
  const bool depthwise = is_depthwise(c);
  const int32_t id = b.conv(std::vector<float>(int64_t{c.out} * c.in / c.groups * c.kernel * c.kernel), d.fixed, c.in, c.out, c.groups,
                            c.kernel, c.stride, c.padding, c.dilation);
  b.convs[id].weight = b.keep(pack(c, d.experts, depthwise));
  if (depthwise) {
    std::vector<float> bias((c.out + 31) / 32 * 32);
    std::copy(d.fixed.begin(), d.fixed.end(), bias.begin());
    b.convs[id].bias = b.keep(bias);
  }
  if (c.mixed_bias) {
    Case row = c;
    row.kernel = 1, row.in = c.groups;
    Conv mixed = b.convs[id];
    mixed.weight = b.keep(pack(row, d.biases, depthwise));
    b.convs.push_back(mixed);
  }
  return id;
}

void compare(const Case& c, const Data& d, const std::vector<float>& scores, const std::vector<float>& result, int32_t oh, int32_t ow) {
  const auto expected = plain(c, d, oh, ow);
  double worst = 0, scale = 1e-6;
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    float want = c.shortcut ? std::min(6.0f, std::max(0.0f, expected[i] + d.add[i])) : std::max(0.0f, expected[i]);
    if (c.density >= 0 && scores[i / c.out] < 0) want = d.add[i];
    scale = std::max(scale, double(std::fabs(want)));
    const double off = std::fabs(want - result[i]);
    worst = off <= worst ? worst : off;
    if (result[i] != result[i]) worst = 1e9;
  }
  if (worst <= 1e-5 * scale * std::sqrt(double(c.in))) return;
  ++failures;
  std::fprintf(stderr, "n%d %dx%d in%d out%d g%d k%d s%d p%d d%d experts%d t%d density %.2f per_output %d bias %d taps %d channels %d "
               "outputs %d shortcut %d winograd %d: off by %g of %g\n", c.n, c.h, c.w, c.in, c.out, c.groups, c.kernel, c.stride,
               c.padding, c.dilation, c.experts, c.threads, c.density, c.per_output, c.mixed_bias, c.taps, c.channels, c.outputs,
               c.shortcut, c.winograd, worst, scale);
}

void run(const Case& c, std::mt19937& random) {
  PlanBuilder b;
  const int32_t oh = (c.h + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  const int32_t ow = (c.w + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  Data d = draw(c, random, oh, ow);
  const int32_t in = b.value(c.h, c.w, c.in, true), out = b.value(oh, ow, c.out, true), logits = b.value(oh, ow, 1, true);
  const int32_t routing = b.value(1, 1, c.experts * (c.per_output ? c.out : 1), true), taps = b.value(1, 1, c.kernel * c.kernel, true);
  const int32_t channels = b.value(1, 1, c.in, true), outputs = b.value(1, 1, c.out, true);
  const int32_t id = make_convs(b, c, d);
  std::vector<float> scores(int64_t{c.n} * oh * ow), result(d.add), source(d.x);
  for (float& s : scores) s = random() % 1000 < c.density * 1000 ? 1.0f : -1.0f;
  int32_t grid = -1, needs = -1;
  if (c.density >= 0) {
    grid = b.grid(oh, ow), needs = b.grid(c.h, c.w);
    b.grids[grid].tiles = 1;
    b.step(kThreshold, logits, -1).grid = grid;
    Step& dilate = b.step(kDilate, -1, -1, id);
    dilate.grid = grid, dilate.grid2 = needs;
    spoil(c, scores, oh, ow, source);
  }
  Step& step = b.step(kDynamicConv, in, out, id);
  step.grid = grid, step.grid2 = needs, step.activation[0] = kRelu;
  if (c.shortcut) step.in2 = out, step.activation[0] = kNone, step.final_activation = kRelu6;
  step.conv[1] = c.mixed_bias ? id + 1 : -1;
  step.aux[0] = routing, step.aux[1] = c.taps ? taps : -1, step.aux[2] = c.channels ? channels : -1, step.aux[3] = c.outputs ? outputs : -1;
  step.ints[0] = c.experts, step.ints[1] = c.per_output, step.ints[2] = c.winograd;
  void* plan = b.create();
  if (!plan) { ++failures; return; }
  void* context = dynaconv_plan_acquire(plan, c.n);
  void* externals[] = {source.data(), result.data(), scores.data(), d.routing.data(), d.taps.data(), d.channels.data(), d.outputs.data()};
  const int32_t planes[7] = {};
  Call call{};
  call.images = c.n, call.threads = c.threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals, call.external_planes = planes;
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
  compare(c, d, scores, result, oh, ow);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(500); ++i) {
    Case c{};
    const bool large = i % 20 == 0, depthwise = !large && i % 7 == 0;
    c.n = pick({1, 2, 3, 5}), c.h = pick({1, 2, 5, 7}), c.w = pick({1, 3, 7, 14});
    c.groups = large ? 1 : pick({1, 1, 1, 2, 5});
    c.in = large ? pick({300, 517}) : c.groups * pick({1, 3, 8, 17, 64}), c.out = large ? pick({150, 200}) : c.groups * pick({1, 7, 16, 33, 64});
    if (depthwise) c.groups = c.in = c.out = pick({3, 16, 40, 96});
    c.kernel = large ? 3 : pick({1, 1, 3, 5}), c.stride = pick({1, 1, 2, 3}), c.dilation = c.kernel > 1 ? pick({1, 1, 2}) : 1;
    c.padding = c.dilation * (c.kernel / 2), c.threads = pick({1, 2, 3}), c.experts = pick({1, 2, 4, 4, 6, 8});
    c.density = pick({-10, -10, 0, 3, 5, 10}) / 10.0;
    c.per_output = random() % 3 == 0, c.mixed_bias = random() % 2, c.taps = random() % 3 == 0, c.outputs = random() % 3 == 0;
    c.channels = !is_depthwise(c) && random() % 3 == 0, c.shortcut = random() % 2;
    c.winograd = c.kernel == 3 && c.stride == 1 && c.dilation == 1 && c.groups == 1 && random() % 4;
    run(c, random);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
