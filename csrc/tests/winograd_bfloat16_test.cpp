// Winograd's F(2x2, 3x3) in bfloat16 against a plain loop. Inputs and weights are small whole numbers, weights multiples of
// four: bfloat16 then holds all that is transformed, so that results agree but for their own rounding.

#include <algorithm>

#include "../kernels/isa.h"
#include "plan_builder.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, out, padding, threads;
  double density;  // < 0: no mask
  bool shortcut, alone;  // alone: the only weights
};

std::vector<float> whole(std::mt19937& random, int64_t count, int most, int step) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>((static_cast<int>(random() % (2 * most + 1)) - most) * step);
  return values;
}

// U = G g G^T for every pair of channels, [panels][16][I][32].
std::vector<float> points(const std::vector<float>& weight, int in, int out) {
  const float g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  std::vector<float> packed(int64_t{(out + 31) / 32} * 16 * in * 32);
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k)
      for (int p = 0; p < 16; ++p)
        for (int t = 0; t < 9; ++t)
          packed[((int64_t{o / 32} * 16 + p) * in + k) * 32 + o % 32] +=
              g[p / 4][t / 3] * g[p % 4][t % 3] * weight[(int64_t{o} * in + k) * 9 + t];
  return packed;
}

struct Problem {
  Case c;
  int32_t oh, ow;
  std::vector<float> x, weight, bias, add, scores;

  Problem(const Case& of, std::mt19937& random) : c(of), oh(c.h + 2 * c.padding - 2), ow(c.w + 2 * c.padding - 2) {
    x = whole(random, int64_t{c.n} * c.h * c.w * c.in, 4, 1), weight = whole(random, int64_t{c.out} * c.in * 9, 1, 4);
    bias = whole(random, c.out, 9, 1), add = whole(random, int64_t{c.n} * oh * ow * c.out, 100, 1);
    scores.resize(int64_t{c.n} * oh * ow);
    for (float& s : scores) s = random() % 1000 < c.density * 1000 ? 1.0f : -1.0f;
  }
  bool open(int64_t row) const { return c.density < 0 || scores[row] >= 0; }
  int64_t row(int n, int y, int x) const { return (int64_t{n} * oh + y) * ow + x; }

  // Whether an open output reads an input; what none reads is not a number.
  bool read(int n, int y, int x) const {
    for (int i = 0; i < 9; ++i) {
      const int oy = y + c.padding - i / 3, ox = x + c.padding - i % 3;
      if (oy >= 0 && oy < oh && ox >= 0 && ox < ow && open(row(n, oy, ox))) return true;
    }
    return false;
  }
  float want(int n, int oy, int ox, int o) const {
    const int64_t at = row(n, oy, ox);
    if (!open(at)) return add[at * c.out + o];
    double sum = bias[o];
    for (int i = 0; i < 9; ++i) {
      const int y = oy - c.padding + i / 3, xx = ox - c.padding + i % 3;
      if (y < 0 || y >= c.h || xx < 0 || xx >= c.w) continue;
      for (int k = 0; k < c.in; ++k)
        sum += double(x[((int64_t{n} * c.h + y) * c.w + xx) * c.in + k]) * weight[(int64_t{o} * c.in + k) * 9 + i];
    }
    if (c.shortcut) sum += add[at * c.out + o];
    return static_cast<float>(std::max(0.0, sum));
  }
};

std::vector<uint16_t> compute(const Problem& p) {
  const Case& c = p.c;
  PlanBuilder b;
  const int32_t in = b.value(c.h, c.w, c.in, true, c.in + 3, kBfloat16), out = b.value(p.oh, p.ow, c.out, true, 0, kBfloat16);
  const int32_t logits = b.value(p.oh, p.ow, 1, true);
  const int32_t id = b.conv(p.weight, p.bias, c.in, c.out, 1, 3, 1, c.padding, 1, kBfloat16);
  b.convs[id].winograd = b.keep_pairs(points(p.weight, c.in, c.out), c.in);
  if (c.alone) b.convs[id].weight = nullptr;
  int32_t grid = -1, needs = -1;
  if (c.density >= 0) {
    grid = b.grid(p.oh, p.ow), needs = b.grid(c.h, c.w);
    b.grids[grid].tiles = 1;
    b.step(kThreshold, logits, -1).grid = grid;
    Step& dilate = b.step(kDilate, -1, -1, id);
    dilate.grid = grid, dilate.grid2 = needs;
  }
  std::vector<uint16_t> source(int64_t{c.n} * c.h * c.w * (c.in + 3), 0x7fc0), result(p.add.size());
  for (int64_t at = 0; at < int64_t{c.n} * c.h * c.w; ++at)
    for (int k = 0; k < c.in && p.read(at / (c.h * c.w), at / c.w % c.h, at % c.w); ++k)
      source[at * (c.in + 3) + k] = to_bfloat16(p.x[at * c.in + k]);
  std::transform(p.add.begin(), p.add.end(), result.begin(), to_bfloat16);
  Step& step = b.step(kConv, in, out, id);
  step.grid = grid, step.grid2 = needs, step.activation[0] = kRelu;
  if (c.shortcut) step.in2 = out, step.activation[0] = kNone, step.final_activation = kRelu;
  void* plan = b.create();
  if (!plan) {
    ++failures;
    return result;
  }
  void* context = dynaconv_plan_acquire(plan, c.n);
  std::vector<float> scores(p.scores);
  void* externals[3] = {source.data(), result.data(), scores.data()};
  const int32_t planes[3] = {};
  Call call{};
  call.images = c.n, call.threads = c.threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals, call.external_planes = planes;
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
  return result;
}

void run(const Case& c, std::mt19937& random) {
  const Problem p(c, random);
  const auto result = compute(p);
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    const int64_t row = i / c.out;
    const float want = p.want(row / (p.oh * p.ow), row / p.ow % p.oh, row % p.ow, i % c.out);
    if (result[i] == to_bfloat16(want)) continue;
    ++failures;
    std::fprintf(stderr, "n%d %dx%d in%d out%d p%d t%d density %.1f shortcut %d alone %d: %g instead of %g at %lld\n", c.n, c.h, c.w,
                 c.in, c.out, c.padding, c.threads, c.density, c.shortcut, c.alone, from_bfloat16(result[i]), want,
                 static_cast<long long>(i));
    return;
  }
}

}  // namespace

int main() {
  if (!has_bfloat16()) {
    std::printf("no AVX512_BF16 here\n");
    return 0;
  }
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(300); ++i) {
    Case c{};
    c.n = pick({1, 2, 3}), c.h = pick({3, 5, 7, 12}), c.w = pick({3, 4, 14, 19}), c.in = pick({1, 3, 16, 17, 40, 64, 130});
    c.out = pick({1, 7, 24, 33, 64}), c.padding = pick({0, 1, 1, 2}), c.threads = pick({1, 2, 3});
    c.density = pick({-10, 0, 3, 5, 10}) / 10.0, c.shortcut = random() % 2, c.alone = c.density < 0 && random() % 2;
    if (c.density >= 0) c.padding = std::min(c.padding, 1);  // wider ones have no dilation
    run(c, random);
  }
  run({1, 5, 4, 2048, 40, 1, 2, -1, false, true}, random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
