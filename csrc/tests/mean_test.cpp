// Adaptive averages over bins, of all rows or of the open ones, against a plain loop.

#include <algorithm>
#include <cmath>

#include "plan_builder.h"

namespace {

int failures = 0;

void run(std::mt19937& random, int32_t n, int32_t h, int32_t w, int32_t channels, int32_t bins_y, int32_t bins_x, int32_t threads,
         double density) {
  PlanBuilder b;
  const auto x = noise(random, int64_t{n} * h * w * channels);
  const int32_t in = b.value(h, w, channels, true), out = b.value(bins_y, bins_x, channels, true), logits = b.value(h, w, 1, true);
  std::vector<float> scores(int64_t{n} * h * w), result(int64_t{n} * bins_y * bins_x * channels);
  for (float& s : scores) s = random() % 1000 < density * 1000 ? 1.0f : -1.0f;
  int32_t grid = -1;
  if (density >= 0) {
    grid = b.grid(h, w);
    b.step(kThreshold, logits, -1).grid = grid;
  }
  b.step(kMean, in, out).grid = grid;
  void* plan = b.create();
  if (!plan) { ++failures; return; }
  void* context = dynaconv_plan_acquire(plan, n);
  std::vector<float> source = x;
  void* externals[] = {source.data(), result.data(), scores.data()};
  const int32_t planes[3] = {};
  Call call{};
  call.images = n, call.threads = threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals, call.external_planes = planes;
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
  double worst = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
    const int64_t c = i % channels, bin = i / channels % (bins_y * bins_x), image = i / channels / (bins_y * bins_x);
    const int64_t by = bin / bins_x, bx = bin % bins_x;
    double sum = 0;
    int64_t count = 0;
    for (int64_t yy = by * h / bins_y; yy < ((by + 1) * h + bins_y - 1) / bins_y; ++yy)
      for (int64_t xx = bx * w / bins_x; xx < ((bx + 1) * w + bins_x - 1) / bins_x; ++xx) {
        const int64_t row = (image * h + yy) * w + xx;
        if (density >= 0 && scores[row] < 0) continue;
        sum += x[row * channels + c];
        ++count;
      }
    worst = std::max(worst, std::fabs((count ? sum / count : 0) - result[i]));
  }
  if (worst <= 1e-5) return;
  ++failures;
  std::fprintf(stderr, "n%d %dx%d channels %d bins %dx%d threads %d density %.1f: off by %g\n", n, h, w, channels, bins_y, bins_x, threads,
               density, worst);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < 300; ++i) {
    const int h = pick({1, 3, 7, 14, 19}), w = pick({1, 2, 7, 14});
    run(random, pick({1, 2, 3}), h, w, pick({1, 7, 16, 40, 64, 130}), std::min(h, pick({1, 1, 2, 3})), std::min(w, pick({1, 1, 2, 3})),
        pick({1, 2, 3}), pick({-10, -10, 0, 3, 10}) / 10.0);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
