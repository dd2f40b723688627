// Plans whose maps share memory, run some images at a time and all at once: the same bits.

#include <algorithm>
#include <cmath>

#include "../plan/stages.h"
#include "plan_builder.h"

namespace {

int failures = 0;
constexpr int32_t kChannels = 64;

// A chain of steps on maps of one size. A few places in memory are enough for them, as a compiler would place them.
class Chain {
 public:
  Chain(std::mt19937& random, int32_t height, int32_t width) : random_(random), height_(height), width_(width) {
    b.arena = kPlaces * place_bytes();
    current_ = b.value(height, width, kChannels, true);
    pointwise(-1);
    for (int i = 0; i < 14; ++i) link();
    const int32_t out = b.value(height, width, kChannels, true);
    b.step(kConv, current_, out, b.conv(weights(1), bias(), kChannels, kChannels, 1, 1, 1, 0));
  }

  PlanBuilder b;

 private:
  static constexpr int kPlaces = 4;

  int64_t place_bytes() const { return int64_t{height_} * width_ * 2 * kChannels * 4; }
  bool chance(int percent) { return static_cast<int>(random_() % 100) < percent; }
  std::vector<float> weights(int kernel) { return noise(random_, int64_t{kChannels} * kChannels * kernel * kernel, 0.1f / kernel); }
  std::vector<float> bias() { return noise(random_, kChannels); }

  // A map in one of the places. Rows of other lengths lie elsewhere in it.
  int32_t map(int place, int32_t stride) {
    const int64_t arena = b.arena;
    const int32_t id = b.value(height_, width_, kChannels, false, stride);
    b.arena = arena;
    b.values[id].offset = place * place_bytes();
    place_of_.resize(id + 1, -1);
    place_of_[id] = place;
    return id;
  }
  int place(int32_t id) const { return id >= 0 && id < static_cast<int32_t>(place_of_.size()) ? place_of_[id] : -1; }
  int32_t free_map(int32_t also = -1) {
    int at = static_cast<int>(random_() % kPlaces);
    while (at == place(current_) || at == place(kept_) || at == place(also)) at = (at + 1) % kPlaces;
    return map(at, kChannels * (chance(50) ? 1 : 2));
  }

  // 1x1, over the open rows of `grid`.
  void pointwise(int32_t grid) {
    const int32_t out = free_map();
    Step& step = b.step(kConv, current_, out, b.conv(weights(1), bias(), kChannels, kChannels, 1, 1, 1, 0));
    step.activation[0] = kRelu;
    step.grid = grid;
    current_ = out;
  }

  void link() {
    if (kept_ < 0 && chance(30)) kept_ = current_;
    if (kept_ >= 0 && kept_ != current_ && chance(30)) {
      const int32_t out = free_map();
      b.step(kAdd, current_, out).in2 = kept_;
      current_ = out;
      kept_ = -1;
    } else if (chance(30)) {
      masked_block();
    } else if (chance(40)) {
      // Heavy weights: no stage takes such a step.
      const int32_t out = free_map();
      b.step(kConv, current_, out, b.conv(weights(3), bias(), kChannels, kChannels, 1, 3, 1, 1)).activation[0] = kRelu6;
      current_ = out;
    } else {
      pointwise(-1);
    }
  }

  // shortcut + mask * (1x1, 1x1), in the place of the shortcut where nobody else needs that.
  void masked_block() {
    const int32_t logits = b.value(height_, width_, 1), sums = b.value(height_, 1, 1), grid = b.grid(height_, width_);
    Conv gate{};
    gate.out_channels = gate.groups = 1;
    gate.weight = b.keep(noise(random_, 10 * kChannels, 0.05f)), gate.bias = b.keep(noise(random_, 1));
    Step& step = b.step(kGate, current_, logits, b.place(gate, kChannels, 3, 1, 1, 1));
    step.ints[0] = 1;
    step.aux[0] = sums;
    b.step(kThreshold, logits, -1).grid = grid;
    const int32_t shortcut = current_;
    pointwise(grid);
    const bool replaces = shortcut != kept_ && place(shortcut) >= 0;
    const int32_t out = replaces ? map(place(shortcut), b.values[shortcut].stride) : free_map(shortcut);
    if (!replaces) b.step(kAdd, shortcut, out).in2 = shortcut;
    Step& last = b.step(kConv, current_, out, b.conv(weights(1), bias(), kChannels, kChannels, 1, 1, 1, 0));
    last.in2 = replaces ? shortcut : out;
    last.grid = grid;
    current_ = out;
  }

  std::mt19937& random_;
  const int32_t height_, width_;
  int32_t current_ = -1, kept_ = -1;
  std::vector<int> place_of_;
};

// 1x1 channel fusions on two places in memory, one after the other.
class Fusions {
 public:
  Fusions(std::mt19937& random, int32_t height, int32_t width) {
    const int64_t place_bytes = int64_t{height} * width * kChannels * 4;
    const int32_t coefficients = kChannels + kRank * kRank;
    int32_t current = b.value(height, width, kChannels, true);
    const int32_t last = b.value(height, width, kChannels, true), given = b.value(1, 1, coefficients, true);
    for (int i = 0; i < 5; ++i) {
      const int32_t out = i == 4 ? last : b.value(height, width, kChannels);
      if (i < 4) b.values[out].offset = i % 2 * place_bytes;
      const int32_t conv = pointwise(random, kChannels, kChannels), q = pointwise(random, kChannels, kRank);
      Step& step = b.step(kChannelFusion, current, out, conv);
      step.conv[1] = q, step.conv[2] = pointwise(random, kRank, kChannels);
      step.aux[0] = given, step.activation[0] = kRelu6;
      step.ints[0] = step.ints[1] = step.ints[3] = step.ints[4] = 1;
      current = out;
    }
    b.arena = 2 * place_bytes;
  }
  static constexpr int32_t kRank = 12;
  PlanBuilder b;

 private:
  int32_t pointwise(std::mt19937& random, int32_t in, int32_t out) {
    return b.conv(noise(random, int64_t{in} * out, 0.1f), noise(random, out), in, out, 1, 1, 1, 0);
  }
};

struct Result {
  std::vector<float> out;
  std::vector<int64_t> open;
};

Result run(PlanBuilder& b, std::vector<float>& x, int64_t images, int32_t threads, int64_t batch, int64_t window, int32_t steps = 1,
           float* coefficients = nullptr) {
  Result result{std::vector<float>(x.size()), std::vector<int64_t>(b.grids.size() + 1)};
  void* plan = b.create();
  if (!plan) return ++failures, result;
  dynaconv_plan_limits(plan, batch, window, steps);
  // Another number of images first: an arena changes its windows with them.
  dynaconv_plan_release(plan, dynaconv_plan_acquire(plan, images + 2));
  void* context = dynaconv_plan_acquire(plan, images);
  void* externals[] = {x.data(), result.out.data(), coefficients};
  const int32_t planes[3] = {};
  Call call{};
  call.images = images, call.threads = threads, call.last = static_cast<int32_t>(b.steps.size());
  call.externals = externals, call.external_planes = planes, call.open_rows = result.open.data();
  char error[256] = "";
  if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
  dynaconv_plan_release(plan, context);
  dynaconv_plan_destroy(plan);
  return result;
}

// Every thread takes images alone, or all take the batch together.
void test_own_windows(std::mt19937& random) {
  const int32_t h = 1 + random() % 5, w = 1 + random() % 5, threads = 1 + random() % 3;
  const int64_t images = 1 + random() % 9, map = int64_t{h} * w * kChannels;
  Fusions fusions(random, h, w);
  auto x = noise(random, images * map), coefficients = noise(random, images * (kChannels + Fusions::kRank * Fusions::kRank), 0.3f);
  const auto result = [&](int32_t of, int64_t window, int32_t steps) {
    return run(fusions.b, x, images, of, int64_t{1} << 40, window, steps, coefficients.data()).out;
  };
  const auto together = result(1, 1, 1000);
  if (together == result(threads, 1 + random() % (16 * map), 1) && together == result(threads, 1, 1000)) return;
  ++failures;
  std::fprintf(stderr, "%d images of %dx%d, each by one of %d threads: something else\n", static_cast<int>(images), h, w, threads);
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (int i = 0; i < cases(100); ++i) test_own_windows(random);
  for (int i = 0; i < cases(100); ++i) {
    const int32_t h = 1 + random() % 11, w = 1 + random() % 11, threads = 1 + random() % 3;
    const int64_t images = 1 + random() % 7, row = int64_t{h} * w * kChannels * 4;
    Chain chain(random, h, w);
    auto x = noise(random, images * h * w * kChannels);
    const Result all = run(chain.b, x, images, threads, int64_t{1} << 40, 1);
    const Result some = run(chain.b, x, images, threads, 0, 1 + random() % (8 * row));
    if (all.out == some.out && all.open == some.open) continue;
    ++failures;
    std::fprintf(stderr, "case %d: windows of %d images of %dx%d give something else\n", i, static_cast<int>(images), h, w);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
