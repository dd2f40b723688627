// Depthwise convolutions, whole output rows or runs of open pixels.

#include <algorithm>

#include "../kernels/depthwise.h"
#include "../kernels/gemm.h"
#include "run.h"

namespace {

constexpr int kFewRows = 8;  // of a map that is cut by channels: its rows are too few to deal out evenly

// Channels of an image in whole panels, so that threads share no line of the cache. The convolutions before and behind it are
// cut in the same way where maps are so small.
bool by_channels(const Run& run, const Value& out, const uint8_t* need, int threads) {
  return threads > 1 && !need && out.dtype == kFloat32 && out.height <= kFewRows && run.call.images < 2 * threads &&
         out.channels >= 2 * kPanel * threads;
}

// The part `task` of as many as there are images times threads.
void run_channels(const DepthwiseArgs& all, int threads, int64_t task) {
  const int64_t image = task / threads, share = task % threads, panels = (all.channels + kPanel - 1) / kPanel;
  const int64_t first = panels * share / threads * kPanel, last = std::min(all.channels, panels * (share + 1) / threads * kPanel);
  DepthwiseArgs own = all;
  own.channels = last - first;
  own.weight_stride = all.channels;
  own.in += first;
  own.weight += first;
  own.bias += first;
  own.out += first;
  if (own.residual) own.residual += first;
  depthwise_rows(own, image * all.out_height, (image + 1) * all.out_height);
}

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
  args.need = run.need(step.grid, step.closed ? 1.0f : step.run_all_above);
  args.closed = step.closed && args.need;
  // Without closed pixels there is nothing to do.
  if (step.closed && !args.need) return;
  args.zeros = reinterpret_cast<const T*>(worker.zeros);
  if constexpr (sizeof(T) == 4) {
    if (by_channels(run, out, args.need, worker.threads))
      return worker.share(args.images * worker.threads, [&](int64_t task) { run_channels(args, worker.threads, task); });
  }
  const int64_t chunks = depthwise_chunks(args, worker.threads);
  worker.share(chunks, [&](int64_t chunk) { depthwise_run_chunk(args, chunks, chunk); });
}

}  // namespace

void step_depthwise(Worker& worker, const Step& step) {
  if (worker.run.value(step.in).dtype == kBfloat16) run_depthwise<Bfloat16>(worker, step);
  else run_depthwise<float>(worker, step);
}
