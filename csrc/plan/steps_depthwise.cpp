// Depthwise convolutions, whole output rows or runs of open pixels.

#include "../kernels/depthwise.h"
#include "run.h"

namespace {

template <typename T>
void run_depthwise(Worker& worker, const Step& step) {
  const Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  DepthwiseArgsOf<T> args{};
  args.images = run.call.images;
  args.height = in.height;
  args.width = in.width;
  args.out_height = out.height;
  args.out_width = out.width;
  args.channels = out.channels;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = conv.kernel[i];
    args.stride[i] = conv.stride[i];
    args.padding[i] = conv.padding[i];
    args.dilation[i] = conv.dilation[i];
  }
  args.in = reinterpret_cast<const T*>(run.data(step.in));
  args.in_stride = in.stride;
  args.weight = static_cast<const T*>(conv.weight);
  args.bias = conv.bias;
  args.out = reinterpret_cast<T*>(run.data(step.out));
  args.out_stride = out.stride;
  if (step.in2 >= 0) {
    args.residual = reinterpret_cast<const T*>(run.data(step.in2));
    args.residual_stride = run.value(step.in2).stride;
  }
  args.activation = step.activation[0];
  args.final_activation = step.final_activation;
  args.need = run.need(step.grid, step.run_all_above);
  args.zeros = reinterpret_cast<const T*>(worker.zeros);
  const int64_t chunks = depthwise_chunks(args, worker.threads);
  worker.share(chunks, [&](int64_t chunk) { depthwise_run_chunk(args, chunks, chunk); });
}

}  // namespace

void step_depthwise(Worker& worker, const Step& step) {
  if (worker.run.value(step.in).dtype == kBfloat16) run_depthwise<Bfloat16>(worker, step);
  else run_depthwise<float>(worker, step);
}
