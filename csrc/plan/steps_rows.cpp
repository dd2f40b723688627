// Steps that move or combine rows: layout, pooling, means, sums, products, normalisation, softmax, copies.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels/depthwise.h"
#include "../kernels/rowwise.h"
#include "run.h"

namespace {

constexpr int64_t kChunkBytes = 32 << 10;  // of one task of a step that is bound by memory

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t rows_of_chunk(int64_t row_bytes) { return std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes)); }

// f(first, last) over chunks of `rows` rows.
template <typename F>
void share_rows(Worker& worker, int64_t rows, int64_t row_bytes, F&& f) {
  const int64_t chunk = rows_of_chunk(row_bytes);
  worker.share((rows + chunk - 1) / chunk,
               [&](int64_t task) { f(task * chunk, std::min(rows, (task + 1) * chunk)); });
}

struct Rows {
  char* base;
  int64_t bytes;
  char* operator[](int64_t row) const { return base + row * bytes; }
};

Rows rows_at(const Run& run, int32_t id) {
  const Value& v = run.value(id);
  return {run.data(id), v.stride * element_bytes(v.dtype)};
}

// The rows that a step writes: those that its grid lists, or all.
struct Listed {
  const Position* list = nullptr;
  int64_t count;

  Listed(const Run& run, const Step& step) : count(run.rows(step.out)) {
    if (step.grid < 0) return;
    const GridState& grid = run.context.grids[step.grid];
    const int64_t listed = step.closed ? count - grid.open_count : grid.open_count;
    if (listed < count) list = step.closed ? grid.closed : grid.open;
    count = listed;
  }
  int64_t operator[](int64_t index) const { return list ? list[index].row : index; }
  bool all() const { return !list; }
};

// Rows without anything between them are one long row.
bool is_dense(const Value& v) { return v.stride == v.channels; }

// `count` elements, `take` apart in one row and `put` apart in the other.
template <typename T>
void spread(const char* from, int64_t take, int64_t count, char* to, int64_t put) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) target[i * put] = source[i * take];
}

// Sums over the units of a halting network: rows of weight 0 are neither read nor, where the sum stays in its place, written.
void step_weighted_add(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value& out = run.value(step.out);
  const Rows a = rows_at(run, step.in), b = rows_at(run, step.in2), to = rows_at(run, step.out);
  const auto* weights = reinterpret_cast<const float*>(run.data(step.aux[0]));
  const int64_t apart = run.value(step.aux[0]).stride;
  const RowKernels& kernels = row_kernels(out.dtype);
  const bool stays = a.base == to.base && (step.activation[0] == kNone || step.ints[1]);
  share_rows(worker, run.rows(step.out), to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float weight = weights[row * apart];
      if (weight != 0) kernels.weighted(a[row], b[row], weight, out.channels, step.activation[0], to[row]);
      else if (!stays) kernels.activate(a[row], out.channels, step.activation[0], to[row]);
    }
  });
}

// One number a position, scaled and shifted.
void step_scale(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(out.dtype);
  share_rows(worker, run.rows(step.out), to.bytes, [&](int64_t first, int64_t last) {
    const auto* x = reinterpret_cast<const float*>(from[first]);
    auto* y = reinterpret_cast<float*>(to[first]);
    const int64_t count = last - first;
    for (int64_t i = 0; i < count; ++i) y[i * out.stride] = x[i * in.stride] * step.floats[0] + step.floats[1];
    if (step.activation[0] == kNone) return;
    if (is_dense(out)) return kernels.activate(y, count, step.activation[0], y);
    for (int64_t i = 0; i < count; ++i) kernels.activate(y + i * out.stride, 1, step.activation[0], y + i * out.stride);
  });
}

}  // namespace

void step_layout(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value& out = run.value(step.out);
  const Rows to = rows_at(run, step.out), from = rows_at(run, step.in);
  const int64_t area = int64_t{out.height} * out.width, channels = out.channels;
  const RowKernels& kernels = row_kernels(out.dtype);
  if (run.planes(step.in)) {
    const float* planes = reinterpret_cast<const float*>(from.base);
    const int64_t chunk = std::min<int64_t>(area, 256), chunks = (area + chunk - 1) / chunk;
    worker.share(run.call.images * chunks, [&](int64_t task) {
      const int64_t image = task / chunks, first = task % chunks * chunk;
      kernels.interleave(planes + image * channels * area + first, area, std::min(chunk, area - first), channels,
                         to[image * area + first], out.stride);
    });
    return;
  }
  share_rows(worker, run.rows(step.out), to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels.from_float(reinterpret_cast<const float*>(from[row]), channels, kNone, to[row]);
  });
}

void step_pool(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(in.dtype);
  const bool maximum = step.kind == kMaxPool, padding_counts = step.ints[0] != 0;
  worker.share(run.call.images * out.height, [&](int64_t task) {
    const int64_t image = task / out.height, oy = task % out.height;
    const auto** taps = reinterpret_cast<const void**>(worker.scratch);
    for (int64_t ox = 0; ox < out.width; ++ox) {
      int count = 0, window = 0;
      for (int i = 0; i < conv.kernel[0]; ++i) {
        const int64_t y = oy * conv.stride[0] - conv.padding[0] + int64_t{i} * conv.dilation[0];
        for (int j = 0; j < conv.kernel[1]; ++j) {
          const int64_t x = ox * conv.stride[1] - conv.padding[1] + int64_t{j} * conv.dilation[1];
          // As in PyTorch, a window that ceil_mode lets hang over the padding counts no further.
          window += y < in.height + conv.padding[0] && x < in.width + conv.padding[1];
          if (y < 0 || y >= in.height || x < 0 || x >= in.width) continue;
          taps[count++] = from[(image * in.height + y) * in.width + x];
        }
      }
      char* row = to[(image * out.height + oy) * out.width + ox];
      if (maximum) kernels.max(taps, count, in.channels, row);
      else kernels.average(taps, count, in.channels, 1.0f / static_cast<float>(padding_counts ? window : count), row);
    }
  });
}

void step_mean(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(in.dtype);
  const int64_t area = int64_t{in.height} * in.width, bins = int64_t{out.height} * out.width;
  const GridState* const grid = step.grid >= 0 ? &run.context.grids[step.grid] : nullptr;
  if (area == 1 && !grid && in.dtype == out.dtype) {
    const int64_t bytes = in.channels * element_bytes(in.dtype);
    share_rows(worker, run.call.images * bins, to.bytes, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) std::memcpy(to[row], from[row / bins], bytes);
    });
    return;
  }
  constexpr int64_t kMostChannels = 64;
  // A line of the cache is the least that a task should read of a row.
  const int64_t wide = ceil_of(in.channels, kMostChannels) * bins * run.call.images;
  const int64_t block = wide >= 2 * worker.threads ? kMostChannels : 64 / element_bytes(in.dtype);
  const int64_t blocks = ceil_of(in.channels, block);
  worker.share(run.call.images * bins * blocks, [&](int64_t task) {
    const int64_t image = task / (bins * blocks), bin = task / blocks % bins, first = task % blocks * block;
    const int64_t channels = std::min(block, in.channels - first), skip = first * element_bytes(in.dtype);
    // As in PyTorch's adaptive pooling, bins may share lines.
    const int64_t by = bin / out.width, bx = bin % out.width;
    const auto left = static_cast<int32_t>(bx * in.width / out.width);
    const auto right = static_cast<int32_t>(ceil_of((bx + 1) * in.width, out.width));
    float sums[kMostChannels] = {};
    int64_t count = 0;
    const int64_t top = by * in.height / out.height, bottom = ceil_of((by + 1) * in.height, out.height);
    const uint8_t* need = grid && grid->image_counts[image] < area ? grid->need : nullptr;
    const bool lines = !need && right - left == in.width;
    if (lines) {
      count = (bottom - top) * in.width;
      kernels.sum(from[image * area + top * in.width] + skip, count, in.stride, channels, sums);
    }
    for (int64_t y = top; y < (lines ? top : bottom); ++y) {
      const int64_t line = image * area + y * in.width;
      const uint8_t* open = need ? need + line : nullptr;
      for (int32_t x = next_open(open, left, right); x < right;) {
        const int32_t end = next_closed(open, x, right);
        kernels.sum(from[line + x] + skip, end - x, in.stride, channels, sums);
        count += end - x;
        x = next_open(open, end, right);
      }
    }
    // A bin without open rows has no mean; 0 is what training gives it.
    const float scale = count ? 1.0f / static_cast<float>(count) : 0.0f;
    for (int64_t c = 0; c < channels; ++c) sums[c] *= scale;
    row_kernels(out.dtype).from_float(sums, channels, kNone, to[image * bins + bin] + first * element_bytes(out.dtype));
  });
}

void step_pairwise(Worker& worker, const Step& step) {
  Run& run = worker.run;
  if (step.aux[0] >= 0) return step_weighted_add(worker, step);
  const Value &in = run.value(step.in), &out = run.value(step.out), &second = run.value(step.in2);
  const Rows a = rows_at(run, step.in), b = rows_at(run, step.in2), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(out.dtype);
  const Pairing op = step.kind == kMultiply ? Pairing::kMultiply : step.ints[0] ? Pairing::kSubtract : Pairing::kAdd;
  const bool single = second.channels == 1 && out.channels != 1;
  const int64_t area = int64_t{out.height} * out.width;
  const bool each_image = second.height * second.width == 1 && area != 1;
  const Listed listed(run, step);
  if (listed.all() && is_dense(in) && is_dense(out) && is_dense(second) && !single && (!each_image || out.channels == 1)) {
    const int64_t chunk = rows_of_chunk(to.bytes), chunks = ceil_of(area, chunk);
    worker.share(run.call.images * chunks, [&](int64_t task) {
      const int64_t image = task / chunks, first = task % chunks * chunk, row = image * area + first;
      kernels.pair(op, a[row], b[each_image ? image : row], each_image, std::min(chunk, area - first) * out.channels,
                   step.activation[0], to[row]);
    });
    return;
  }
  share_rows(worker, listed.count, to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t row = listed[index];
      kernels.pair(op, a[row], b[each_image ? row / area : row], single, out.channels, step.activation[0], to[row]);
    }
  });
}

void step_activate(Worker& worker, const Step& step) {
  if (step.ints[0] == 1) return step_scale(worker, step);
  Run& run = worker.run;
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels &reads = row_kernels(in.dtype), &writes = row_kernels(out.dtype);
  const float* const slopes = step.ints[0] ? run.conv(step.conv[0]).bias : nullptr;
  const Listed listed(run, step);
  share_rows(worker, listed.count, to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t row = listed[index];
      if (slopes) reads.leaky(from[row], slopes, out.channels, to[row]);
      else if (in.dtype == out.dtype) reads.activate(from[row], out.channels, step.activation[0], to[row]);
      else if (in.dtype == kFloat32)
        writes.from_float(reinterpret_cast<const float*>(from[row]), out.channels, step.activation[0], to[row]);
      else reads.to_float(from[row], out.channels, step.activation[0], reinterpret_cast<float*>(to[row]));
    }
  });
}

void step_layer_norm(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value& out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(out.dtype);
  const Listed listed(run, step);
  share_rows(worker, listed.count, to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t row = listed[index];
      kernels.normalize(from[row], out.channels, static_cast<const float*>(conv.weight), conv.bias, step.floats[0], to[row]);
    }
  });
}

void step_softmax(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value& out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const int64_t group = step.ints[0];
  worker.share(run.rows(step.out), [&](int64_t row) {
    const float* x = reinterpret_cast<const float*>(from[row]);
    float* y = reinterpret_cast<float*>(to[row]);
    for (int64_t start = 0; start < out.channels; start += group) {
      float most = x[start], sum = 0;
      for (int64_t i = 1; i < group; ++i) most = std::max(most, x[start + i]);
      for (int64_t i = 0; i < group; ++i) sum += y[start + i] = std::exp((x[start + i] - most) * step.floats[0]);
      for (int64_t i = 0; i < group; ++i) y[start + i] /= sum;
    }
  });
}

void step_resample(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Conv& conv = run.conv(step.conv[0]);
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const RowKernels& kernels = row_kernels(out.dtype);
  const int64_t bytes = out.channels * element_bytes(out.dtype), down = conv.kernel[0], across = conv.kernel[1];
  const int32_t lines = std::max(step.ints[0], 1), columns = std::max(step.ints[1], 1);
  const float* const table = static_cast<const float*>(conv.weight);
  const float* const beside = table + 2 * out.height * down;
  worker.share(run.call.images * out.height, [&](int64_t task) {
    const int64_t image = task / out.height, y = task % out.height;
    const float* const above = table + 2 * y * down;
    const int64_t line = (y + step.ints[2]) % lines * columns;
    const void* taps[kMostResampled];
    float factors[kMostResampled];
    for (int64_t x = 0; x < out.width; ++x) {
      const int64_t part = (line + (x + step.ints[3]) % columns) * bytes;
      int count = 0;
      for (int64_t i = 0; i < down; ++i)
        for (int64_t j = x * across; j < (x + 1) * across; ++j) {
          const auto row = static_cast<int64_t>(above[2 * i]), column = static_cast<int64_t>(beside[2 * j]);
          factors[count] = above[2 * i + 1] * beside[2 * j + 1];
          if (row < 0 || column < 0 || factors[count] == 0) continue;
          taps[count++] = from[(image * in.height + row) * in.width + column] + part;
        }
      char* const target = to[task * out.width + x];
      if (count == 0) std::memset(target, 0, bytes);
      else if (count == 1 && factors[0] == 1) std::memcpy(target, taps[0], bytes);
      else kernels.blend(taps, factors, count, out.channels, target);
    }
  });
}

void step_copy(Worker& worker, const Step& step) {
  Run& run = worker.run;
  const Value &in = run.value(step.in), &out = run.value(step.out);
  const Rows from = rows_at(run, step.in), to = rows_at(run, step.out);
  const int64_t element = element_bytes(in.dtype), put = std::max(step.ints[2], 1), take = std::max(step.ints[3], 1);
  const int64_t count = std::min(ceil_of(in.channels - step.ints[1], take), ceil_of(out.channels - step.ints[0], put));
  share_rows(worker, run.rows(step.out), to.bytes, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      char* const target = to[row] + step.ints[0] * element;
      const char* const source = from[row] + step.ints[1] * element;
      if (put == 1 && take == 1) std::memcpy(target, source, count * element);
      else if (element == 4) spread<uint32_t>(source, take, count, target, put);
      else spread<uint16_t>(source, take, count, target, put);
    }
  });
}
