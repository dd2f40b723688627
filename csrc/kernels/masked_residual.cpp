// Masked residual block and mask logits on rows (pixels) of channels-last float32 activations.
//
// An indirect GEMM: every active output pixel is a row, every kernel tap a pointer to C_in contiguous floats; a tap
// outside the image, or one that the previous convolution did not compute, points at zeros. No im2col, no gather
// buffer. Knows nothing of torch: raw pointers in, raw pointers out. Source: arXiv 1912.03203, section 3.3.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "activations.h"
#include "api.h"
#include "gemm.h"
#include "isa.h"
#include "tile.h"

namespace {

// The mask of one grid over the whole batch, its active positions, and where each lies among them (-1: inactive).
struct MaskGrid {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> need;
  std::vector<int64_t> rows;
  std::vector<int32_t> place;
};

int64_t positions(const MaskGrid& grid, int64_t n) { return n * grid.height * grid.width; }

void list_rows(MaskGrid& grid) {
  const int64_t count = static_cast<int64_t>(grid.need.size());
  grid.place.assign(count, -1);
  grid.rows.clear();
  for (int64_t p = 0; p < count; ++p) {
    if (grid.need[p]) {
      grid.place[p] = static_cast<int32_t>(grid.rows.size());
      grid.rows.push_back(p);
    }
  }
}

// Mark every input position that an active output reads.
void mark_needed(const MaskGrid& out, const BranchConv& conv, int64_t n, MaskGrid& in) {
  in.need.assign(n * in.height * in.width, 0);
  for (const int64_t p : out.rows) {
    const int64_t image = p / (out.height * out.width), rest = p % (out.height * out.width);
    const int64_t y0 = rest / out.width * conv.stride[0] - conv.padding[0];
    const int64_t x0 = rest % out.width * conv.stride[1] - conv.padding[1];
    for (int i = 0; i < conv.kernel[0]; ++i) {
      const int64_t y = y0 + int64_t{i} * conv.dilation[0];
      if (y < 0 || y >= in.height) continue;
      for (int j = 0; j < conv.kernel[1]; ++j) {
        const int64_t x = x0 + int64_t{j} * conv.dilation[1];
        if (x >= 0 && x < in.width) in.need[(image * in.height + y) * in.width + x] = 1;
      }
    }
  }
}

// Where an active output is, and pointers to its taps: taps[t * pitch].
void point_at_taps(const MaskGrid& out, const MaskGrid& in, const int32_t* place, const BranchConv& conv, const float* source,
                   const float* zeros, int64_t p, int pitch, const void** taps) {
  const int64_t image = p / (out.height * out.width), rest = p % (out.height * out.width);
  const int64_t y0 = rest / out.width * conv.stride[0] - conv.padding[0];
  const int64_t x0 = rest % out.width * conv.stride[1] - conv.padding[1];
  for (int i = 0; i < conv.kernel[0]; ++i) {
    const int64_t y = y0 + int64_t{i} * conv.dilation[0];
    for (int j = 0; j < conv.kernel[1]; ++j, taps += pitch) {
      const int64_t x = x0 + int64_t{j} * conv.dilation[1];
      const float* row = zeros;
      if (y >= 0 && y < in.height && x >= 0 && x < in.width) {
        const int64_t q = (image * in.height + y) * in.width + x;
        const int64_t at = place ? place[q] : q;
        if (at >= 0) row = source + at * conv.in_channels;
      }
      *taps = row;
    }
  }
}

int threads_for(double macs) {
#ifdef _OPENMP
  // Waking a second thread costs some microseconds; half a million multiply-adds take about ten.
  return macs < 5e5 ? 1 : omp_get_max_threads();
#else
  (void)macs;
  return 1;
#endif
}

// What a convolution writes: the active rows of a full grid, or (compact) one after the other. `shortcut` is added before
// the final activation.
struct Output {
  float* base;
  const float* shortcut;
  int final_activation;
  bool compact;
};

// One convolution on the active rows of `out`: blocks of tiles share a panel of weights while it is in cache.
void run_conv(const MaskGrid& out, const MaskGrid& in, const int32_t* place, const BranchConv& conv, const float* source,
              const float* zeros, const Output& to) {
  constexpr int64_t kBlockTiles = 16;
  const int64_t count = static_cast<int64_t>(out.rows.size());
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const int64_t inputs = conv.in_channels / conv.groups, outputs = conv.out_channels / conv.groups;
  const int64_t depth = taps_count * inputs, per_group = (outputs + kPanel - 1) / kPanel;
  const int64_t panels = per_group * conv.groups, block_rows = kBlockTiles * kMaxRows;
  const int64_t blocks = (count + block_rows - 1) / block_rows;
  const int threads = threads_for(double(count) * depth * conv.out_channels);
  // Few rows: share out panels too, so that every thread has work.
  int64_t parts = threads == 1 ? 1 : (4 * threads + blocks - 1) / blocks;
  if (parts > panels) parts = panels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<const void*> taps(size_t(block_rows) * taps_count), adds(block_rows);
    std::vector<void*> outs(block_rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * parts; ++task) {
      const int64_t block = task / parts, part = task % parts;
      const int64_t first = count * block / blocks, rows = count * (block + 1) / blocks - first;
      const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t tile = r / kMaxRows, p = out.rows[first + r], at = to.compact ? first + r : p;
        point_at_taps(out, in, place, conv, source, zeros, p, kMaxRows,
                      taps.data() + tile * kMaxRows * taps_count + r % kMaxRows);
        outs[r] = to.base + at * conv.out_channels;
        adds[r] = to.shortcut + at * conv.out_channels;
      }
      TileCall call{};
      call.taps_count = taps_count;
      call.channels = inputs;
      call.activation = conv.activation;
      call.final_activation = to.final_activation;
      for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const int64_t group = panel / per_group, within = panel % per_group;
        call.tap_offset = group * inputs;
        call.weight = conv.weight + panel * depth * kPanel;
        call.bias = conv.bias + panel * kPanel;
        call.column = group * outputs + within * kPanel;
        call.columns = static_cast<int>(outputs - within * kPanel < kPanel ? outputs - within * kPanel : kPanel);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t left = rows - tile * kMaxRows;
          call.taps = taps.data() + tile * kMaxRows * taps_count;
          call.out = outs.data() + tile * kMaxRows;
          call.residual = to.shortcut ? adds.data() + tile * kMaxRows : nullptr;
          gemm_tile(kFloat32, static_cast<int>(left < kMaxRows ? left : kMaxRows), call.columns)(call);
        }
      }
    }
  }
}

void activate_row(float* values, int64_t count, int activation) {
  if (activation == kNone) return;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) store<float4>(values + i, activate<float4>(load<float4>(values + i), activation));
  for (; i < count; ++i) values[i] = activate_scalar(values[i], activation);
}

void copy_activated(const float* from, float* to, int64_t count, int activation) {
#pragma omp parallel for schedule(static) num_threads(threads_for(double(count)))
  for (int64_t start = 0; start < count; start += 4096) {
    const int64_t length = count - start < 4096 ? count - start : 4096;
    std::memcpy(to + start, from + start, length * sizeof(float));
    activate_row(to + start, length, activation);
  }
}

// The depthwise form of run_conv: bound by memory, one pixel at a time, all channels.
void run_depthwise(const MaskGrid& out, const MaskGrid& in, const int32_t* place, const BranchConv& conv, const float* source,
                   const float* zeros, const Output& to) {
  const int64_t count = static_cast<int64_t>(out.rows.size()), channels = conv.out_channels;
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const DepthwiseFunction pixel = best_depthwise();
#pragma omp parallel num_threads(threads_for(4.0 * count * taps_count * channels))
  {
    std::vector<const void*> taps(size_t(taps_count) * kRows);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      const int64_t p = out.rows[r], at = to.compact ? r : p;
      float* values = to.base + at * channels;
      point_at_taps(out, in, place, conv, source, zeros, p, kRows, taps.data());
      pixel(reinterpret_cast<const float* const*>(taps.data()), taps_count, channels, conv.weight, conv.bias, values);
      activate_row(values, channels, conv.activation);
      if (!to.shortcut) continue;
      for (int64_t c = 0; c < channels; ++c) values[c] += to.shortcut[at * channels + c];
      activate_row(values, channels, to.final_activation);
    }
  }
}

void run_any(const MaskGrid& out, const MaskGrid& in, const int32_t* place, const BranchConv& conv, const float* source,
             const float* zeros, const Output& to) {
  (conv.depthwise() ? run_depthwise : run_conv)(out, in, place, conv, source, zeros, to);
}

void open_positions(const float* mask, int64_t n, MaskGrid& grid) {
  grid.need.resize(positions(grid, n));
  for (size_t p = 0; p < grid.need.size(); ++p) grid.need[p] = mask[p] != 0.0f;
  list_rows(grid);
}

double macs_of(const BranchConv& conv) {
  return double(conv.kernel[0]) * conv.kernel[1] * conv.out_channels * (conv.in_channels / conv.groups);
}

}  // namespace

extern "C" {

int dynaconv_abi() { return 5; }

const char* dynaconv_isa() { return best_isa(); }

int dynaconv_columns() { return kColumns; }

int dynaconv_masked_residual(const float* x, const float* mask, const float* shortcut, float* y, int64_t n,
                             const BranchConv* convs, int count, const int64_t* sizes, int final_activation,
                             double break_even) try {
  std::vector<MaskGrid> grids(count + 1);
  for (int i = 0; i <= count; ++i) {
    grids[i].height = sizes[2 * i];
    grids[i].width = sizes[2 * i + 1];
  }
  open_positions(mask, n, grids[count]);
  const int64_t total = positions(grids[count], n) * convs[count - 1].out_channels;
  if (grids[count].rows.empty()) {
    copy_activated(shortcut, y, total, final_activation);
    return 0;
  }
  double executed = 0, dense = 0;
  int64_t widest = 0;
  for (int i = count - 1; i >= 0; --i) {
    executed += macs_of(convs[i]) * grids[i + 1].rows.size();
    dense += macs_of(convs[i]) * positions(grids[i + 1], n);
    if (convs[i].in_channels > widest) widest = convs[i].in_channels;
    if (i == 0) break;
    mark_needed(grids[i + 1], convs[i], n, grids[i]);
    list_rows(grids[i]);
  }
  if (executed > break_even * dense) return 1;
  const std::vector<float> zeros(widest, 0.0f);
  copy_activated(shortcut, y, total, final_activation);
  std::vector<float> hidden, next;
  const float* source = x;
  for (int i = 0; i < count; ++i) {
    const int32_t* place = i ? grids[i].place.data() : nullptr;
    const bool last = i == count - 1;
    if (!last) next.resize(grids[i + 1].rows.size() * convs[i].out_channels);
    const Output to = last ? Output{y, shortcut, final_activation, false} : Output{next.data(), nullptr, kNone, true};
    run_any(grids[i + 1], grids[i], place, convs[i], source, zeros.data(), to);
    hidden.swap(next);
    source = hidden.data();
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

int dynaconv_masked_conv(const float* x, const float* mask, float* y, int64_t n, const BranchConv* conv,
                         const int64_t* sizes) try {
  MaskGrid in, out;
  in.height = sizes[0];
  in.width = sizes[1];
  out.height = sizes[2];
  out.width = sizes[3];
  open_positions(mask, n, out);
  const std::vector<float> zeros(conv->in_channels, 0.0f);
  std::memset(y, 0, positions(out, n) * conv->out_channels * sizeof(float));
  if (!out.rows.empty()) run_any(out, in, nullptr, *conv, x, zeros.data(), Output{y, nullptr, kNone, false});
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

void dynaconv_mask_logits(const float* x, const float* taps, const float* linear, float bias, int64_t n,
                          int64_t height, int64_t width, int64_t channels, int64_t stride, float* z) {
  const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  const MaskRowFunction row = best_mask_row();
  const MeanFunction mean = best_mean();
  std::vector<float> offsets(n);
#pragma omp parallel num_threads(threads_for(9.0 * n * out_height * out_width * channels))
  {
#pragma omp for schedule(static)
    for (int64_t image = 0; image < n; ++image)
      offsets[image] = bias + mean(x + image * height * width * channels, height * width, channels, linear);
#pragma omp for schedule(static) collapse(2)
    for (int64_t image = 0; image < n; ++image)
      for (int64_t oy = 0; oy < out_height; ++oy)
        row(x + image * height * width * channels, taps, height, width, channels, stride, oy, out_width,
            offsets[image], z + (image * out_height + oy) * out_width);
  }
}

}  // extern "C"
