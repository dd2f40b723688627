// Convolution steps against a plain loop: groups, strides, dilations, shortcuts, masks, Winograd, every instruction set.

#include <algorithm>
#include <cstring>

#include "plan_builder.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, out, groups, kernel, stride, padding, dilation, threads;
  double density;  // < 0: no mask
  bool shortcut, winograd;
};

std::vector<float> plain(const Case& c, const std::vector<float>& x, const std::vector<float>& weight,
                         const std::vector<float>& bias, int32_t oh, int32_t ow) {
  const int per = c.in / c.groups, outs = c.out / c.groups;
  std::vector<float> y(int64_t{c.n} * oh * ow * c.out);
  for (int n = 0; n < c.n; ++n)
    for (int oy = 0; oy < oh; ++oy)
      for (int ox = 0; ox < ow; ++ox)
        for (int o = 0; o < c.out; ++o) {
          double sum = bias[o];
          for (int k = 0; k < per; ++k)
            for (int i = 0; i < c.kernel; ++i)
              for (int j = 0; j < c.kernel; ++j) {
                const int yy = oy * c.stride - c.padding + i * c.dilation, xx = ox * c.stride - c.padding + j * c.dilation;
                if (yy < 0 || yy >= c.h || xx < 0 || xx >= c.w) continue;
                sum += double(x[((int64_t{n} * c.h + yy) * c.w + xx) * c.in + o / outs * per + k]) *
                       weight[((int64_t{o} * per + k) * c.kernel + i) * c.kernel + j];
              }
          y[((int64_t{n} * oh + oy) * ow + ox) * c.out + o] = static_cast<float>(sum);
        }
  return y;
}

// U = G g G^T for every pair of channels, [panels][16][I][32].
std::vector<float> winograd(const std::vector<float>& weight, int in, int out) {
  const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  const int panels = (out + 31) / 32;
  std::vector<float> packed(int64_t{panels} * 16 * in * 32);
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k)
      for (int p = 0; p < 16; ++p) {
        double sum = 0;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) sum += g[p / 4][i] * g[p % 4][j] * weight[(int64_t{o} * in + k) * 9 + 3 * i + j];
        packed[((int64_t{o / 32} * 16 + p) * in + k) * 32 + o % 32] = static_cast<float>(sum);
      }
  return packed;
}

void run(const Case& c, std::mt19937& random) {
  PlanBuilder b;
  const int32_t oh = (c.h + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  const int32_t ow = (c.w + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  const auto x = noise(random, int64_t{c.n} * c.h * c.w * c.in);
  const auto weight = noise(random, int64_t{c.out} * c.in / c.groups * c.kernel * c.kernel, 0.3f);
  const auto bias = noise(random, c.out), add = noise(random, int64_t{c.n} * oh * ow * c.out);
  const int32_t in = b.value(c.h, c.w, c.in, true), out = b.value(oh, ow, c.out, true), logits = b.value(oh, ow, 1, true);
  const int32_t id = b.conv(weight, bias, c.in, c.out, c.groups, c.kernel, c.stride, c.padding, c.dilation);
  if (c.winograd) b.convs[id].winograd = b.keep(winograd(weight, c.in, c.out));
  std::vector<float> scores(int64_t{c.n} * oh * ow), result(add);
  for (float& s : scores) s = random() % 1000 < c.density * 1000 ? 1.0f : -1.0f;
  int32_t grid = -1, needs = -1;
  std::vector<float> source = x;
  if (c.density >= 0) {
    grid = b.grid(oh, ow), needs = b.grid(c.h, c.w);
    b.grids[grid].tiles = 1;
    Step& threshold = b.step(kThreshold, logits, -1);
    threshold.grid = grid;
    Step& dilate = b.step(kDilate, -1, -1, id);
    dilate.grid = grid, dilate.grid2 = needs;
    // What no open output reads must not matter.
    std::vector<uint8_t> read(int64_t{c.n} * c.h * c.w);
    for (int64_t p = 0; p < static_cast<int64_t>(scores.size()); ++p) {
      if (scores[p] < 0) continue;
      for (int i = 0; i < c.kernel; ++i)
        for (int j = 0; j < c.kernel; ++j) {
          const int64_t yy = p / ow % oh * c.stride - c.padding + i * c.dilation, xx = p % ow * c.stride - c.padding + j * c.dilation;
          if (yy >= 0 && yy < c.h && xx >= 0 && xx < c.w) read[(p / (oh * ow) * c.h + yy) * c.w + xx] = 1;
        }
    }
    for (int64_t p = 0; p < static_cast<int64_t>(read.size()); ++p)
      if (!read[p]) std::fill_n(source.begin() + p * c.in, c.in, NAN);
  }
  Step& step = b.step(kConv, in, out, id);
  step.grid = grid, step.grid2 = needs, step.activation[0] = kRelu;
  if (c.shortcut) step.in2 = out, step.activation[0] = kNone, step.final_activation = kRelu6;
  void* plan = b.create();
  if (!plan) { ++failures; return; }
  void* context = dynaconv_plan_acquire(plan, c.n);
  void* externals[3] = {source.data(), result.data(), scores.data()};
  const int32_t planes[3] = {};
  Call call{};
  call.images = c.n, call.threads = c.threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals, call.external_planes = planes;
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
  const auto expected = plain(c, x, weight, bias, oh, ow);
  double worst = 0, scale = 1e-6;
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    float want = expected[i];
    if (c.shortcut) want = std::min(6.0f, std::max(0.0f, want + add[i]));
    else want = std::max(0.0f, want);
    if (c.density >= 0 && scores[i / c.out] < 0) want = add[i];
    scale = std::max(scale, double(std::fabs(want)));
    const double off = std::fabs(want - result[i]);
    worst = off <= worst ? worst : off;  // NaN counts
    if (result[i] != result[i]) worst = 1e9;
  }
  if (!(worst <= 2e-5 * scale * std::sqrt(double(c.in)))) {
    ++failures;
    std::fprintf(stderr, "n%d %dx%d in%d out%d g%d k%d s%d p%d d%d t%d density %.2f shortcut %d winograd %d: off by %g of %g\n", c.n,
                 c.h, c.w, c.in, c.out, c.groups, c.kernel, c.stride, c.padding, c.dilation, c.threads, c.density, c.shortcut,
                 c.winograd, worst, scale);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(600); ++i) {
    Case c{};
    c.n = pick({1, 2, 3}), c.h = pick({1, 2, 5, 7, 12}), c.w = pick({1, 3, 7, 14, 19});
    c.groups = pick({1, 1, 1, 2, 5});
    c.in = c.groups * pick({1, 3, 8, 17, 64}), c.out = c.groups * pick({1, 7, 16, 24, 33, 64});
    c.kernel = pick({1, 1, 3, 5}), c.stride = pick({1, 1, 2, 3}), c.dilation = c.kernel > 1 ? pick({1, 1, 2}) : 1;
    c.padding = c.dilation * (c.kernel / 2), c.threads = pick({1, 2, 3});
    c.density = pick({-1, 0, 3, 5, 10}) / 10.0, c.shortcut = random() % 2;
    if (c.density < 0) c.density = -1;
    c.winograd = c.kernel == 3 && c.stride == 1 && c.dilation == 1 && c.groups == 1 && random() % 2;
    run(c, random);
  }
  // Maps that lie far away, whose rows are fetched while others are multiplied.
  for (const bool shortcut : {false, true})
    for (const double density : {-1.0, 0.1}) {
      run({2, 75, 101, 40, 33, 1, 1, 1, 0, 1, 2, density, shortcut, false}, random);
      run({1, 101, 91, 40, 50, 2, 3, 2, 1, 1, 2, density, shortcut, false}, random);
    }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
