// Convolution with one kernel for each sample, mixed from experts while it is packed.
//
// For a panel of 32 output channels the experts' weights are mixed into a buffer that stays in the second-level cache, and
// used at once: mixed kernels are never written to memory, and a panel's experts are read from memory once for the whole
// batch. Rows are output pixels of channels-last float32 activations, as in masked_residual.cpp. Knows nothing of torch.
// Source: the mixture is CondConv's, arXiv 1904.04971, equation 1.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "api.h"
#include "tile.h"

namespace {

struct Extent {
  int64_t height, width;
};

int threads_for(double macs) {
#ifdef _OPENMP
  return macs < 5e5 ? 1 : omp_get_max_threads();
#else
  (void)macs;
  return 1;
#endif
}

// Coefficients of one sample for one panel, [K][32].
void take_coefficients(const DynamicConv& conv, const float* coefficients, int64_t sample, int64_t panel, int64_t padded,
                       float* out) {
  for (int k = 0; k < conv.count; ++k) {
    const float* from = conv.per_channel ? coefficients + (sample * conv.count + k) * padded + panel * kColumns
                                         : coefficients + sample * conv.count + k;
    for (int c = 0; c < kColumns; ++c) out[k * kColumns + c] = conv.per_channel ? from[c] : from[0];
  }
}

// Taps of `rows` output pixels from `first` on: taps[t * kRows + r]; missing rows repeat the first.
void point_at_taps(const DynamicConv& conv, const float* image, const float* zeros, Extent in, Extent out, int64_t first,
                   int rows, const float** taps) {
  for (int r = 0; r < kRows; ++r) {
    const int64_t p = first + (r < rows ? r : 0);
    const int64_t y0 = p / out.width * conv.stride[0] - conv.padding[0];
    const int64_t x0 = p % out.width * conv.stride[1] - conv.padding[1];
    int t = 0;
    for (int i = 0; i < conv.kernel[0]; ++i) {
      const int64_t y = y0 + int64_t{i} * conv.dilation[0];
      for (int j = 0; j < conv.kernel[1]; ++j, ++t) {
        const int64_t x = x0 + int64_t{j} * conv.dilation[1];
        const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
        taps[t * kRows + r] = inside ? image + (y * in.width + x) * conv.in_channels : zeros;
      }
    }
  }
}

void write_block(const DynamicConv& conv, const float* block, int64_t positions, int64_t first, int rows, int64_t column,
                 float* image) {
  const int64_t left = conv.out_channels - column, width = left < kColumns ? left : kColumns;
  if (conv.planar) {
    for (int64_t c = 0; c < width; ++c) {
      float* to = image + (column + c) * positions + first;
      for (int r = 0; r < rows; ++r) to[r] = block[r * kColumns + c];
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    float* to = image + (first + r) * conv.out_channels + column;
    for (int64_t c = 0; c < width; ++c) to[c] = block[r * kColumns + c];
  }
}

// A zero-padded copy of one plane, and its width.
int64_t pad_plane(const DynamicConv& conv, const float* plane, Extent in, float* padded) {
  const int64_t pitch = in.width + 2 * conv.padding[1];
  for (int64_t y = 0; y < in.height; ++y)
    std::memcpy(padded + (y + conv.padding[0]) * pitch + conv.padding[1], plane + y * in.width, in.width * sizeof(float));
  return pitch;
}

// Planes of [n, C, H, W], stride 1; weight [n][C][taps].
void run_planes(const DynamicConv& conv, const float* x, float* y, int64_t n, Extent in, Extent out, const float* weight,
                const float* bias, int threads) {
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const int64_t pitch = in.width + 2 * conv.padding[1], height = in.height + 2 * conv.padding[0];
  const PlaneFunction row = best_plane();
  std::vector<int64_t> offsets;
  for (int i = 0; i < conv.kernel[0]; ++i)
    for (int j = 0; j < conv.kernel[1]; ++j) offsets.push_back(i * conv.dilation[0] * pitch + j * conv.dilation[1]);
  const int64_t count = (out.height - 1) * pitch + out.width;
  // 16 values beyond the end are read by the last vector and never used.
  std::vector<float> buffers(size_t(threads) * (pitch * height + 16), 0.0f), results(size_t(threads) * (count + 16));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t plane = 0; plane < n * conv.in_channels; ++plane) {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    float* padded = buffers.data() + thread * (pitch * height + 16);
    float* result = results.data() + thread * (count + 16);
    pad_plane(conv, x + plane * in.height * in.width, in, padded);
    row(padded, offsets.data(), weight + plane * taps_count, taps_count, bias[plane], count, result);
    for (int64_t oy = 0; oy < out.height; ++oy)
      std::memcpy(y + (plane * out.height + oy) * out.width, result + oy * pitch, out.width * sizeof(float));
  }
}

// Pixels of [n, H, W, C], any stride; weight [n][taps][C].
void run_pixels(const DynamicConv& conv, const float* x, float* y, int64_t n, Extent in, Extent out, const float* weight,
                const float* bias, int threads) {
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const int64_t channels = conv.in_channels, positions = out.height * out.width, tiles = (positions + kRows - 1) / kRows;
  const DepthwiseFunction pixel = best_depthwise();
  const std::vector<float> zeros(channels, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<const float*> taps(size_t(taps_count) * kRows);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n * tiles; ++task) {
      const int64_t sample = task / tiles, first = task % tiles * kRows;
      const int rows = static_cast<int>(positions - first < kRows ? positions - first : kRows);
      point_at_taps(conv, x + sample * in.height * in.width * channels, zeros.data(), in, out, first, rows, taps.data());
      for (int r = 0; r < rows; ++r)
        pixel(taps.data() + r, taps_count, channels, weight + sample * taps_count * channels, bias + sample * channels,
              y + (sample * positions + first + r) * channels);
    }
  }
}

}  // namespace

extern "C" {

int dynaconv_sample_depthwise(const float* x, float* y, int64_t n, int64_t height, int64_t width, int64_t out_height,
                              int64_t out_width, const DynamicConv* conv, const float* weight, const float* bias) try {
  const Extent in{height, width}, out{out_height, out_width};
  const int threads =
      threads_for(4.0 * n * out_height * out_width * conv->kernel[0] * conv->kernel[1] * conv->in_channels);
  const auto run = conv->planar ? run_planes : run_pixels;
  run(*conv, x, y, n, in, out, weight, bias, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

int dynaconv_dynamic_conv(const float* x, float* y, int64_t n, int64_t height, int64_t width, int64_t out_height,
                          int64_t out_width, const DynamicConv* description, const float* coefficients,
                          const float* tap_scale, const float* bias) try {
  const DynamicConv& conv = *description;
  const Extent in{height, width}, out{out_height, out_width};
  const int taps_count = conv.kernel[0] * conv.kernel[1];
  const int64_t depth = int64_t{taps_count} * conv.in_channels, positions = out_height * out_width;
  const int64_t panels = (conv.out_channels + kColumns - 1) / kColumns, padded = panels * kColumns;
  const int64_t tiles = (positions + kRows - 1) / kRows;
  const int threads = threads_for(double(n) * positions * depth * conv.out_channels);
  // Few panels and samples: share out rows too, so that every thread has work; each part mixes for itself.
  int64_t parts = panels * n >= 2 * threads ? 1 : (2 * threads + panels * n - 1) / (panels * n);
  if (parts > tiles) parts = tiles;
  const std::vector<float> zeros(conv.in_channels, 0.0f);
  const std::vector<float> ones(taps_count, 1.0f);
  const TileFunction tile = best_tile();
  const MixFunction mix = best_mix();
  std::vector<float> buffers(size_t(threads) * depth * kColumns);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    float* mixed = buffers.data() + size_t(omp_get_thread_num()) * depth * kColumns;
#else
    float* mixed = buffers.data();
#endif
    std::vector<const float*> taps(size_t(taps_count) * kRows);
    std::vector<float> shares(size_t(conv.count) * kColumns);
    float block[kRows * kColumns];
    // Panel by panel, so that a thread meets the same experts again for the next sample.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * n * parts; ++task) {
      const int64_t panel = task / (n * parts), sample = task / parts % n, part = task % parts;
      take_coefficients(conv, coefficients, sample, panel, padded, shares.data());
      mix(conv.experts + panel * depth * conv.count * kColumns, conv.count, shares.data(),
          tap_scale ? tap_scale + sample * taps_count : ones.data(), taps_count, conv.in_channels, mixed);
      const float* image = x + sample * height * width * conv.in_channels;
      float* result = y + sample * positions * conv.out_channels;
      for (int64_t index = tiles * part / parts; index < tiles * (part + 1) / parts; ++index) {
        const int64_t first = index * kRows;
        const int rows = static_cast<int>(positions - first < kRows ? positions - first : kRows);
        point_at_taps(conv, image, zeros.data(), in, out, first, rows, taps.data());
        tile(taps.data(), taps_count, conv.in_channels, mixed, bias + sample * padded + panel * kColumns, block);
        write_block(conv, block, positions, first, rows, panel * kColumns, result);
      }
    }
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

}  // extern "C"
