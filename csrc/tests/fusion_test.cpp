// Channel fusion against a plain loop: folded and factored, kernels of several taps, strides, masks, shortcuts, Winograd.

#include <algorithm>
#include <cmath>

#include "plan_builder.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, out, rank, groups, kernel, stride, padding, threads;
  double density;  // < 0: no mask
  bool folded, gate, shortcut, winograd;
  int32_t activation;
};

struct Data {
  std::vector<float> x, weight, bias, q, shift, p, offset, coefficients, add;
};

Data draw(const Case& c, std::mt19937& random, int32_t oh, int32_t ow) {
  Data d;
  d.x = noise(random, int64_t{c.n} * c.h * c.w * c.in);
  d.weight = noise(random, int64_t{c.out} * c.in / c.groups * c.kernel * c.kernel, 0.3f), d.bias = noise(random, c.out);
  d.q = noise(random, int64_t{c.rank} * c.in, 0.3f), d.shift = noise(random, c.rank);
  d.p = noise(random, int64_t{c.out} * c.rank, 0.3f), d.offset = noise(random, c.out);
  d.coefficients = noise(random, int64_t{c.n} * (c.out + c.rank * c.rank), 0.3f);
  d.add = noise(random, int64_t{c.n} * oh * ow * c.out);
  return d;
}

double activated(double v, int32_t activation) {
  return activation == kRelu6 ? std::min(6.0, std::max(0.0, v)) : activation == kRelu ? std::max(0.0, v) : v;
}

std::vector<float> plain(const Case& c, const Data& d, int32_t oh, int32_t ow) {
  const int per = c.in / c.groups, outs = c.out / c.groups, taps = c.kernel * c.kernel;
  std::vector<float> y(int64_t{c.n} * oh * ow * c.out);
  std::vector<double> reduced(c.rank), latent(c.rank);
  for (int64_t at = 0; at < int64_t{c.n} * oh * ow; ++at) {
    const int64_t n = at / (oh * ow), oy = at / ow % oh, ox = at % ow;
    const float* own = &d.coefficients[n * (c.out + c.rank * c.rank)];
    const auto pixel = [&](int t) -> const float* {
      const int64_t yy = oy * c.stride - c.padding + t / c.kernel, xx = ox * c.stride - c.padding + t % c.kernel;
      return yy < 0 || yy >= c.h || xx < 0 || xx >= c.w ? nullptr : &d.x[((n * c.h + yy) * c.w + xx) * c.in];
    };
    const float* centre = pixel(c.kernel / 2 * c.kernel + c.kernel / 2);
    for (int m = 0; m < c.rank; ++m) {
      reduced[m] = d.shift[m];
      for (int k = 0; centre && k < c.in; ++k) reduced[m] += double(d.q[int64_t{m} * c.in + k]) * centre[k];
    }
    for (int l = 0; l < c.rank; ++l) {
      latent[l] = 0;
      for (int m = 0; m < c.rank; ++m) latent[l] += reduced[m] * own[c.out + m * c.rank + l];
    }
    for (int o = 0; o < c.out; ++o) {
      double sum = d.bias[o], low = d.offset[o];
      for (int t = 0; t < taps; ++t)
        if (const float* from = pixel(t))
          for (int k = 0; k < per; ++k) sum += double(from[o / outs * per + k]) * d.weight[(int64_t{o} * per + k) * taps + t];
      for (int l = 0; l < c.rank; ++l) low += latent[l] * d.p[o * c.rank + l];
      const double scale = c.gate ? std::min(6.0, std::max(0.0, own[o] + 3.0)) / 3 : own[o];
      y[at * c.out + o] = static_cast<float>(activated(scale * sum + low, c.activation));
    }
  }
  return y;
}

// Convolutions of the step: the static weight, Q, P.
int32_t make_convs(PlanBuilder& b, const Case& c, const Data& d) {
  const int64_t per = c.in / c.groups, outs = c.out / c.groups, panels = (outs + 31) / 32, taps = c.kernel * c.kernel;
  const int32_t id = b.conv(d.weight, d.bias, c.in, c.out, c.groups, c.kernel, c.stride, c.padding);
  std::vector<float> packed(c.groups * panels * per * taps * 32), rows(int64_t{c.in} * c.rank);
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t k = 0; k < per; ++k)
      for (int64_t t = 0; t < taps; ++t)
        packed[(((o / outs * panels + o % outs / 32) * per + k) * taps + t) * 32 + o % outs % 32] = d.weight[(o * per + k) * taps + t];
  if (c.folded) b.convs[id].weight = b.keep(packed);
  b.conv(d.q, d.shift, c.in, c.rank, 1, 1, 1, 0);
  for (int64_t k = 0; k < c.in; ++k)
    for (int64_t m = 0; m < c.rank; ++m) rows[k * c.rank + m] = d.q[m * c.in + k];
  if (c.folded) b.convs[id + 1].weight = b.keep(rows);
  std::vector<float> offset((c.out + 31) / 32 * 32);
  b.conv(d.p, d.offset, c.rank, c.out, c.groups, 1, 1, 0);
  // P is dense; only its panels follow the groups of the outputs.
  std::vector<float> dense(c.groups * panels * c.rank * 32);
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t l = 0; l < c.rank; ++l) dense[((o / outs * panels + o % outs / 32) * c.rank + l) * 32 + o % outs % 32] = d.p[o * c.rank + l];
  b.convs[id + 2].weight = b.keep(dense);
  b.convs[id + 2].groups = 1;
  return id;
}

void compare(const Case& c, const Data& d, const std::vector<float>& scores, const std::vector<float>& result, int32_t oh, int32_t ow) {
  const auto expected = plain(c, d, oh, ow);
  double worst = 0, scale = 1e-6;
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    float want = c.shortcut ? std::min(6.0f, std::max(0.0f, expected[i] + d.add[i])) : expected[i];
    if (c.density >= 0 && scores[i / c.out] < 0) want = d.add[i];
    scale = std::max(scale, double(std::fabs(want)));
    const double off = std::fabs(want - result[i]);
    worst = off <= worst ? worst : off;
    if (result[i] != result[i]) worst = 1e9;
  }
  if (worst <= 1e-5 * scale * std::sqrt(double(c.in))) return;
  ++failures;
  std::fprintf(stderr, "n%d %dx%d in%d out%d rank%d g%d k%d s%d p%d t%d density %.2f folded %d gate %d shortcut %d winograd %d act %d: off by "
               "%g of %g\n", c.n, c.h, c.w, c.in, c.out, c.rank, c.groups, c.kernel, c.stride, c.padding, c.threads, c.density,
               c.folded, c.gate, c.shortcut, c.winograd, c.activation, worst, scale);
}

void run(const Case& c, std::mt19937& random) {
  PlanBuilder b;
  const int32_t oh = (c.h + 2 * c.padding - c.kernel) / c.stride + 1, ow = (c.w + 2 * c.padding - c.kernel) / c.stride + 1;
  Data d = draw(c, random, oh, ow);
  const int32_t in = b.value(c.h, c.w, c.in, true), out = b.value(oh, ow, c.out, true), logits = b.value(oh, ow, 1, true);
  const int32_t coefficients = b.value(1, 1, c.out + c.rank * c.rank, true);
  const int32_t id = make_convs(b, c, d);
  std::vector<float> scores(int64_t{c.n} * oh * ow), result(d.add);
  for (float& s : scores) s = random() % 1000 < c.density * 1000 ? 1.0f : -1.0f;
  int32_t grid = -1, needs = -1;
  if (c.density >= 0) {
    grid = b.grid(oh, ow), needs = b.grid(c.h, c.w);
    b.grids[grid].tiles = 1;
    b.step(kThreshold, logits, -1).grid = grid;
    Step& dilate = b.step(kDilate, -1, -1, id);
    dilate.grid = grid, dilate.grid2 = needs;
  }
  Step& step = b.step(kChannelFusion, in, out, id);
  step.grid = grid, step.grid2 = needs, step.activation[0] = c.activation;
  if (c.shortcut) step.in2 = out, step.final_activation = kRelu6;
  step.conv[1] = id + 1, step.conv[2] = id + 2, step.aux[0] = coefficients;
  step.ints[0] = step.ints[1] = 1, step.ints[2] = c.winograd, step.ints[3] = !c.folded, step.ints[4] = c.gate;
  void* plan = b.create();
  if (!plan) { ++failures; return; }
  void* context = dynaconv_plan_acquire(plan, c.n);
  void* externals[] = {d.x.data(), result.data(), scores.data(), d.coefficients.data()};
  const int32_t planes[4] = {};
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
    const bool large = i % 20 == 0;
    c.n = pick({1, 2, 3, 5, 8}), c.h = pick({1, 2, 5, 7}), c.w = pick({1, 3, 7, 14}), c.folded = random() % 2;
    c.groups = c.folded || large ? 1 : pick({1, 1, 2});
    c.in = large ? pick({300, 517}) : c.groups * pick({2, 3, 8, 17, 64, 100}), c.out = large ? pick({150, 200}) : c.groups * pick({2, 7, 16, 33, 64, 96});
    c.rank = pick({1, 4, 12, 16, 24, 32, 40, 45}), c.kernel = large ? 3 : pick({1, 1, 2, 3, 5}), c.stride = pick({1, 1, 2, 3});
    c.padding = c.kernel / 2, c.threads = pick({1, 2, 3}), c.density = pick({-10, -10, 0, 3, 5, 10}) / 10.0;
    c.gate = random() % 2, c.shortcut = random() % 2, c.activation = pick({kNone, kRelu, kRelu6});
    if (i % 10 == 1) {
      // Wide inputs of few positions, which threads may share by their channels.
      c.groups = c.kernel = c.stride = 1, c.padding = 0, c.h = pick({4, 7, 14}), c.w = pick({4, 7, 14}), c.density = pick({-10, -10, 5}) / 10.0;
      c.in = pick({128, 256, 300, 384}), c.out = pick({24, 33, 64, 96});
    }
    c.winograd = c.kernel == 3 && c.stride == 1 && c.groups == 1 && random() % 4;
    run(c, random);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
