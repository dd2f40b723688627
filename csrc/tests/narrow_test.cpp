// Narrow steps against plain loops over the open channels: the same bits from any number of threads (of convolutions) and from
// run to run, nothing else touched.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan_builder.h"
#include "slow_plan.h"

namespace {

int failures = 0;

struct Case {
  int32_t n, h, w, in, hidden, out, groups, kernel, stride, dilation, percent, middle;
  bool winograd, alone, add, inverted;
};

void fail(const Case& c, const std::string& text) {
  std::fprintf(stderr, "n %d, %d x %d, %d -> %d -> %d in %d groups, kernel %d / %d / %d, middle %d, inverted %d, winograd %d: %s\n", c.n, c.h,
               c.w, c.in, c.hidden, c.out, c.groups, c.kernel, c.stride, c.dilation, c.middle, c.inverted, c.winograd, text.c_str());
  ++failures;
}

class Network {
 public:
  Network(const Case& c, std::mt19937& random) : c_(c), random_(random) {
    const int32_t in = b.value(c.h, c.w, c.in, true), logits = b.value(1, 1, c.groups);
    grid_ = b.grid(1, c.groups);
    const int32_t own = (c.kernel - 1) * c.dilation / 2;
    h_ = (c.h + 2 * own - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
    w_ = (c.w + 2 * own - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
    b.step(kMean, in, b.value(1, 1, c.in));
    // Forced decisions replace the logits, which must be there.
    b.step(kConv, b.steps.back().out, logits, conv(c.in, c.groups, 1, 1, 1, 0, 1));
    b.step(kThreshold, logits, -1).grid = grid_;
    if (c.inverted) inverted(in, own);
    else chain(in, own);
    for (size_t i = 3; i < b.steps.size(); ++i) b.steps[i].grid = grid_;
  }
  PlanBuilder b;

  int32_t grid() const { return grid_; }
  std::vector<int32_t> convs_with_both() const { return both_; }

 private:
  int32_t conv(int32_t in, int32_t out, int32_t groups, int32_t kernel, int32_t stride, int32_t padding, int32_t dilation) {
    const float scale = 1 / std::sqrt(static_cast<float>(in / groups * kernel * kernel));
    return b.conv(noise(random_, int64_t{out} * (in / groups) * kernel * kernel, scale), noise(random_, out), in, out, groups, kernel, stride,
                  padding, dilation);
  }
  int32_t depthwise(int32_t channels, int32_t stride, int32_t padding) {
    Conv c{};
    c.weight = b.keep(noise(random_, int64_t{channels} * c_.kernel * c_.kernel)), c.bias = b.keep(noise(random_, channels));
    c.out_channels = c.groups = channels;
    return b.place(c, channels, c_.kernel, stride, padding, c_.dilation);
  }
  void narrow(int32_t kind, int32_t in, int32_t out, int32_t id, bool ins, bool outs, int32_t act) {
    Step& step = b.step(kNarrow, in, out, id);
    step.ints[0] = kind, step.ints[1] = ins, step.ints[2] = outs, step.activation[0] = act;
    Conv& c = b.convs[id];
    if (!c_.winograd || kind != kConv || c.kernel[0] != 3 || c.stride[0] != 1 || c.dilation[0] != 1 || c.groups != 1) return;
    transform(c);
    both_.push_back(id);
  }
  // F(2x2, 3x3) of packed weights.
  void transform(Conv& c) {
    const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    const int64_t in = c.in_channels, panels = (c.out_channels + 31) / 32;
    const auto* weight = static_cast<const float*>(c.weight);
    std::vector<float> points(panels * 16 * in * 32);
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t p = 0; p < 16; ++p)
        for (int64_t i = 0; i < in * 32; ++i) {
          double sum = 0;
          for (int64_t t = 0; t < 9; ++t) sum += g[p / 4][t / 3] * g[p % 4][t % 3] * weight[(panel * 9 + t) * in * 32 + i];
          points[(panel * 16 + p) * in * 32 + i] = static_cast<float>(sum);
        }
    c.winograd = b.keep(points);
  }
  void chain(int32_t in, int32_t own) {
    const int32_t hidden = b.value(c_.h, c_.w, c_.hidden, false, c_.hidden + 3);
    narrow(kConv, in, hidden, conv(c_.in, c_.hidden, 1, c_.kernel, 1, own, c_.dilation), false, true, kRelu);
    // In groups there are twice as many outputs, lest they be depthwise.
    const int32_t width = c_.middle == 2 ? 2 * c_.hidden : c_.hidden, second = b.value(h_, w_, width);
    if (c_.middle == 1 && c_.hidden > 1) narrow(kDepthwise, hidden, second, depthwise(c_.hidden, c_.stride, own), true, true, kSilu);
    else narrow(kConv, hidden, second, conv(c_.hidden, width, c_.middle == 2 ? c_.groups : 1, c_.kernel, c_.stride, own, c_.dilation), true, true, kRelu6);
    const bool add = c_.add && h_ == c_.h && w_ == c_.w && c_.in == c_.out;
    narrow(kConv, second, b.value(h_, w_, c_.out), conv(width, c_.out, 1, c_.kernel, 1, own, c_.dilation), true, false, kNone);
    if (add) b.steps.back().in2 = in;
    b.steps.back().final_activation = kHardswish;
  }
  void inverted(int32_t in, int32_t own) {
    const bool add = c_.add && h_ == c_.h && w_ == c_.w && c_.in == c_.out;
    Step& step = b.step(kNarrow, in, b.value(h_, w_, c_.out), conv(c_.in, c_.hidden, 1, 1, 1, 0, 1));
    const int32_t middle = depthwise(c_.hidden, c_.stride, own), last = conv(c_.hidden, c_.out, 1, 1, 1, 0, 1);
    step.ints[0] = kInverted, step.conv[1] = middle, step.conv[2] = last, step.activation[0] = kRelu, step.activation[1] = kHardswish;
    if (add) step.in2 = in;
  }

  const Case& c_;
  std::mt19937& random_;
  int32_t grid_, h_, w_;
  std::vector<int32_t> both_;
};

// One plan, its picture, and the decisions.
class Trial {
 public:
  Trial(const Case& c, std::mt19937& random) : c_(c), net_(c, random), picture_(noise(random, int64_t{c.n} * c.h * c.w * c.in)) {
    std::vector<uint8_t>& open = forced_[net_.grid()];
    for (int32_t i = 0; i < c.n * c.groups; ++i) open.push_back(static_cast<int32_t>(random() % 100) < c.percent);
    // Images share a convolution where their decisions are the same.
    for (int32_t n = 1; n < c.n; ++n)
      if (random() % 2) std::copy_n(open.begin() + (n - 1) * c.groups, c.groups, open.begin() + n * c.groups);
    forced_pointer_ = open.data();
  }
  void run() {
    PlanBuilder& b = net_.b;
    const std::vector<Conv> whole = b.convs;
    if (c_.alone) {
      for (const int32_t id : net_.convs_with_both()) b.convs[id].weight = nullptr;
    }
    void* plan = b.create();
    b.convs = whole;
    if (!plan) return fail(c_, "refused");
    std::vector<float> once;
    for (int32_t threads = 1; threads <= 4; ++threads) {
      const std::vector<float> arena = steps(plan, threads);
      // An inverted residual may be cut among its threads by hidden channels, and then adds them up in another order.
      if (c_.inverted) once = steps(plan, threads);
      else if (threads == 1) once = arena;
      if (once.size() != arena.size() || std::memcmp(once.data(), arena.data(), arena.size() * sizeof(float)))
        fail(c_, std::to_string(threads) + " threads give other bits");
    }
    dynaconv_plan_destroy(plan);
  }

 private:
  // Every step by itself from memory that is no number wherever nobody has written.
  std::vector<float> steps(void* plan, int32_t threads) {
    PlanBuilder& b = net_.b;
    void* const context = dynaconv_plan_acquire(plan, c_.n);
    auto* const arena = static_cast<float*>(dynaconv_plan_value(plan, context, 1)) - b.values[1].offset / 4 * c_.n;
    const int64_t floats = b.arena / 4 * c_.n;
    std::memset(arena, 0xff, floats * sizeof(float));
    void* externals[] = {picture_.data()};
    const std::vector<int32_t> planes = {0};
    const uint8_t* forced[] = {forced_pointer_};
    Memory memory{{}, {picture_}, c_.n};
    SlowPlan slow(b, memory, planes, forced_);
    for (int32_t i = 0; i < static_cast<int32_t>(b.steps.size()); ++i) {
      memory.arena.assign(arena, arena + floats);
      const Written want = slow.step(b.steps[i]);
      Call call{};
      call.images = c_.n, call.threads = threads, call.first = i, call.last = i + 1;
      call.externals = externals, call.external_planes = planes.data(), call.forced = forced;
      char error[256] = "";
      if (dynaconv_plan_run(plan, context, &call, error, sizeof error)) fail(c_, error);
      if (b.steps[i].kind == kNarrow) compare(want, memory, {arena, arena + floats});
    }
    const std::vector<float> after(arena, arena + floats);
    dynaconv_plan_release(plan, context);
    return after;
  }
  void compare(const Written& want, Memory& before, std::vector<float> arena) {
    Memory after{std::move(arena), before.externals, before.images};
    const Value& v = net_.b.values[want.value];
    double worst = 0;
    for (int64_t row = 0; row < static_cast<int64_t>(want.rows.size()); ++row)
      for (int64_t c = 0; c < want.filled[row]; ++c) {
        const float got = after.row(v, row)[c];
        worst = std::isnan(got) ? INFINITY : std::max(worst, std::fabs(got - want.want[row * want.channels + c]));
        before.row(v, row)[c] = got;
      }
    if (!(worst <= 2e-5 * want.scale)) fail(c_, "off by " + std::to_string(worst) + " of " + std::to_string(want.scale));
    if (std::memcmp(before.arena.data(), after.arena.data(), after.arena.size() * sizeof(float))) fail(c_, "something else has changed");
  }

  Case c_;
  Network net_;
  std::vector<float> picture_;
  std::map<int32_t, std::vector<uint8_t>> forced_;
  const uint8_t* forced_pointer_;
};

// Changes a good plan so that it no longer fits.
void spoil(int what, PlanBuilder& b) {
  Step &first = b.steps[3], &middle = b.steps[4], &last = b.steps[5];
  switch (what) {
    case 0: b.grids[0].width = b.values[1].channels = 5; break;
    case 1: first.ints[1] = first.ints[2] = 0; break;
    case 2: first.ints[0] = kMean; break;
    case 3: first.grid = -1; break;
    case 4: first.in2 = first.out; break;
    case 5: middle.ints[2] = 0; break;
    case 6: middle.ints[0] = kConv; break;
    case 7: last.closed = 1; break;
    case 8: last.grid2 = 0; break;
    case 9: b.grids[0].height = 2; break;
    case 10: last.ints[0] = kDepthwise; break;
    case 11: b.convs[first.conv[0]].bias = nullptr; break;
    case 12: first.in = middle.out; break;
    case 13: b.convs[middle.conv[0]].winograd = b.convs[middle.conv[0]].weight; break;
    case 14: last.ints[0] = kInverted; break;
    default: std::swap(b.steps[2], b.steps[3]); break;
  }
}

void refused(std::mt19937& random) {
  const Case good{1, 5, 5, 3, 12, 7, 4, 3, 1, 1, 50, 1, false, false, false, false};
  for (int what = -1; what < 16; ++what) {
    Network net(good, random);
    if (what >= 0) spoil(what, net.b);
    std::string reason;
    void* const plan = net.b.create(&reason);
    if ((plan != nullptr) != (what < 0)) fail(good, what < 0 ? "refused: " + reason : "an impossible plan is taken: " + std::to_string(what));
    if (plan) dynaconv_plan_destroy(plan);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(90); ++i) {
    Case c{};
    c.n = pick({1, 3, 8}), c.h = pick({1, 3, 4, 7}), c.w = pick({2, c.h, 5}), c.groups = pick({1, 2, 3, 4, 8});
    c.in = pick({1, 3, 17, 40}), c.out = pick({c.in, 5, 33}), c.hidden = c.groups * pick({1, 3, 4, 8, 17, 32});
    c.kernel = pick({1, 3, 3, 5}), c.stride = pick({1, 1, 2}), c.dilation = pick({1, 1, 1, 2}), c.percent = pick({0, 40, 60, 100});
    c.middle = pick({0, 1, 2}), c.winograd = random() % 3, c.alone = c.winograd && random() % 4 == 0, c.add = random() % 2;
    c.inverted = random() % 3 == 0;
    Trial(c, random).run();
  }
  refused(random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
