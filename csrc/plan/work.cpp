#include "work.h"

#include <chrono>

namespace {

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

}  // namespace

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
