// Router steps against plain loops, the same bits from any number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan_builder.h"
#include "slow_plan.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, hidden, out;
  bool gate;
  int32_t acts[3];
};

void run(const Case& c, std::mt19937& random) {
  PlanBuilder b;
  const int32_t in = b.value(c.h, c.w, c.in, true), out = b.value(1, 1, c.out, true), taps = c.h * c.w;
  const float scale = 1 / std::sqrt(static_cast<float>(taps * c.in)), own = 1 / std::sqrt(static_cast<float>(c.hidden));
  const auto first = noise(random, int64_t{c.hidden} * taps * c.in, scale);
  const int32_t squeeze = b.place(b.packed(first, noise(random, c.hidden), c.hidden, 1, c.in, taps, kFloat32), c.in, c.h, 1, 0, 1);
  b.convs[squeeze].kernel[1] = c.w;
  const auto linear = [&](int32_t to) {
    return b.conv(noise(random, int64_t{to} * c.hidden, own), noise(random, to), c.hidden, to, 1, 1, 1, 0);
  };
  const int32_t gate = c.gate ? linear(c.hidden) : -1, last = linear(c.out);
  Step& step = b.step(kRouter, in, out, squeeze);
  step.conv[1] = gate, step.conv[2] = last;
  std::copy(c.acts, c.acts + 3, step.activation);
  void* plan = b.create();
  if (!plan) { ++failures; return; }
  Memory memory{{}, {noise(random, int64_t{c.n} * taps * c.in), std::vector<float>(int64_t{c.n} * c.out)}, c.n};
  const Written want = SlowPlan(b, memory, {0, 0}, {}).step(b.steps[0]);
  std::vector<float> once;
  for (int32_t threads = 1; threads <= 4; ++threads) {
    std::vector<float>& got = memory.externals[1];
    std::fill(got.begin(), got.end(), NAN);
    void* externals[] = {memory.externals[0].data(), got.data()};
    const int32_t planes[2] = {};
    Call call{};
    call.images = c.n, call.threads = threads, call.last = 1, call.externals = externals, call.external_planes = planes;
    char error[256] = "";
    if (dynaconv_plan_forward(plan, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
    if (threads == 1) once = got;
    if (std::memcmp(once.data(), got.data(), got.size() * sizeof(float)))
      std::fprintf(stderr, "%d threads give other bits\n", threads), ++failures;
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) worst = std::isnan(got[i]) ? INFINITY : std::max(worst, std::fabs(got[i] - want.want[i]));
    if (worst > 1e-5 * want.scale) {
      std::fprintf(stderr, "n %d, %d x %d x %d -> %d -> %d, gate %d: off by %g\n", c.n, c.h, c.w, c.in, c.hidden, c.out, c.gate, worst);
      ++failures;
    }
  }
  dynaconv_plan_destroy(plan);
}

// What does not fit is refused.
void refused() {
  for (int what = 0; what < 6; ++what) {
    PlanBuilder b;
    const int32_t in = b.value(2, 2, 3, true), out = b.value(1, 1, 5, true);
    const auto linear = [&](int32_t from, int32_t to, int32_t kernel) {
      return b.conv(std::vector<float>(int64_t{from} * to * kernel * kernel), std::vector<float>(to), from, to, 1, kernel, 1, 0);
    };
    const int32_t squeeze = linear(what == 0 ? 4 : 3, 7, what == 1 ? 1 : 2), gate = linear(7, what == 2 ? 6 : 7, 1);
    const int32_t last = linear(what == 3 ? 6 : 7, what == 4 ? 4 : 5, 1);
    if (what == 5) b.convs[squeeze].padding[0] = 1, b.convs[squeeze].stride[0] = 3;
    Step& step = b.step(kRouter, in, out, squeeze);
    step.conv[1] = gate, step.conv[2] = last;
    std::string reason;
    if (void* plan = b.create(&reason)) {
      std::fprintf(stderr, "an impossible router is taken: %d\n", what), ++failures;
      dynaconv_plan_destroy(plan);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(200); ++i) {
    Case c{};
    c.n = pick({1, 1, 2, 3, 8, 14, 15, 31}), c.h = pick({1, 1, 2, 3}), c.w = pick({1, 2, c.h}), c.gate = random() % 2;
    c.in = pick({1, 3, 16, 33, 100, i % 10 ? 64 : 960}), c.hidden = pick({1, 4, 16, 31, 33, 40, 100}), c.out = pick({1, 7, 32, 65, 300});
    for (int32_t& act : c.acts) act = pick({kNone, kRelu, kSilu, kSigmoid, kHardsigmoid});
    run(c, random);
  }
  refused();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
