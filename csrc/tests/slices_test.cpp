// An expansion with its depthwise convolution, and the channel fusion that projects its result: in one run both are cut by the
// same channels and hand them over in slices; step by step they hand over rows. The results must be the same bits.

#include <algorithm>
#include <cstring>

#include "plan_builder.h"

namespace {

int failures = 0, handed = 0;

struct Case {
  int32_t n, h, w, in, hidden, out, rank, stride, threads;
  bool folded, seen;  // seen: a third step looks at what lies between
};

struct Made {
  std::vector<float> result, between;
};

class Pair {
 public:
  Pair(const Case& c, std::mt19937& random)
      : c_(c), oh_((c.h - 1) / c.stride + 1), ow_((c.w - 1) / c.stride + 1), x_(noise(random, int64_t{c.n} * c.h * c.w * c.in)),
        given_(noise(random, int64_t{c.n} * (c.out + c.rank * c.rank), 0.3f)) {
    const int32_t in = b_.value(c.h, c.w, c.in, true), out = b_.value(oh_, ow_, c.out, true);
    const int32_t given = b_.value(1, 1, c.out + c.rank * c.rank, true), sum = b_.value(1, 1, c.hidden, true);
    between_ = b_.value(oh_, ow_, c.hidden);
    const auto drawn = [&](int32_t from, int32_t to) {
      return b_.conv(noise(random, int64_t{from} * to, 0.2f), noise(random, to), from, to, 1, 1, 1, 0);
    };
    const int32_t expand = drawn(c.in, c.hidden), middle = b_.place(Conv{}, c.hidden, 3, c.stride, 1, 1);
    b_.convs[middle].weight = b_.keep(noise(random, 9 * c.hidden)), b_.convs[middle].bias = b_.keep(noise(random, c.hidden));
    b_.convs[middle].out_channels = b_.convs[middle].groups = c.hidden;
    const int32_t project = drawn(c.hidden, c.out), reduce = drawn(c.hidden, c.rank), last = drawn(c.rank, c.out);
    if (c.folded) b_.convs[reduce].weight = b_.keep(noise(random, int64_t{c.hidden} * c.rank, 0.2f));
    Step& first = b_.step(kInverted, in, between_, expand);
    first.conv[1] = middle, first.activation[0] = first.activation[1] = kRelu6;
    if (c.seen) b_.step(kMean, between_, sum);
    Step& second = b_.step(kChannelFusion, between_, out, project);
    second.conv[1] = reduce, second.conv[2] = last, second.aux[0] = given;
    second.ints[0] = second.ints[1] = second.ints[4] = 1, second.ints[3] = !c.folded;
    plan_ = b_.create();
  }
  ~Pair() { dynaconv_plan_destroy(plan_); }

  Made run(bool at_once) {
    Made made{std::vector<float>(int64_t{c_.n} * oh_ * ow_ * c_.out), {}};
    std::vector<float> sum(int64_t{c_.n} * c_.hidden);
    void* context = dynaconv_plan_acquire(plan_, c_.n);
    void* externals[] = {x_.data(), made.result.data(), given_.data(), sum.data()};
    const int32_t planes[4] = {}, count = static_cast<int32_t>(b_.steps.size());
    for (int32_t i = 0; i < count; i += at_once ? count : 1) {
      Call call{};
      call.images = c_.n, call.threads = c_.threads, call.first = i, call.last = at_once ? count : i + 1;
      call.externals = externals, call.external_planes = planes;
      char error[256] = "";
      if (dynaconv_plan_run(plan_, context, &call, error, sizeof error)) std::fprintf(stderr, "%s\n", error), ++failures;
    }
    const auto* from = static_cast<const float*>(dynaconv_plan_value(plan_, context, between_));
    made.between.assign(from, from + int64_t{c_.n} * oh_ * ow_ * c_.hidden);
    dynaconv_plan_release(plan_, context);
    return made;
  }

 private:
  const Case c_;
  const int32_t oh_, ow_;
  PlanBuilder b_;
  std::vector<float> x_, given_;
  int32_t between_;
  void* plan_;
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void compare(const Case& c, std::mt19937& random) {
  Pair pair(c, random);
  const Made single = pair.run(false), whole = pair.run(true), again = pair.run(true);
  const bool slices = !same(single.between, whole.between);
  handed += slices;
  if (same(single.result, whole.result) && same(whole.result, again.result) && !(slices && c.seen)) return;
  ++failures;
  std::fprintf(stderr, "n%d %dx%d in%d hidden%d out%d rank%d s%d t%d folded %d seen %d: slices %d, other results\n", c.n, c.h, c.w, c.in,
               c.hidden, c.out, c.rank, c.stride, c.threads, c.folded, c.seen, slices);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const auto pick = [&](std::initializer_list<int> of) { return *(of.begin() + random() % of.size()); };
  for (int i = 0; i < cases(150); ++i) {
    const bool folded = random() % 2;
    const int n = pick({1, 2, 3, 5}), side = pick({7, 8, 14}), hidden = folded ? pick({256, 300, 384}) : pick({128, 192, 250});
    compare({n, side, pick({7, 8, 14}), pick({3, 16, 24}), hidden, pick({24, 33, 64}), pick({4, 12, 36}), pick({1, 1, 2}), pick({1, 2, 3}),
             folded, i % 5 == 4}, random);
  }
  std::printf("%d failures, %d handed over in slices\n", failures, handed);
  return failures != 0 || handed < cases(150) / 10;
}
