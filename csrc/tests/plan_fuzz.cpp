// Random plans for a bounded time. Half of them are valid: every step is compared with a slow interpreter, and nothing but
// its result may have changed. The others are damaged: they must be refused, or run without touching foreign memory.
//
// plan_fuzz [seconds] [first seed]: 0 seconds run the first plan only. -DDYNACONV_LIBFUZZER makes a target of libFuzzer.

#include <chrono>
#include <csignal>
#include <cstring>
#include <memory>

#include "damaged_plan.h"
#include "random_plan.h"
#include "slow_plan.h"

namespace {

uint64_t current_seed = 0;

void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

struct Handle {
  void* plan;
  explicit Handle(void* plan_) : plan(plan_) {}
  ~Handle() { dynaconv_plan_destroy(plan); }
};

// A valid plan, its inputs, and one context to run it in.
class Case {
 public:
  explicit Case(Source& source) : s_(source), random_(source), handle_(random_.b.create()), images_(1 + source.below(3)), threads_(1 + source.below(3)) {
    if (!handle_.plan) fail("a valid plan is refused");
    for (const Value& v : b().values) {
      if (v.external < 0) continue;
      inputs_.resize(std::max(inputs_.size(), size_t(v.external) + 1));
      inputs_[v.external] = s_.noise(images_ * v.height * v.width * v.channels);
      if (!random_.finite && s_.chance(10)) inputs_[v.external][s_.below(static_cast<int64_t>(inputs_[v.external].size()))] = NAN;
    }
    forced_pointers_.resize(b().grids.size());
    for (const int32_t grid : random_.gates) {
      if (!s_.chance(50)) continue;
      const int percent = s_.pick({0, 5, 30, 50, 80, 100});
      std::vector<uint8_t>& mask = forced_[grid];
      mask.resize(images_ * b().grids[grid].height * b().grids[grid].width);
      for (uint8_t& open : mask) open = s_.chance(percent);
      forced_pointers_[grid] = mask.data();
    }
    // Some plans take a few images at a time, whatever their size. A last result that nobody reads would not outlive its window.
    const int32_t last = b().steps.back().out;
    windows_ = s_.chance(50) && last >= 0 && b().values[last].external >= 0;
    if (windows_) dynaconv_plan_limits(handle_.plan, 0, 1 + s_.below(1 << 16), 1);
  }

  // Every step by itself, compared.
  void step_by_step() {
    begin();
    SlowPlan slow(b(), memory_, random_.planes, forced_);
    std::vector<int64_t> open(b().grids.size() + 1);
    for (int32_t i = 0; i < static_cast<int32_t>(b().steps.size()); ++i) {
      memory_ = read();
      const Written want = slow.step(b().steps[i]);
      if (run(i, i + 1, open.data()) != want.spoilt) fail(name(i) + "NaN in logits is told where there is none, or not told");
      compare(i, want, slow);
      for (const int32_t grid : {b().steps[i].grid, b().steps[i].grid2})
        if (grid >= 0 && !slow.mask(grid).need.empty() && open[grid] != slow.mask(grid).open()) fail(name(i) + "open rows are miscounted");
    }
    memory_ = read();
    end();
  }

  // All at once or in two runs: the same bits. A window may choose another way than the batch, and then other bits.
  void whole() {
    const Memory before = memory_;
    begin();
    const auto count = static_cast<int32_t>(b().steps.size());
    const int32_t cut = s_.chance(50) ? count : s_.below(count + 1);
    run(0, cut, nullptr);
    run(cut, count, nullptr);
    const Memory after = read();
    end();
    if (windows_) return close(before);
    if (!random_.sliced && !same_numbers(before.arena, after.arena)) fail(place(before.arena, after.arena) + "the arena differs from run to run, on " + std::to_string(threads_) + " threads");
    for (size_t i = 0; i < before.externals.size(); ++i)
      if (!same_numbers(before.externals[i], after.externals[i])) fail("a result differs from run to run");
  }

 private:
  const PlanBuilder& b() const { return random_.b; }
  std::string name(int32_t i) const { return "step " + std::to_string(i) + " of kind " + std::to_string(b().steps[i].kind) + ": "; }
  static bool same(const std::vector<float>& a, const std::vector<float>& c) {
    return a.size() == c.size() && std::memcmp(a.data(), c.data(), a.size() * sizeof(float)) == 0;
  }
  // Where two NaN meet, it is the order of the operands that decides which one is left.
  static bool same_numbers(const std::vector<float>& a, const std::vector<float>& c) {
    const auto equal = [](float x, float y) { return std::memcmp(&x, &y, sizeof x) == 0 || (std::isnan(x) && std::isnan(y)); };
    return a.size() == c.size() && std::equal(a.begin(), a.end(), c.begin(), equal);
  }

  // Results of windows against those of single steps, where no decision hangs on the last bits.
  void close(const Memory& before) const {
    for (const int32_t grid : random_.gates)
      if (!forced_.count(grid)) return;
    for (size_t i = 0; i < before.externals.size(); ++i) {
      const std::vector<float>&want = before.externals[i], &got = externals_[i];
      float scale = 1e-3f;
      for (const float v : want) scale = std::max(scale, std::isfinite(v) ? std::fabs(v) : 0.0f);
      for (size_t k = 0; k < want.size(); ++k)
        if (std::fabs(got[k] - want[k]) > 1e-4f * scale) fail("windows differ from steps by " + std::to_string(got[k] - want[k]) + " of " + std::to_string(scale));
    }
  }

  // The last step that wrote where two arenas differ.
  std::string place(const std::vector<float>& a, const std::vector<float>& c) const {
    size_t first = 0;
    while (std::memcmp(&a[first], &c[first], sizeof(float)) == 0) ++first;
    for (auto i = static_cast<int32_t>(b().steps.size()) - 1; i >= 0; --i) {
      if (b().steps[i].out < 0) continue;
      const Value& v = b().values[b().steps[i].out];
      const int64_t apart = static_cast<int64_t>(first) * 4 - v.offset * images_, at = apart / Memory::element_bytes(v);
      if (v.external < 0 && apart >= 0 && at < images_ * v.height * v.width * v.stride)
        return name(i) + "row " + std::to_string(at / v.stride) + ", channel " + std::to_string(at % v.stride) + ": ";
    }
    return "";
  }
  float* arena() const {
    for (size_t i = 0; i < b().values.size(); ++i)
      if (b().values[i].external < 0)
        return reinterpret_cast<float*>(static_cast<char*>(dynaconv_plan_value(handle_.plan, context_, static_cast<int32_t>(i))) -
                                        b().values[i].offset * images_ - b().values[i].first * Memory::element_bytes(b().values[i]));
    return nullptr;
  }
  void begin() {
    context_ = dynaconv_plan_acquire(handle_.plan, images_);
    if (!context_) fail("no memory for a few images");
    if (b().arena) std::memset(arena(), 0xff, b().arena * images_);  // not a number, wherever nobody has written
    // Each in memory of its own, exactly as large as it has to be.
    externals_ = inputs_;
    pointers_.clear();
    for (std::vector<float>& external : externals_) pointers_.push_back(external.data());
  }
  void end() { dynaconv_plan_release(handle_.plan, context_); }
  Memory read() const {
    return {std::vector<float>(arena(), arena() + b().arena / 4 * images_), externals_, images_};
  }
  // True where a mask was decided from NaN.
  bool run(int32_t first, int32_t last, int64_t* open_rows) {
    Call call{};
    call.images = images_, call.threads = threads_, call.first = first, call.last = last;
    call.externals = pointers_.data(), call.external_planes = random_.planes.data();
    call.forced = forced_pointers_.data(), call.open_rows = open_rows;
    char error[256] = "";
    const int failed = dynaconv_plan_run(handle_.plan, context_, &call, error, sizeof error);
    if (failed != 0 && failed != 3) fail(error);
    return failed == 3;
  }

  void compare(int32_t i, const Written& want, const SlowPlan& slow) {
    const Step& step = b().steps[i];
    Memory after = read();
    double worst = 0;
    if (want.value >= 0) {
      const Value& v = b().values[want.value];
      for (int64_t row = 0; row < static_cast<int64_t>(want.rows.size()); ++row) {
        if (!want.rows[row]) continue;
        const int64_t filled = want.filled.empty() ? want.channels : want.filled[row];
        for (int64_t c = 0; c < filled && want.rows[row] == 1; ++c) {
          const double wish = want.want[row * want.channels + c], is = after.at(v, row, want.channel + c * want.step);
          // bfloat16 keeps 8 bits.
          const double off = std::fabs(is - wish) - (v.dtype == kBfloat16 ? std::fabs(wish) / 256 : 0);
          if (std::isnan(wish) != std::isnan(is)) fail(name(i) + "a number where none should be, or none where one should");
          worst = std::max(worst, std::isnan(off) || is == wish ? 0 : off);
        }
        for (int64_t c = 0; c < filled; ++c) {
          const int64_t at = want.channel + c * want.step;
          std::memcpy(memory_.element(v, row, at), after.element(v, row, at), Memory::element_bytes(v));
        }
      }
    }
    if (worst > want.error * want.scale) fail(name(i) + "off by " + std::to_string(worst) + " of " + std::to_string(want.scale));
    if (step.kind == kGate && step.aux[0] >= 0) {
      const Value& sums = b().values[step.aux[0]];
      std::memcpy(memory_.row(sums, 0), after.row(sums, 0), images_ * sums.height * sizeof(float));
    }
    if (step.kind == kInverted && step.aux[1] >= 0)
      means(i, step, after, step.grid >= 0 ? slow.mask(step.grid).need.data() : nullptr);
    if (!same(memory_.arena, after.arena)) fail(name(i) + "something else in the arena has changed");
    for (size_t e = 0; e < externals_.size(); ++e)
      if (!same(memory_.externals[e], after.externals[e])) fail(name(i) + "something else in a tensor has changed");
  }

  // The mean that a step takes beside its result, over the open rows.
  void means(int32_t i, const Step& step, Memory& after, const uint8_t* need) {
    const Value &out = b().values[step.out], &mean = b().values[step.aux[1]];
    const int64_t area = int64_t{out.height} * out.width;
    for (int64_t n = 0; n < images_; ++n)
      for (int64_t c = 0; c < out.channels; ++c) {
        double sum = 0, most = 1e-6, count = 0;
        for (int64_t p = n * area; p < (n + 1) * area; ++p) {
          if (need && !need[p]) continue;
          const double v = after.row(out, p)[c];
          sum += v, most = std::max(most, std::fabs(v)), ++count;
        }
        const double got = after.row(mean, n)[c], wanted = count ? sum / count : 0;
        if (std::fabs(got - wanted) > 2e-5 * most || (got == got) != (wanted == wanted))
          fail(name(i) + "its mean is " + std::to_string(got) + ", not " + std::to_string(wanted));
        memory_.row(mean, n)[c] = static_cast<float>(got);
      }
  }

  Source& s_;
  RandomPlan random_;
  Handle handle_;
  int64_t images_;
  int32_t threads_;
  bool windows_ = false;
  std::vector<std::vector<float>> inputs_, externals_;
  std::vector<void*> pointers_;
  std::map<int32_t, std::vector<uint8_t>> forced_;
  std::vector<const uint8_t*> forced_pointers_;
  Memory memory_{};
  void* context_ = nullptr;
};

int64_t refused = 0, accepted = 0;

void damaged(Source& source) {
  RandomPlan random(source);
  DamagedPlan plan(source, random.b, random.planes);
  char error[256] = "";
  const Handle handle(dynaconv_plan_create(&plan.data, source.chance(90) ? error : nullptr, sizeof error));
  if (!handle.plan) {
    ++refused;
    return;
  }
  ++accepted;
  plan.run(source, handle.plan);
}

void once(Source& source) {
  if (source.chance(50)) return damaged(source);
  Case c(source);
  c.step_by_step();
  c.whole();
}

}  // namespace

// The sanitizers end with a signal, so that the seed is told whoever finds something.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1:abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1:abort_on_error=1"; }

#ifdef DYNACONV_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Source source(data, size);
  once(source);
  return 0;
}
#else
int main(int count, char** arguments) {
  std::signal(SIGABRT, [](int) { std::fprintf(stderr, "seed %llu\n", static_cast<unsigned long long>(current_seed)); });
  const double seconds = count > 1 ? std::atof(arguments[1]) : 30;
  const auto start = std::chrono::steady_clock::now();
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device()();
  std::printf("first seed %llu\n", static_cast<unsigned long long>(first));
  std::fflush(stdout);
  int64_t plans = 0;
  do {
    current_seed = first + plans++;
    Source source(current_seed);
    once(source);
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%lld plans; of the damaged ones %lld were refused and %lld ran\n", static_cast<long long>(plans),
              static_cast<long long>(refused), static_cast<long long>(accepted));
  return 0;
}
#endif
