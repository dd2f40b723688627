// Creating, running and destroying plans.

#include "run.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <sched.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#include "slices.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kMostBytes = int64_t{1} << 46;   // of an arena: more than a processor can address is a mistake
constexpr int32_t kMostThreads = 1024;

int64_t widest(const Plan& plan) {
  int64_t most = 64;
  for (const Value& value : plan.values) most = std::max<int64_t>(most, value.stride);
  return most + 64;
}

// Rows of the whole batch are counted in 32 bits, bytes of the arena and the masks in 64.
int64_t most_images(const Plan& plan) {
  int64_t area = 1, bytes = plan.data.arena_bytes + 1;
  for (const Value& value : plan.values) area = std::max(area, int64_t{value.height} * value.width);
  for (const Grid& grid : plan.grids) {
    area = std::max(area, int64_t{grid.height} * grid.width);
    bytes += 4 * int64_t{sizeof(Position)} * grid.height * grid.width;
  }
  return std::min(std::numeric_limits<int32_t>::max() / area, kMostBytes / bytes);
}

// Whether a step reads the list of open positions of `grid`; the others look at its bytes.
bool walks_open(const Step& step) {
  switch (step.kind) {
    case kDepthwise: case kInverted: case kMean: case kThreshold: case kDilate: case kMaskValue: case kNarrow: return false;
    default: return !step.closed;
  }
}

// Lays the masks out in one region; false when there is no memory.
bool place_masks(const Plan& plan, Arena& arena, int64_t images) {
  const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  for (int pass = 0; pass < 2; ++pass) {
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
      char* from = pass ? arena.masks.data() + at : nullptr;
      at += rounded(bytes);
      return from;
    };
    for (size_t g = 0; g < plan.grids.size(); ++g) {
      const int64_t count = images * plan.grids[g].height * plan.grids[g].width;
      GridState& state = arena.batch.grids[g];
      state.need = reinterpret_cast<uint8_t*>(take(count));
      state.open = plan.walked[g] ? reinterpret_cast<Position*>(take(count * sizeof(Position))) : nullptr;
      state.closed = plan.grids[g].closed ? reinterpret_cast<Position*>(take(count * sizeof(Position))) : nullptr;
      state.image_counts = reinterpret_cast<int32_t*>(take(images * sizeof(int32_t)));
      const Grid& grid = plan.grids[g];
      const int64_t tiles = images * ((grid.height + 1) / 2) * ((grid.width + 1) / 2);
      state.tiles = grid.tiles ? reinterpret_cast<Position*>(take(tiles * sizeof(Position))) : nullptr;
      state.tile_counts = reinterpret_cast<int32_t*>(take(images * sizeof(int32_t)));
      state.open_count = state.tile_count = 0;
    }
    if (pass == 0) {
      if (!arena.masks.reserve(at + kSlack)) return false;
      // Whatever a run does first, it finds closed masks there and no garbage.
      std::memset(arena.masks.data(), 0, at);
    }
  }
  return true;
}

// The masks of some images of the batch.
Context window_of(const Plan& plan, const Context& batch, int64_t first, int64_t images) {
  Context window{first, images, batch.grids};
  for (size_t g = 0; g < plan.grids.size(); ++g) {
    const Grid& grid = plan.grids[g];
    const int64_t before = first * grid.height * grid.width;
    GridState& state = window.grids[g];
    state.need += before;
    if (state.open) state.open += before;
    if (state.closed) state.closed += before;
    if (state.tiles) state.tiles += first * ((grid.height + 1) / 2) * ((grid.width + 1) / 2);
    state.image_counts += first;
    state.tile_counts += first;
  }
  return window;
}

// Everything in an arena that depends on the number of images; false when there is no memory.
bool lay_out(const Plan& plan, Arena& arena, int64_t images) {
  arena.batch.images = 0;  // until all is there
  arena.batch.grids.resize(plan.grids.size());
  arena.stages = stages_of(plan, images);
  arena.own_stages = own_stages_of(plan, images);
  arena.windows.clear();
  if (!arena.values.reserve(plan.data.arena_bytes * images + kSlack) || !place_masks(plan, arena, images)) return false;
  int64_t most = 0;
  for (const Stage& stage : arena.stages) {
    std::vector<Context>& windows = arena.windows.emplace_back();
    for (int64_t first = 0; first < images; first += stage.images)
      windows.push_back(window_of(plan, arena.batch, first, std::min(stage.images, images - first)));
    most = std::max(most, stage.images);
  }
  if (most && !arena.window.reserve(plan.data.arena_bytes * most + kSlack)) return false;
  arena.batch.images = images;
  return true;
}

void say(char* error, int64_t size, const std::string& text) {
  if (error && size > 0) std::snprintf(error, size, "%s", text.c_str());
}

int64_t bytes_of(const Arena& arena) {
  return arena.values.bytes() + arena.window.bytes() + arena.masks.bytes() + arena.scratch.bytes() + arena.counters.bytes();
}

std::string check_call(const Plan& plan, const Arena& arena, const Call& call) {
  if (call.images < 1 || call.images != arena.batch.images) return "the number of images is not that of the context";
  if (call.first < 0 || call.last > static_cast<int32_t>(plan.steps.size()) || call.first > call.last)
    return "the range of steps lies outside the plan";
  if (call.threads < 1 || call.threads > kMostThreads) return "a run takes 1 to " + std::to_string(kMostThreads) + " threads";
  if (plan.data.external_count > 0 && (!call.externals || !call.external_planes)) return "the external tensors are missing";
  for (int32_t i = call.first; i < call.last; ++i) {
    const Step& step = plan.steps[i];
    for (const int32_t id : {step.in, step.in2, step.out, step.aux[0], step.aux[1], step.aux[2], step.aux[3]}) {
      const int32_t external = id < 0 ? -1 : plan.values[id].external;
      if (external < 0) continue;
      if (!call.externals[external]) return "external tensor " + std::to_string(external) + " is missing";
      if (call.external_planes[external] && !(id == step.in && (step.kind == kLayout || step.kind == kStem)))
        return "external tensor " + std::to_string(external) + " must be rows, not planes";
    }
  }
  return "";
}

// The runs that a call is made of: stages that it holds whole in windows, everything else for the whole batch.
class Runs {
 public:
  Runs(const Plan& plan, Arena& arena, const Call& call, Barrier& barrier, std::atomic<int32_t>& spoilt)
      : plan_(plan), arena_(arena), call_(call), barrier_(barrier), spoilt_(spoilt) {}

  std::vector<Run> all() {
    arena_.own_windows.clear();
    own_ = deals_evenly(call_.images, call_.threads);
    int32_t at = call_.first;
    for (const Stage* stage; (stage = next(at)); at = stage->last) {
      if (at < stage->first) add(arena_.batch, nullptr, at, stage->first);
      if (is_own(*stage)) add_own(*stage);
      else
        for (Context& window : arena_.windows[stage - arena_.stages.data()]) add(window, stage, stage->first, stage->last);
    }
    if (at < call_.last) add(arena_.batch, nullptr, at, call_.last);
    return std::move(runs_);
  }

 private:
  bool is_own(const Stage& stage) const {
    const auto& own = arena_.own_stages;
    return !own.empty() && &stage >= &own.front() && &stage <= &own.back();
  }
  // The stage that begins first from `at` on.
  const Stage* next(int32_t at) const {
    const Stage* found = nullptr;
    const auto look = [&](const Stage& stage) {
      if (stage.first >= at && stage.last <= call_.last && (!found || stage.first < found->first)) found = &stage;
    };
    for (const Stage& stage : arena_.own_stages)
      if (own_) look(stage);
    for (const Stage& stage : arena_.stages)
      if (!own_ || !meets_own(stage)) look(stage);
    return found;
  }
  bool meets_own(const Stage& stage) const {
    for (const Stage& own : arena_.own_stages)
      if (own.first < stage.last && stage.first < own.last) return true;
    return false;
  }
  Run& add(Context& context, const Stage* stage, int32_t first, int32_t last) {
    Call own = call_;
    own.images = context.images;
    runs_.push_back(Run{plan_, context, own, barrier_, spoilt_, nullptr, arena_, stage, first, last, false, arena_.window.data()});
    return runs_.back();
  }
  // Every thread's images in windows of equal size.
  void add_own(const Stage& stage) {
    const int64_t share = call_.images / call_.threads, windows = call_.threads * ((share + stage.images - 1) / stage.images);
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t first = call_.images * w / windows, last = call_.images * (w + 1) / windows;
      arena_.own_windows.push_back({first, last - first, {}});
      add(arena_.own_windows.back(), &stage, stage.first, stage.last).own = true;
    }
  }

  const Plan& plan_;
  Arena& arena_;
  const Call& call_;
  Barrier& barrier_;
  std::atomic<int32_t>& spoilt_;
  bool own_ = false;
  std::vector<Run> runs_;
};

// Of a window that one thread takes alone; 0 where there is none.
int64_t most_own_images(const Arena& arena, int64_t images, int threads) {
  int64_t most = 0;
  if (deals_evenly(images, threads))
    for (const Stage& stage : arena.own_stages) most = std::max(most, std::min(stage.images, images / threads));
  return most;
}

// With room for vector reads beyond them, so that the next thread's memory begins on a page of its own.
int64_t pages(int64_t bytes) { return bytes ? (bytes + kSlack + 4095) / 4096 * 4096 : 0; }

// Gives every run its counters, all zero; false when there is no memory.
bool count_from_zero(std::vector<Run>& runs, Region& region, int threads) {
  const auto count = [=](const Run& run) { return int64_t{run.last - run.first} * kPhases * threads; };
  int64_t all = 0;
  for (const Run& run : runs) all += count(run);
  if (!region.reserve(all * static_cast<int64_t>(sizeof(std::atomic<int64_t>)) + kSlack)) return false;
  auto* counters = reinterpret_cast<std::atomic<int64_t>*>(region.data());
  for (int64_t i = 0; i < all; ++i) new (counters + i) std::atomic<int64_t>(0);
  for (Run& run : runs) {
    run.counters = counters;
    counters += count(run);
  }
  return true;
}

// A thread and its memory.
struct Thread {
  int id, threads;
  char *scratch, *shared;
  char *own_shared, *own_window;  // while it takes windows alone
  const float* zeros;
};

class Clock {
 public:
  // The end of a step of the first thread. From the end of one step to the end of the next: a thread that comes late must not
  // hide what the others did.
  void tick(const Run& run, int32_t step, int id) {
    if (!run.call.step_ns || id != 0) return;
    const auto now = std::chrono::steady_clock::now();
    run.call.step_ns[step] += std::chrono::duration<double, std::nano>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// The steps of a window by one thread.
void work_alone(const Run& run, const Thread& thread, Clock& clock) {
  Run own = run;
  own.window = thread.own_window;
  Worker worker{own, 0, 1, thread.scratch, thread.own_shared, thread.zeros};
  for (int32_t i = own.first; i < own.last; ++i) {
    worker.step = i;
    worker.phase = 0;
    worker.upcoming = upcoming_weights(own, i, 0, 1);
    function_of(own.plan.steps[i].kind)(worker, own.plan.steps[i]);
    clock.tick(own, i, thread.id);
  }
}

void work_together(Run& run, const Thread& thread, Clock& clock) {
  Worker worker{run, thread.id, thread.threads, thread.scratch, thread.shared, thread.zeros};
  Worker alone{run, thread.id, 1, thread.scratch, thread.shared, thread.zeros};
  for (int32_t i = run.first; i < run.last; ++i) {
    const Step& step = run.plan.steps[i];
    worker.step = alone.step = i;
    worker.phase = 0;
    worker.upcoming = upcoming_weights(run, i, thread.id, thread.threads);
    if (!is_small(run, step)) function_of(step.kind)(worker, step);
    else if (thread.id == 0) function_of(step.kind)(alone, step);
    const bool goes_on = i + 1 < run.last && ends_alone(run, i) && is_small(run, run.plan.steps[i + 1]);
    if (!goes_on) worker.barrier();
    clock.tick(run, i, thread.id);
  }
}

void work(std::vector<Run>& runs, const Thread& thread) {
  Clock clock;
  for (size_t first = 0, last; first < runs.size(); first = last) {
    last = first + 1;
    if (!runs[first].own) {
      work_together(runs[first], thread, clock);
      continue;
    }
    while (last < runs.size() && runs[last].own && runs[last].stage == runs[first].stage) ++last;
    Worker dealer{runs[first], thread.id, thread.threads, nullptr, nullptr, nullptr, runs[first].first};
    dealer.share(last - first, [&](int64_t window) { work_alone(runs[first + window], thread, clock); });
    dealer.barrier();
  }
}

// The batch counts what its windows have opened.
void count_open(const std::vector<Run>& runs, Arena& arena, const Call& call) {
  for (const Run& run : runs) {
    if (!run.stage) continue;
    for (int32_t i = run.first; i < run.last; ++i) {
      const Step& step = run.plan.steps[i];
      const int32_t grid = step.kind == kThreshold ? step.grid : step.kind == kDilate ? step.grid2 : -1;
      if (grid < 0) continue;
      int64_t& open = arena.batch.grids[grid].open_count;
      open = (run.context.first ? open : 0) + run.context.grids[grid].open_count;
    }
  }
  for (size_t g = 0; call.open_rows && g < arena.batch.grids.size(); ++g) call.open_rows[g] = arena.batch.grids[g].open_count;
}

}  // namespace

Region::~Region() { release(); }

bool Region::reserve(int64_t bytes) {
  if (bytes <= bytes_) return true;
  release();
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
#ifdef __linux__
  if (alignment == kHugePage) {
    // Straight from the system: memory that a heap has used before lies in small pages and stays there.
    void* const pages = mmap(nullptr, rounded + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return false;
    mapped_ = static_cast<char*>(pages);
    data_ = mapped_ + (-reinterpret_cast<uintptr_t>(mapped_) & (kHugePage - 1));
    madvise(data_, rounded, MADV_HUGEPAGE);
    bytes_ = rounded;
    return true;
  }
#endif
  data_ = static_cast<char*>(std::aligned_alloc(alignment, rounded));
  if (!data_) return false;
  bytes_ = rounded;
  return true;
}

void Region::release() {
#ifdef __linux__
  if (mapped_) munmap(mapped_, bytes_ + kHugePage);
  else std::free(data_);
  mapped_ = nullptr;
#else
  std::free(data_);
#endif
  data_ = nullptr;
  bytes_ = 0;
}

Plan::~Plan() {
  for (Arena* arena : free_arenas) delete arena;
}

void Barrier::wait() {
  const int round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
    if (spins > 8192) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
}

extern "C" {

void* dynaconv_plan_create(const PlanData* data, char* error, int64_t error_size) try {
  const std::string reason = data ? check_plan(*data) : "there is no plan";
  if (!reason.empty()) {
    say(error, error_size, reason);
    return nullptr;
  }
  auto plan = std::make_unique<Plan>();
  plan->data = *data;
  plan->values.assign(data->values, data->values + data->value_count);
  plan->convs.assign(data->convs, data->convs + data->conv_count);
  plan->grids.assign(data->grids, data->grids + data->grid_count);
  plan->steps.assign(data->steps, data->steps + data->step_count);
  plan->walked.resize(plan->grids.size());
  for (const Step& step : plan->steps)
    if (step.grid >= 0 && walks_open(step)) plan->walked[step.grid] = true;
  plan->partners = partners_of(*plan);
  plan->gate_panels = std::vector<Region>(plan->steps.size());
  for (size_t i = 0; i < plan->steps.size(); ++i)
    if (plan->steps[i].kind == kGate) pack_gate(*plan, plan->steps[i], plan->gate_panels[i]);
  return plan.release();
} catch (const std::bad_alloc&) {
  say(error, error_size, "out of memory");
  return nullptr;
}

void dynaconv_plan_destroy(void* plan) { delete static_cast<Plan*>(plan); }

void* dynaconv_plan_acquire(void* handle, int64_t images) try {
  Plan& plan = *static_cast<Plan*>(handle);
  if (images < 1 || images > most_images(plan)) return nullptr;
  std::unique_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> lock(plan.mutex);
    if (!plan.free_arenas.empty()) {
      arena.reset(plan.free_arenas.back());
      plan.free_arenas.pop_back();
      plan.held_bytes -= bytes_of(*arena);
    }
  }
  if (!arena) arena = std::make_unique<Arena>();
  if (arena->batch.images != images && !lay_out(plan, *arena, images)) return nullptr;
  const auto forget = [](Context& context) {
    for (GridState& grid : context.grids) grid.open_count = grid.tile_count = 0;
  };
  forget(arena->batch);
  for (std::vector<Context>& windows : arena->windows)
    for (Context& window : windows) forget(window);
  return arena.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

int64_t dynaconv_plan_most_images(void* plan) { return most_images(*static_cast<Plan*>(plan)); }

void dynaconv_plan_release(void* handle, void* context) {
  Plan& plan = *static_cast<Plan*>(handle);
  std::unique_ptr<Arena> owned(static_cast<Arena*>(context));
  const std::lock_guard<std::mutex> lock(plan.mutex);
  plan.free_arenas.push_back(owned.get());
  plan.held_bytes += bytes_of(*owned);
  owned.release();
}

void* dynaconv_plan_value(void* handle, void* context, int32_t value) {
  const Plan& plan = *static_cast<Plan*>(handle);
  const Arena& own = *static_cast<Arena*>(context);
  if (value < 0 || value >= plan.data.value_count || plan.values[value].external >= 0) return nullptr;
  const Value& v = plan.values[value];
  return own.values.data() + v.offset * own.batch.images + v.first * element_bytes(v.dtype);
}

int32_t dynaconv_plan_abi() { return kPlanAbi; }

int64_t dynaconv_plan_memory(void* handle) {
  Plan& plan = *static_cast<Plan*>(handle);
  const std::lock_guard<std::mutex> lock(plan.mutex);
  return plan.held_bytes;
}

void dynaconv_plan_limits(void* handle, int64_t batch, int64_t window, int32_t steps) {
  static_cast<Plan*>(handle)->limits = {std::max<int64_t>(0, batch), std::max<int64_t>(1, window), std::max(1, steps)};
}

int dynaconv_plan_run(void* handle, void* context, const Call* call, char* error, int64_t error_size) try {
  const Plan& plan = *static_cast<Plan*>(handle);
  Arena& arena = *static_cast<Arena*>(context);
  const std::string reason = check_call(plan, arena, *call);
  if (!reason.empty()) {
    say(error, error_size, reason);
    return 1;
  }
  const int threads = call->threads;
  const int64_t scratch = scratch_bytes(plan), zeros = (widest(plan) * 4 + 63) / 64 * 64;
  int64_t common = shared_bytes(plan, call->images, threads);
  for (const Stage& stage : arena.stages)
    for (const int64_t images : {stage.images, call->images % stage.images}) common = std::max(common, shared_bytes(plan, images, threads));
  Barrier barrier(threads);
  std::atomic<int32_t> spoilt{-1};
  const int64_t own_images = most_own_images(arena, call->images, threads), own_window = pages(plan.data.arena_bytes * own_images);
  int64_t own_shared = 0;
  for (int64_t images = 1; images <= own_images; ++images) own_shared = std::max(own_shared, pages(shared_bytes(plan, images, 1)));
  common = std::max(common, own_shared * threads);
  if (!arena.window.reserve(own_window * threads)) {
    say(error, error_size, "out of memory");
    return 1;
  }
  std::vector<Run> runs = Runs(plan, arena, *call, barrier, spoilt).all();
  if (!arena.scratch.reserve(scratch * threads + zeros + common) || !count_from_zero(runs, arena.counters, threads)) {
    say(error, error_size, "out of memory");
    return 1;
  }
  char* const blocks = arena.scratch.data();
  float* const zero = reinterpret_cast<float*>(blocks + scratch * threads);
  char* const shared = blocks + scratch * threads + zeros;
  std::memset(zero, 0, zeros);
  if (call->step_ns) std::fill(call->step_ns + call->first, call->step_ns + call->last, 0.0);
  bool done = false;
  const auto thread = [&](int id, int of) {
    return Thread{id, of, blocks + scratch * id, shared, shared + own_shared * id, arena.window.data() + own_window * id, zero};
  };
#ifdef _OPENMP
  if (threads > 1) {
    int granted = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      granted = omp_get_num_threads();
      if (granted == threads) work(runs, thread(omp_get_thread_num(), threads));
    }
    done = granted == threads;
  }
#endif
  // Inside another parallel region OpenMP may give one thread only.
  if (!done) work(runs, thread(0, 1));
  count_open(runs, arena, *call);
  if (spoilt < 0) return 0;
  say(error, error_size, std::to_string(spoilt));
  return 3;
} catch (const std::bad_alloc&) {
  say(error, error_size, "out of memory");
  return 1;
}

int dynaconv_plan_forward(void* plan, const Call* call, char* error, int64_t error_size) {
  void* const context = dynaconv_plan_acquire(plan, call->images);
  if (!context) return 2;
  const int failed = dynaconv_plan_run(plan, context, call, error, error_size);
  dynaconv_plan_release(plan, context);
  return failed;
}

}  // extern "C"
