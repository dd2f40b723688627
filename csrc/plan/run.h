// What a running plan is made of: contexts (arenas), workers (threads) and the functions of the steps.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "../kernels/gemm.h"
#include "plan.h"
#include "stages.h"

constexpr int kPhases = 4;        // parallel loops within one step
constexpr int64_t kSlack = 256;   // bytes past every region that vector reads may touch

// One output position: its row over the whole batch, and where that is.
struct Position {
  int32_t row, image;
  int16_t y, x;
};

// A mask during a run. `need` and the lists live in the context. Lists of all positions or of none are not made: a step that
// has the count needs none.
struct GridState {
  uint8_t* need;
  Position* open;         // null where no step walks it
  Position* closed;       // null unless Grid::closed
  int32_t* image_counts;  // open positions of each image
  int64_t open_count;
  Position* tiles;        // tiles of 2x2 positions with an open one; null unless Grid::tiles
  int32_t* tile_counts;   // of each image
  int64_t tile_count;
};

// Memory that frees itself; large regions ask for huge pages, which saves address translation.
class Region {
 public:
  Region() = default;
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  bool reserve(int64_t bytes);  // keeps what it has when that is enough; contents are lost otherwise
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void release();

  char* data_ = nullptr;
  char* mapped_ = nullptr;  // what the system gave, where data_ is the first huge page of it
  int64_t bytes_ = 0;
};

// Neighbouring images that steps take together: the whole batch, or a window of a stage.
struct Context {
  int64_t first = 0, images = 0;
  std::vector<GridState> grids;
};

// What a forward holds.
struct Arena {
  Context batch;
  Region values, window, masks, scratch, counters;
  std::vector<Stage> stages;
  std::vector<std::vector<Context>> windows;  // of each stage
  std::vector<Stage> own_stages;              // of single threads
  std::deque<Context> own_windows;            // of the run in hand
};

struct Plan {
  PlanData data;
  std::vector<Value> values;
  std::vector<Conv> convs;
  std::vector<Grid> grids;
  std::vector<Step> steps;
  std::vector<bool> walked;         // of each grid: some step walks the list of its open positions
  std::vector<int32_t> partners;    // of each step; see slices.h
  std::vector<Region> gate_panels;  // of each step; empty where it is no gate, or takes another way
  WindowLimits limits;
  std::mutex mutex;
  std::vector<Arena*> free_arenas;
  int64_t held_bytes = 0;
  ~Plan();
};

// All threads meet here between steps. Spins, since steps are short; yields when that takes long.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

inline int64_t element_bytes(int dtype) { return dtype == kBfloat16 ? 2 : 4; }

// Steps [first, last) for some images; `call` has their number.
struct Run {
  const Plan& plan;
  Context& context;
  const Call call;
  Barrier& barrier;
  std::atomic<int32_t>& spoilt;    // the first step whose logits were NaN where it decided; -1: none
  std::atomic<int64_t>* counters;  // [last - first][kPhases][threads]
  const Arena& arena;
  const Stage* stage;              // null: the whole batch
  int32_t first, last;
  bool own;                        // a window that one thread takes alone
  char* window;                    // memory of the values inside of the stage

  const Value& value(int32_t id) const { return plan.values[id]; }
  const Conv& conv(int32_t id) const { return plan.convs[id]; }
  // The first row of these images.
  char* data(int32_t id) const {
    const Value& v = plan.values[id];
    const int64_t pixels = context.first * v.height * v.width, row_bytes = v.stride * element_bytes(v.dtype);
    if (v.external >= 0)
      return static_cast<char*>(call.externals[v.external]) + pixels * (planes(id) ? v.channels * int64_t{sizeof(float)} : row_bytes);
    const int64_t first = v.first * element_bytes(v.dtype);
    if (stage && stage->inside[id]) return window + v.offset * call.images + first;
    return arena.values.data() + v.offset * arena.batch.images + pixels * row_bytes + first;
  }
  bool planes(int32_t id) const {
    const Value& v = plan.values[id];
    return v.external >= 0 && call.external_planes[v.external] != 0;
  }
  // Decisions that replace those of a mask, or null.
  const uint8_t* forced(int32_t grid) const {
    const uint8_t* decisions = call.forced ? call.forced[grid] : nullptr;
    return decisions ? decisions + context.first * plan.grids[grid].height * plan.grids[grid].width : nullptr;
  }
  // The mask of a step whose rows may be worth computing all: null where they are, or where there is no mask.
  const uint8_t* need(int32_t grid, float run_all_above) const {
    if (grid < 0) return nullptr;
    const GridState& state = context.grids[grid];
    const int64_t count = call.images * plan.grids[grid].height * plan.grids[grid].width;
    const bool all = state.open_count == count || double(state.open_count) > double(run_all_above) * count;
    return all ? nullptr : state.need;
  }
  int64_t rows(int32_t id) const {
    const Value& v = plan.values[id];
    return call.images * v.height * v.width;
  }
};

// One thread of a run.
struct Worker {
  Run& run;
  const int id, threads;
  char* const scratch;
  char* const shared;        // one for all threads
  const float* const zeros;  // as long as the widest value, all 0 (of any dtype)
  int step = 0, phase = 0;
  Upcoming upcoming = {};

  // Calls f(task) for every task once. Every thread begins with a share of its own, the same part of the tasks in every step:
  // what it wrote in the step before is in its own cache. Who is done helps the others.
  template <typename F>
  void share(int64_t tasks, F&& f) {
    if (threads == 1) {
      for (int64_t task = 0; task < tasks; ++task) f(task);
      return;
    }
    std::atomic<int64_t>* const next = run.counters + ((step - run.first) * kPhases + phase++) * threads;
    for (int i = 0; i < threads; ++i) {
      const int owner = id + i < threads ? id + i : id + i - threads;
      const int64_t first = tasks * owner / threads, end = tasks * (owner + 1) / threads;
      for (int64_t task; (task = first + next[owner].fetch_add(1, std::memory_order_relaxed)) < end;) f(task);
    }
  }
  // Of tasks alike that are short: every thread takes its share, since asking what others have left would take longer.
  template <typename F>
  void deal(int64_t tasks, F&& f) const {
    for (int64_t task = tasks * id / threads; task < tasks * (id + 1) / threads; ++task) f(task);
  }
  // The same tasks of every thread from its last to its first: of what the step before has written, the end is nearest.
  int64_t backward(int64_t task, int64_t tasks) const {
    int64_t owner = task * threads / tasks;
    while (task >= tasks * (owner + 1) / threads) ++owner;
    return tasks * owner / threads + tasks * (owner + 1) / threads - 1 - task;
  }
  void barrier() {
    if (threads > 1) run.barrier.wait();
  }
};

// A step of so little work that the first thread does it alone, without waiting for anybody: masks of one image.
inline bool is_small(const Run& run, const Step& step) {
  return run.call.images == 1 && (step.kind == kThreshold || step.kind == kDilate);
}
// Whether the first thread does alone what comes last in a step, and may go on to a small step right away: see each_gate_line.
inline bool ends_alone(const Run& run, int32_t index) {
  const Step& step = run.plan.steps[index];
  const bool adds = step.kind == kGate && (step.ints[0] || run.plan.gate_panels[index].data());
  return is_small(run, step) || (adds && run.call.images == 1);
}

using StepFunction = void (*)(Worker&, const Step&);

constexpr int kMostResampled = 64;  // taps of one position
void step_layout(Worker&, const Step&);
void step_conv(Worker&, const Step&);
// A kConv step whose convolution has Winograd weights: all tiles of 2x2 outputs, or the listed ones.
void step_winograd(Worker&, const Step&, const Position* list, int64_t tiles);
void step_stem(Worker&, const Step&);
void step_depthwise(Worker&, const Step&);
void step_inverted(Worker&, const Step&);
void step_pool(Worker&, const Step&);
void step_mean(Worker&, const Step&);
void step_pairwise(Worker&, const Step&);
void step_activate(Worker&, const Step&);
void step_gate(Worker&, const Step&);
void step_threshold(Worker&, const Step&);
void step_dilate(Worker&, const Step&);
void step_mask_value(Worker&, const Step&);
void step_layer_norm(Worker&, const Step&);
void step_softmax(Worker&, const Step&);
void step_copy(Worker&, const Step&);
void step_resample(Worker&, const Step&);
void step_dynamic_conv(Worker&, const Step&);
void step_channel_fusion(Worker&, const Step&);
void step_fusion_factors(Worker&, const Step&);
void step_router(Worker&, const Step&);
StepFunction function_of(int kind);
void step_narrow(Worker&, const Step&);

// Bytes of scratch that a thread needs for a step.
int64_t scratch_conv(const Plan&, const Step&);
int64_t scratch_winograd(const Plan&, const Step&);
int64_t scratch_stem(const Plan&, const Step&);
int64_t scratch_inverted(const Plan&, const Step&);
int64_t shared_inverted(const Plan&, const Step&, int64_t images, int threads);
int64_t scratch_dynamic(const Plan&, const Step&);
int64_t shared_dynamic(const Plan&, const Step&, int64_t images);
int64_t scratch_fusion(const Plan&, const Step&);
int64_t shared_fusion(const Plan&, const Step&, int64_t images, int threads);
int64_t scratch_factors(const Plan&, const Step&);
int64_t scratch_router(const Plan&, const Step&);
int64_t shared_router(const Plan&, const Step&, int64_t images);
int64_t scratch_narrow(const Plan&, const Step&);
int64_t shared_narrow(const Plan&, const Step&, int64_t images, int threads);
// Whether a step of kInverted without projection is cut by its hidden channels, and where its result then lies (slices.h).
bool inverted_by_channels(const Plan&, const Step&, int64_t images, int threads);
bool writes_slices(const Run&, int32_t index, int threads);
// What a thread will read of the routers that follow step `index` closely.
Upcoming upcoming_weights(const Run&, int32_t index, int id, int threads);
int64_t scratch_gate(const Plan&, const Step&);
int64_t scratch_dilate(const Plan&, const Step&);
int64_t shared_gate(const Plan&, const Step&, int64_t images);
// The most of all steps: of a thread, and of what all threads share during a step that takes so many images.
int64_t scratch_bytes(const Plan& plan);
int64_t shared_bytes(const Plan& plan, int64_t images, int threads);
// The weights of a gate once more, as columns of a product or as patches read them, where that is the faster way.
void pack_gate(const Plan&, const Step&, Region& panel);
// Gates that go patch by patch, their weights and their step.
bool takes_patches(const Plan&, const Step&);
void pack_gate_patches(const Plan&, const Step&, Region& panel);
void gate_patches(Worker&, const Step&);

// Why a plan cannot be run, or an empty text. Looks at everything that does not depend on the input.
std::string check_plan(const PlanData& data);
// The part of it that looks at the steps as a sequence; indices are in range.
std::string check_use(const PlanData& data);
