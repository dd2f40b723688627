// Fused inverted residuals.

#include "../kernels/inverted_residual.h"
#include "run.h"

namespace {

// Stands for what only a run knows, where it is asked how much memory a step takes.
float kSomeMeans[1];

// All that does not depend on a run.
template <typename T>
InvertedArgsOf<T> fixed(const Plan& plan, const Step& step) {
  const Value &in = plan.values[step.in], &out = plan.values[step.out];
  const Conv& depthwise = plan.convs[step.conv[1]];
  InvertedArgsOf<T> args{};
  args.height = in.height;
  args.width = in.width;
  args.out_height = out.height;
  args.out_width = out.width;
  args.channels = in.channels;
  args.hidden = depthwise.out_channels;
  args.out_channels = out.channels;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = depthwise.kernel[i];
    args.stride[i] = depthwise.stride[i];
    args.padding[i] = depthwise.padding[i];
    args.dilation[i] = depthwise.dilation[i];
  }
  if (step.conv[0] >= 0) {
    args.expand_weight = static_cast<const T*>(plan.convs[step.conv[0]].weight);
    args.expand_bias = plan.convs[step.conv[0]].bias;
  }
  args.depthwise_weight = static_cast<const T*>(depthwise.weight);
  args.depthwise_bias = depthwise.bias;
  if (step.ints[0]) {
    const Conv& add = plan.convs[step.conv[2]];
    args.fusion = {add.in_channels, step.ints[0] == 1, static_cast<const float*>(add.weight), add.bias, nullptr, plan.values[step.aux[0]].stride};
  } else if (step.conv[2] >= 0) {
    args.project_weight = static_cast<const T*>(plan.convs[step.conv[2]].weight);
    args.project_bias = plan.convs[step.conv[2]].bias;
  }
  if (step.aux[1] >= 0) {
    args.means = kSomeMeans;
    args.means_stride = plan.values[step.aux[1]].stride;
  }
  for (int i = 0; i < 3; ++i) args.activation[i] = step.activation[i];
  args.final_activation = step.final_activation;
  args.in_stride = in.stride;
  args.out_stride = out.stride;
  return args;
}

template <typename T>
void run_inverted(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  InvertedArgsOf<T> args = fixed<T>(run.plan, step);
  args.images = run.call.images;
  args.in = reinterpret_cast<const T*>(run.data(step.in));
  args.out = reinterpret_cast<T*>(run.data(step.out));
  if (step.in2 >= 0) {
    args.residual = reinterpret_cast<const T*>(run.data(step.in2));
    args.residual_stride = run.value(step.in2).stride;
  }
  if (step.ints[0]) args.fusion.factors = reinterpret_cast<const float*>(run.data(step.aux[0]));
  if (args.means) args.means = reinterpret_cast<float*>(run.data(step.aux[1]));
  args.need = run.need(step.grid, step.run_all_above);
  args.need_hidden = args.need ? run.need(step.grid2, 2.0f) : nullptr;
  args.fills = step.ints[1] != 0;
  args.closed_activation = step.ints[1] == 2 ? step.final_activation : int32_t{kNone};
  // Rows that are computed though nobody needs them do not count.
  args.counted = args.means && !args.need ? run.need(step.grid, 2.0f) : nullptr;
  args.zeros = reinterpret_cast<const T*>(worker.zeros);
  args.threads = worker.threads;
  args.slices = writes_slices(run, worker.step, worker.threads);
  args.upcoming = &worker.upcoming;
  args.shared = reinterpret_cast<T*>(worker.shared);
  const int phases = inverted_phases(args);
  for (int phase = 0; phase < phases; ++phase) {
    if (phase > 0) worker.barrier();
    worker.share(inverted_chunks(args, phase),
                 [&](int64_t chunk) { inverted_run_chunk(args, phase, chunk, worker.scratch); });
  }
}

template <typename T>
int64_t shared_bytes(const Plan& plan, const Step& step, int64_t images, int threads) {
  InvertedArgsOf<T> args = fixed<T>(plan, step);
  args.images = images;
  args.threads = threads;
  return inverted_shared_bytes(args);
}

bool halves(const Plan& plan, const Step& step) { return plan.values[step.in].dtype == kBfloat16; }

}  // namespace

int64_t scratch_inverted(const Plan& plan, const Step& step) {
  return halves(plan, step) ? inverted_scratch_bytes(fixed<Bfloat16>(plan, step))
                            : inverted_scratch_bytes(fixed<float>(plan, step));
}

int64_t shared_inverted(const Plan& plan, const Step& step, int64_t images, int threads) {
  return halves(plan, step) ? shared_bytes<Bfloat16>(plan, step, images, threads)
                            : shared_bytes<float>(plan, step, images, threads);
}

bool inverted_by_channels(const Plan& plan, const Step& step, int64_t images, int threads) {
  InvertedArgs args = fixed<float>(plan, step);
  args.images = images;
  args.threads = threads;
  return inverted_by_channels(args);
}

void step_inverted(Worker& worker, const Step& step) {
  if (halves(worker.run.plan, step)) run_inverted<Bfloat16>(worker, step);
  else run_inverted<float>(worker, step);
}
