// What a run has to know of each kind of step: its function, and the memory that it takes.

#include <algorithm>

#include "run.h"

StepFunction function_of(int kind) {
  static constexpr StepFunction kFunctions[kKinds] = {
      step_layout,  step_conv,      step_stem,     step_depthwise, step_inverted,   step_pool,    step_pool,
      step_mean,    step_pairwise,  step_pairwise, step_activate,  step_gate,       step_threshold, step_dilate,
      step_mask_value, step_layer_norm, step_softmax, step_copy,   step_dynamic_conv, step_channel_fusion,
      step_fusion_factors, step_router, step_narrow, step_resample};
  return kFunctions[kind];
}

int64_t scratch_bytes(const Plan& plan) {
  int64_t most = 4096;
  for (const Step& step : plan.steps) {
    int64_t bytes = 0;
    switch (step.kind) {
      case kConv: bytes = std::max(scratch_conv(plan, step), scratch_winograd(plan, step)); break;
      case kStem: bytes = scratch_stem(plan, step); break;
      case kInverted: bytes = scratch_inverted(plan, step); break;
      case kGate: bytes = scratch_gate(plan, step); break;
      case kDilate: bytes = scratch_dilate(plan, step); break;
      case kDynamicConv: bytes = scratch_dynamic(plan, step); break;
      case kChannelFusion: bytes = scratch_fusion(plan, step); break;
      case kFusionFactors: bytes = scratch_factors(plan, step); break;
      case kRouter: bytes = scratch_router(plan, step); break;
      case kNarrow: bytes = scratch_narrow(plan, step); break;
      default: break;
    }
    most = std::max(most, bytes);
  }
  return (most + kSlack + 4095) / 4096 * 4096;
}

int64_t shared_bytes(const Plan& plan, int64_t images, int threads) {
  int64_t most = 0;
  if (images == 0) return 0;
  for (const Step& step : plan.steps) {
    if (step.kind == kInverted) most = std::max(most, shared_inverted(plan, step, images, threads));
    if (step.kind == kGate) most = std::max(most, shared_gate(plan, step, images));
    if (step.kind == kDynamicConv) most = std::max(most, shared_dynamic(plan, step, images));
    if (step.kind == kChannelFusion) most = std::max(most, shared_fusion(plan, step, images, threads));
    if (step.kind == kNarrow) most = std::max(most, shared_narrow(plan, step, images, threads));
    if (step.kind == kRouter) most = std::max(most, shared_router(plan, step, images));
  }
  return most;
}
