// The weights of a channel fusion for each image, as a value that other steps multiply with.

#include "fusion_parts.h"

int64_t scratch_folded(const Plan& plan, const Step& step) {
  const Fusion fusion(plan, step);
  return std::max(fusion.panels(), PanelShape(plan, step).scratch_floats()) * 4;
}

int64_t shared_folded(const Plan& plan, const Step& step, int64_t images) {
  return images * Fusion(plan, step).prepared() * 4 + kSlack;
}

void step_folded_weights(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Fusion fusion(run.plan, step);
  const PanelShape shape(run.plan, step);
  const Prepared prepared = prepare_folded(worker, step, fusion);
  PanelMixer mixer(run, step, shape, prepared, reinterpret_cast<float*>(worker.scratch));
  auto* const out = reinterpret_cast<float*>(run.data(step.out));
  const int64_t panel_floats = (shape.channels + 1) * kPanel;
  worker.share(run.call.images * shape.panels, [&](int64_t task) {
    const int64_t image = task / shape.panels, panel = task % shape.panels;
    float* const to = out + task * panel_floats;
    mixer.bias(panel, image, to);
    for (int64_t first = 0; first < shape.channels; first += shape.chunk)
      mixer.mix(panel, image, 1, first, std::min(shape.chunk, shape.channels - first), {to + (first + 1) * kPanel, 0, 0, false},
                false);
  });
}
