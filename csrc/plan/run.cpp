// Creating, running and destroying plans.

#include "run.h"

#include <algorithm>
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
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "slices.h"
#include "windows.h"
#include "work.h"

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
    case kStem: case kDepthwise: case kInverted: case kMean: case kThreshold: case kDilate: case kMaskValue: case kNarrow: return false;
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
    arena.windows.push_back(windows_of(plan, arena.batch, stage, images));
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

// Whether a step takes a picture as it lies.
bool reads_planes(const Plan& plan, const Step& step) {
  return step.kind == kLayout || step.kind == kStem || (step.kind == kGate && takes_patches(plan, step));
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
      if (call.external_planes[external] && !(id == step.in && reads_planes(plan, step)))
        return "external tensor " + std::to_string(external) + " must be rows, not planes";
    }
  }
  return "";
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
  std::vector<Run> runs = runs_of(plan, arena, *call, barrier, spoilt);
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
