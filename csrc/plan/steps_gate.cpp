// Mask logits of every position. Source: arXiv 1912.03203, section 3.2.
//
// 3x3 gates at stride 1 or 2 go patch by patch (gate_patches.cpp). Others at stride 1 take one product of all rows with
// the few columns that the taps and the linear layer make, which reads every row once; a position then adds up numbers of its
// neighbours. Else every position takes its dot products.

#include <algorithm>
#include <cstring>

#include "../kernels/bfloat16.h"
#include "../kernels/gemm.h"
#include "../kernels/rowwise.h"
#include "gate_lines.h"
#include "run.h"

namespace {

constexpr int64_t kColumns = 16;   // of a product: taps, and the linear layer behind them
constexpr int64_t kTaskRows = 56;  // of a task

int64_t taps_of(const Conv& conv) { return int64_t{conv.kernel[0]} * conv.kernel[1]; }

// In bfloat16 a weight is the sum of two, kColumns apart, so that logits keep nearly all digits of a float.
int64_t columns_of(int dtype) { return dtype == kBfloat16 ? 2 * kColumns : kColumns; }

// What one position adds up: columns of the products of its neighbours.
struct Taps {
  int32_t count = 0, dx[kColumns];
  int64_t at[kColumns];  // floats from the product of the position's own column of the map

  // `line`: the first product of the image's input line that the first kernel row reads.
  Taps(const Conv& conv, const Value& in, int32_t oy, int64_t columns) {
    for (int32_t i = 0; i < conv.kernel[0]; ++i) {
      const int64_t y = int64_t{oy} - conv.padding[0] + int64_t{i} * conv.dilation[0];
      if (y < 0 || y >= in.height) continue;
      for (int32_t j = 0; j < conv.kernel[1]; ++j) {
        dx[count] = j * conv.dilation[1] - conv.padding[1];
        at[count] = (y * in.width + dx[count]) * columns + i * conv.kernel[1] + j;
        ++count;
      }
    }
  }
};

template <int Count>
float inner_sum(const Taps& taps, const float* products, float sum) {
#pragma GCC unroll 16
  for (int k = 0; k < (Count ? Count : taps.count); ++k) sum += products[taps.at[k]];
  return sum;
}

// One line of logits from the products of its image.
void sum_line(const Taps& taps, const float* products, int32_t width, int32_t in_width, int64_t columns, bool halves, float start,
              float* logits) {
  int32_t low = 0, high = width;  // positions whose taps are all there
  for (int k = 0; k < taps.count; ++k) {
    low = std::max(low, -taps.dx[k]);
    high = std::min(high, in_width - taps.dx[k]);
  }
  for (int32_t x = 0; x < width; ++x) {
    const float* own = products + x * columns;
    if (x >= low && x < high) {
      float sum = taps.count == 9 ? inner_sum<9>(taps, own, start) : inner_sum<0>(taps, own, start);
      if (halves) sum = taps.count == 9 ? inner_sum<9>(taps, own + kColumns, sum) : inner_sum<0>(taps, own + kColumns, sum);
      logits[x] = sum;
      continue;
    }
    float sum = start;
    for (int k = 0; k < taps.count; ++k) {
      if (x + taps.dx[k] < 0 || x + taps.dx[k] >= in_width) continue;
      sum += own[taps.at[k]] + (halves ? own[taps.at[k] + kColumns] : 0.0f);
    }
    logits[x] = sum;
  }
}

// Products of the rows [first, last) with a packed panel.
void multiply_rows(const Value& in, const char* base, const void* panel, const float* bias, int64_t columns, int64_t first,
                   int64_t last, float* products) {
  const int64_t row_bytes = in.stride * element_bytes(in.dtype), tiles = (last - first + kMaxRows - 1) / kMaxRows;
  const void* from[kMaxRows];
  void* to[kMaxRows];
  TileCall call{};
  call.taps = from;
  call.out = to;
  call.taps_count = 1;
  call.channels = in.channels;
  call.weight = panel;
  call.bias = bias;
  call.columns = static_cast<int>(columns);
  call.float_out = true;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = first + (last - first) * tile / tiles, end = first + (last - first) * (tile + 1) / tiles;
    for (int64_t r = row; r < end; ++r) {
      from[r - row] = base + r * row_bytes;
      to[r - row] = products + r * columns;
    }
    gemm_tile(in.dtype, static_cast<int>(end - row), call.columns)(call);
  }
}

void gate_products(Worker& worker, const Step& step, const void* panel) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const bool squeeze = step.ints[0] != 0, halves = in.dtype == kBfloat16;
  const int64_t columns = columns_of(in.dtype), taps_count = taps_of(conv);
  const char* base = run.data(step.in);
  float* const products = reinterpret_cast<float*>(worker.shared);
  float* const logits = reinterpret_cast<float*>(run.data(step.out));
  // One sum for each line, added up in order afterwards: the same bits whichever thread took the line.
  float* const line_sums = squeeze ? reinterpret_cast<float*>(run.data(step.aux[0])) : nullptr;
  // Of each tap: what it adds for a position inside of the map, nothing outside.
  float tap_bias[kPanel] = {};
  if (step.ints[1]) std::copy_n(conv.bias + 1, taps_count, tap_bias);
  const int64_t lines = run.call.images * in.height;
  const int64_t share = (lines + worker.threads - 1) / worker.threads;
  const int64_t some = std::max<int64_t>(1, std::min(kTaskRows / in.width, share));
  worker.share((lines + some - 1) / some, [&](int64_t task) {
    const int64_t first = task * some, last = std::min(lines, first + some);
    multiply_rows(in, base, panel, tap_bias, columns, first * in.width, last * in.width, products);
    for (int64_t line = first; squeeze && line < last; ++line) {
      const float* at = products + line * in.width * columns + taps_count;
      float sum = 0;
      for (int32_t x = 0; x < in.width; ++x, at += columns) sum += halves ? at[0] + at[kColumns] : at[0];
      line_sums[line] = sum;
    }
  });
  worker.barrier();
  each_gate_line(worker, conv, in, line_sums, out.height, [&](int64_t line, float start) {
    const Taps taps(conv, in, static_cast<int32_t>(line % out.height), columns);
    sum_line(taps, products + line / out.height * in.height * in.width * columns, out.width, in.width, columns, halves, start,
             logits + line * out.width);
  });
}

// Dot products of every position with the taps that lie inside.
void gate_dots(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const RowKernels& kernels = row_kernels(in.dtype);
  const int64_t row_bytes = in.stride * element_bytes(in.dtype);
  const char* base = run.data(step.in);
  float* logits = reinterpret_cast<float*>(run.data(step.out));
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const bool squeeze = step.ints[0] != 0;
  // With a linear layer the bias comes with the image's share of it.
  const float bias = squeeze ? 0.0f : conv.bias[0];
  // Where every input position is the centre of an output one, the average comes along; else it takes its own walk.
  bool along = squeeze && out.height == in.height && out.width == in.width;
  for (int i = 0; i < 2; ++i)
    along = along && conv.stride[i] == 1 && conv.padding[i] == conv.kernel[i] / 2 * conv.dilation[i];
  const float* weight = static_cast<const float*>(conv.weight);
  const float* linear = weight + int64_t{taps_count} * in.channels;
  const int32_t center = conv.kernel[0] / 2 * conv.kernel[1] + conv.kernel[1] / 2;
  // One sum for each line, added up in order afterwards: the same bits whichever thread took the line.
  float* line_sums = squeeze ? reinterpret_cast<float*>(run.data(step.aux[0])) : nullptr;
  worker.share(run.call.images * out.height, [&](int64_t task) {
    const auto image = static_cast<int32_t>(task / out.height), oy = static_cast<int32_t>(task % out.height);
    const auto** taps = reinterpret_cast<const void**>(worker.scratch);
    float sum = 0;
    for (int32_t ox = 0; ox < out.width; ox += kGatePixels) {
      const int pixels = std::min(kGatePixels, out.width - ox);
      const int32_t x0 = ox * conv.stride[1] - conv.padding[1], reach = (conv.kernel[1] - 1) * conv.dilation[1];
      const bool within = pixels == kGatePixels && x0 >= 0 && x0 + reach + (kGatePixels - 1) * conv.stride[1] < in.width;
      int t = 0;
      for (int i = 0; i < conv.kernel[0]; ++i) {
        const int32_t y = oy * conv.stride[0] - conv.padding[0] + i * conv.dilation[0];
        const bool there = y >= 0 && y < in.height;
        const char* line = base + (int64_t{image} * in.height + (there ? y : 0)) * in.width * row_bytes;
        for (int j = 0; j < conv.kernel[1]; ++j, ++t) {
          for (int p = 0; p < kGatePixels; ++p) {
            const int32_t x = x0 + p * conv.stride[1] + j * conv.dilation[1];
            const bool inside = there && (within || (p < pixels && x >= 0 && x < in.width));
            taps[t * kGatePixels + p] = inside ? line + x * row_bytes : static_cast<const void*>(worker.zeros);
          }
        }
      }
      float sums[kGatePixels];
      sum += kernels.dots(taps, taps_count, in.channels, weight, center, along ? linear : nullptr, pixels, sums);
      for (int p = 0; p < pixels; ++p) logits[task * out.width + ox + p] = sums[p] + bias;
    }
    if (along) line_sums[task] = sum;
  });
  if (!squeeze) return;
  if (!along) {
    worker.share(run.call.images * in.height, [&](int64_t task) {
      const auto** taps = reinterpret_cast<const void**>(worker.scratch);
      float sum = 0;
      for (int32_t x = 0; x < in.width; x += kGatePixels) {
        for (int p = 0; p < kGatePixels; ++p)
          taps[p] = x + p < in.width ? base + (task * in.width + x + p) * row_bytes
                                     : static_cast<const void*>(worker.zeros);
        float sums[kGatePixels];
        kernels.dots(taps, 1, in.channels, linear, 0, nullptr, 0, sums);
        for (int p = 0; p < kGatePixels; ++p) sum += sums[p];
      }
      line_sums[task] = sum;
    });
  }
  worker.barrier();
  each_gate_line(worker, conv, in, line_sums, out.height, [&](int64_t line, float start) {
    for (int32_t x = 0; x < out.width; ++x) logits[line * out.width + x] += start;
  });
}

}  // namespace

void pack_gate(const Plan& plan, const Step& step, Region& panel) {
  if (takes_patches(plan, step)) return pack_gate_patches(plan, step, panel);
  const Conv& conv = plan.convs[step.conv[0]];
  const int64_t taps = taps_of(conv), used = taps + (step.ints[0] != 0), channels = conv.in_channels;
  // One column alone is not worth a product of 16.
  if (conv.stride[0] != 1 || conv.stride[1] != 1 || used == 1 || used > kColumns) return;
  const int dtype = plan.values[step.in].dtype;
  const int64_t bytes = panel_elements(dtype, 1, channels) * element_bytes(dtype);
  if (!panel.reserve(bytes)) throw std::bad_alloc();
  std::memset(panel.data(), 0, bytes);
  const float* weight = static_cast<const float*>(conv.weight);
  for (int64_t t = 0; t < used; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = weight[t * channels + c];
      if (dtype == kFloat32) {
        reinterpret_cast<float*>(panel.data())[c * kPanel + t] = value;
        continue;
      }
      const Bfloat16 high = narrowed(value), low = narrowed(value - widened(high));
      auto* const pair = reinterpret_cast<Bfloat16*>(panel.data()) + c / 2 * 2 * kPanel + c % 2;
      pair[2 * t] = high;
      pair[2 * (t + kColumns)] = low;
    }
  }
}

int64_t scratch_gate(const Plan& plan, const Step& step) {
  const Conv& conv = plan.convs[step.conv[0]];
  return int64_t{conv.kernel[0]} * conv.kernel[1] * kGatePixels * sizeof(void*);
}

int64_t shared_gate(const Plan& plan, const Step& step, int64_t images) {
  if (takes_patches(plan, step)) return 0;
  const Value& in = plan.values[step.in];
  return images * in.height * in.width * columns_of(in.dtype) * int64_t{sizeof(float)};
}

void step_gate(Worker& worker, const Step& step) {
  if (takes_patches(worker.run.plan, step)) return gate_patches(worker, step);
  const char* const panel = worker.run.plan.gate_panels[worker.step].data();
  if (panel) gate_products(worker, step, panel);
  else gate_dots(worker, step);
}
