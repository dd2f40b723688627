// Convolutions with a kernel for each sample, mixed from experts panel by panel.

#include "dynamic_task.h"

int64_t scratch_dynamic(const Plan& plan, const Step& step) {
  const PanelShape shape(plan, step);
  int64_t bytes = 0;
  DynamicScratch(nullptr, shape, DynamicTask::sums_floats(shape, plan.values[step.out]), &bytes);
  return bytes + table_bytes(shape.taps);
}

int64_t shared_dynamic(const Plan& plan, const Step& step, int64_t images) {
  return DynamicTask::shared_bytes(plan, step, PanelShape(plan, step), images);
}

void step_dynamic_conv(Worker& worker, const Step& step) {
  const PanelShape shape(worker.run.plan, step);
  const Prepared nothing;
  DynamicTask(worker, step, shape, nothing, worker.shared).run();
}
