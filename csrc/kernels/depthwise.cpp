// Micro-kernels of the depthwise convolution and the walk over output rows.

#include "depthwise.h"

#include <algorithm>
#include <array>
#include <utility>

#include "activations.h"
#include "isa.h"
#include "vectors.h"

namespace {

constexpr int kMostPixels = 8;                      // of a piece
constexpr int kMostLines = 7;                       // kernel rows that pieces serve

// A piece of a run: up to kMostPixels output pixels. With a table the input columns may lie anywhere (a zero row where
// the image ends), without one they lie `pixel` apart.
struct Piece {
  const float* const* lines;  // [line_count], or the table [line_count][columns]
  int64_t first;              // elements from lines[i] to the first column; 0 with a table
  float* out;
};

// Every loaded input is used by all output pixels that it touches; sums and one kernel row of weights stay in registers.
template <typename Vector, int Kernel, int Stride, int Pixels, bool Table>
DYNACONV_INLINE void piece_channels(const DepthwiseRun& run, const Piece& piece, Vector low, Vector high, int64_t c) {
  constexpr int kColumns = (Pixels - 1) * Stride + Kernel;
  const int64_t step = run.weight_stride, pixel = run.pixel;
  Vector sums[Pixels];
  const Vector start = load<Vector>(run.bias + c);
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p) sums[p] = start;
  const float* weight = run.weight + c;
  const float* const* lines = piece.lines;
  for (int line = 0; line < run.line_count; ++line, lines += Table ? kColumns : 1) {
    Vector w[Kernel];
#pragma GCC unroll 8
    for (int k = 0; k < Kernel; ++k, weight += step) w[k] = load<Vector>(weight);
    const float* from = lines[0] + piece.first + c;
#pragma GCC unroll 32
    for (int column = 0; column < kColumns; ++column, from += pixel) {
      hold(from);
      Vector value = load<Vector>(Table ? lines[column] + c : from);
      hold(value);
#pragma GCC unroll 8
      for (int p = 0; p < Pixels; ++p)
        if (column >= p * Stride && column < p * Stride + Kernel) sums[p] += value * w[column - p * Stride];
    }
  }
  float* out = piece.out + c;
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p, out += run.out_pixel) store<Vector>(out, at_most(at_least(sums[p], low), high));
}

// What is left of the channels after the whole vectors, and kernels of other sizes: one pixel at a time.
template <typename Vector>
DYNACONV_INLINE int64_t pixel_channels(const DepthwiseRun& run, const float* const* taps, int taps_count, float* out,
                                       int64_t c) {
  constexpr int kLanes = kLanesOf<Vector>;
  const Bounds bounds = clamp_bounds(is_clamp(run.activation) ? run.activation : kNone);
  const Vector low = broadcast<Vector>(bounds.low), high = broadcast<Vector>(bounds.high);
  for (; c + kLanes <= run.channels; c += kLanes) {
    Vector sum = load<Vector>(run.bias + c);
    const float* weight = run.weight + c;
    for (int t = 0; t < taps_count; ++t, weight += run.weight_stride) sum += load<Vector>(weight) * load<Vector>(taps[t] + c);
    store<Vector>(out + c, at_most(at_least(sum, low), high));
  }
  return c;
}

template <typename Vector>
DYNACONV_INLINE void pixel(const DepthwiseRun& run, const float* const* taps, int taps_count, float* out, int64_t c) {
  c = pixel_channels<Vector>(run, taps, taps_count, out, c);
  if constexpr (kLanesOf<Vector> > 8) c = pixel_channels<float8>(run, taps, taps_count, out, c);
  if constexpr (kLanesOf<Vector> > 4) c = pixel_channels<float4>(run, taps, taps_count, out, c);
  if (c == run.channels) return;
  // The last one to three channels travel in a vector of their own.
  const int64_t rest = run.channels - c;
  const auto some = [rest](const float* from) {
    float4 value = {};
    for (int64_t i = 0; i < rest; ++i) value[i] = from[i];
    return value;
  };
  float4 sum = some(run.bias + c);
  for (int t = 0; t < taps_count; ++t) sum += some(run.weight + t * run.weight_stride + c) * some(taps[t] + c);
  const Bounds bounds = clamp_bounds(is_clamp(run.activation) ? run.activation : kNone);
  sum = at_most(at_least(sum, broadcast<float4>(bounds.low)), broadcast<float4>(bounds.high));
  for (int64_t i = 0; i < rest; ++i) out[c + i] = sum[i];
}

using PieceFunction = void (*)(const DepthwiseRun&, const Piece&);
using PixelFunction = void (*)(const DepthwiseRun&, const float* const*, int, float*, int64_t);
using FinishFunction = void (*)(const float*, float*, int64_t, const float*, int, int);

// The channels from `c` on, which fill no whole vector.
void rest_channels(const DepthwiseRun& run, const Piece& piece, PixelFunction function, int kernel, int stride, int pixels,
                   bool table, int64_t c) {
  const float* taps[kMostLines * kMostLines];
  const int columns = (pixels - 1) * stride + kernel;
  for (int p = 0; p < pixels; ++p) {
    for (int line = 0; line < run.line_count; ++line)
      for (int k = 0; k < kernel; ++k)
        taps[line * kernel + k] = table ? piece.lines[line * columns + p * stride + k]
                                        : piece.lines[line] + piece.first + (p * stride + k) * run.pixel;
    function(run, taps, run.line_count * kernel, piece.out + p * run.out_pixel, c);
  }
}

template <typename Vector, int Kernel, int Stride, int Pixels, bool Table, PixelFunction Rest>
DYNACONV_INLINE void whole_piece(const DepthwiseRun& shared, const Piece& given) {
  // Copies of its own, since a store could otherwise change any of these numbers.
  const DepthwiseRun run = shared;
  const Piece piece = given;
  const Bounds bounds = clamp_bounds(is_clamp(run.activation) ? run.activation : kNone);
  const Vector low = broadcast<Vector>(bounds.low), high = broadcast<Vector>(bounds.high);
  int64_t c = 0;
  for (; c + kLanesOf<Vector> <= run.channels; c += kLanesOf<Vector>)
    piece_channels<Vector, Kernel, Stride, Pixels, Table>(run, piece, low, high, c);
  if (c < run.channels) rest_channels(shared, given, Rest, Kernel, Stride, Pixels, Table, c);
}

// Everything after a bounded activation: other activations, then the residual and the last activation.
template <typename Vector>
DYNACONV_INLINE void finish_row(const float* from, float* out, int64_t channels, const float* residual, int activation,
                                int final_activation) {
  constexpr int kLanes = kLanesOf<Vector>;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector value = activate<Vector>(load<Vector>(from + c), activation);
    if (residual) value += load<Vector>(residual + c);
    store<Vector>(out + c, activate<Vector>(value, final_activation));
  }
  for (; c < channels; ++c) {
    const float value = activate_scalar(from[c], activation) + (residual ? residual[c] : 0.0f);
    out[c] = activate_scalar(value, final_activation);
  }
}

using PieceTable = std::array<PieceFunction, kMostPixels>;

struct Kernels {
  PieceTable pieces[3][2][2];  // kernel 3, 5, 7; stride 1, 2; columns apart by `pixel`, or from a table
  PixelFunction pixel;
  FinishFunction finish;
};

#define DYNACONV_DEPTHWISE(NAME, TARGET, VECTOR)                                                                     \
  TARGET void pixel_##NAME(const DepthwiseRun& run, const float* const* taps, int taps_count, float* out, int64_t c) { \
    pixel<VECTOR>(run, taps, taps_count, out, c);                                                                    \
  }                                                                                                                  \
  template <int Kernel, int Stride, bool Table, int Pixels>                                                          \
  TARGET void piece_##NAME(const DepthwiseRun& run, const Piece& piece) {                                            \
    whole_piece<VECTOR, Kernel, Stride, Pixels, Table, pixel_##NAME>(run, piece);                                    \
  }                                                                                                                  \
  TARGET void finish_##NAME(const float* from, float* out, int64_t channels, const float* residual, int activation,  \
                            int final_activation) {                                                                  \
    finish_row<VECTOR>(from, out, channels, residual, activation, final_activation);                                 \
  }                                                                                                                  \
  template <int Kernel, int Stride, bool Table, int... Pixels>                                                       \
  constexpr PieceTable pieces_##NAME(std::integer_sequence<int, Pixels...>) {                                        \
    return {piece_##NAME<Kernel, Stride, Table, Pixels + 1>...};                                                     \
  }                                                                                                                  \
  template <int Kernel, int Stride, bool Table>                                                                      \
  constexpr PieceTable kPieces_##NAME =                                                                              \
      pieces_##NAME<Kernel, Stride, Table>(std::make_integer_sequence<int, kMostPixels>());                          \
  constexpr Kernels kKernels_##NAME = {                                                                              \
      {{{kPieces_##NAME<3, 1, false>, kPieces_##NAME<3, 1, true>},                                                   \
        {kPieces_##NAME<3, 2, false>, kPieces_##NAME<3, 2, true>}},                                                  \
       {{kPieces_##NAME<5, 1, false>, kPieces_##NAME<5, 1, true>},                                                   \
        {kPieces_##NAME<5, 2, false>, kPieces_##NAME<5, 2, true>}},                                                  \
       {{kPieces_##NAME<7, 1, false>, kPieces_##NAME<7, 1, true>},                                                   \
        {kPieces_##NAME<7, 2, false>, kPieces_##NAME<7, 2, true>}}},                                                 \
      pixel_##NAME, finish_##NAME};

DYNACONV_DEPTHWISE(plain, , float4)
#ifdef DYNACONV_X86
DYNACONV_DEPTHWISE(avx2, DYNACONV_TARGET_AVX2, float8)
DYNACONV_DEPTHWISE(avx512, DYNACONV_TARGET_AVX512, float16)
#endif

const Kernels& best() {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return kKernels_avx512;
  if (best_isa_level() == Isa::kAvx2) return kKernels_avx2;
#endif
  return kKernels_plain;
}

// The kernels for one size, or null where only the pixel kernel serves.
const PieceTable* pieces_of(int lines, int kernel, int stride, int dilation, bool table) {
  if (lines > kMostLines || (kernel != 3 && kernel != 5 && kernel != 7) || stride > 2 || dilation != 1) return nullptr;
  return &best().pieces[kernel / 2 - 1][stride - 1][table];
}

constexpr int64_t kBlockChannels = 256;  // of a run that waits for its residual on the stack

// Where an output row reads: its kernel rows inside the image.
struct Lines {
  const float* start[kMostTaps];  // column 0 of the input row
  int first, count;

  Lines(const DepthwiseArgs& args, int64_t row) : first(0), count(0) {
    const int64_t image = row / args.out_height;
    const int32_t top = static_cast<int32_t>(row % args.out_height) * args.stride[0] - args.padding[0];
    for (int i = 0; i < args.kernel[0]; ++i) {
      const int32_t y = top + i * args.dilation[0];
      if (y < 0) first = i + 1;
      if (y < 0 || y >= args.height) continue;
      start[count++] = args.in + (image * args.height + y) * args.width * args.in_stride;
    }
  }
};

// Pixels [first, last) of a row; `taps` has room for a table or for the taps of one pixel.
void row_pixels(const DepthwiseArgs& args, const Lines& lines, DepthwiseRun& run, int32_t first, int32_t last, float* out) {
  const int kernel = args.kernel[1], stride = args.stride[1], dilation = args.dilation[1];
  const float* taps[kMostTaps];
  // Tap `column` of kernel row `line`, for the output pixel whose first tap is at input column `x`.
  const auto tap = [&](int line, int32_t x) {
    return x < 0 || x >= args.width ? args.zeros : lines.start[line] + x * args.in_stride;
  };
  const PieceTable* table = pieces_of(args.kernel[0], kernel, stride, dilation, true);
  const PieceTable* plain = pieces_of(args.kernel[0], kernel, stride, dilation, false);
  if (!table) {
    for (int32_t x = first; x < last; ++x, out += run.out_pixel) {
      for (int line = 0; line < lines.count; ++line)
        for (int k = 0; k < kernel; ++k)
          taps[line * kernel + k] = tap(line, x * stride - args.padding[1] + k * dilation);
      best().pixel(run, taps, lines.count * kernel, out, 0);
    }
    return;
  }
  const int32_t pieces = (last - first + kMostPixels - 1) / kMostPixels;
  for (int32_t i = 0; i < pieces; ++i) {
    const int32_t from = first + (last - first) * i / pieces, to = first + (last - first) * (i + 1) / pieces;
    const int32_t left = from * stride - args.padding[1], columns = (to - from - 1) * stride + kernel;
    float* target = out + (from - first) * run.out_pixel;
    if (left >= 0 && left + columns <= args.width) {
      (*plain)[to - from - 1](run, {lines.start, left * run.pixel, target});
      continue;
    }
    for (int line = 0; line < lines.count; ++line)
      for (int column = 0; column < columns; ++column) taps[line * columns + column] = tap(line, left + column);
    (*table)[to - from - 1](run, {taps, 0, target});
  }
}

DepthwiseRun run_of(const DepthwiseArgs& args, const Lines& lines, int64_t weight_stride, int64_t out_pixel) {
  DepthwiseRun run{};
  run.line_count = lines.count;
  run.pixel = args.in_stride;
  run.channels = args.channels;
  run.weight = args.weight + lines.first * args.kernel[1] * weight_stride;
  run.weight_stride = weight_stride;
  run.bias = args.bias;
  run.out_pixel = out_pixel;
  run.activation = args.activation;
  return run;
}

int64_t stride_of_weights(const DepthwiseArgs& args) { return args.weight_stride ? args.weight_stride : args.channels; }

// `out` may be the residual itself, so sums wait in a buffer until they have met it.
void residual_pixels(const DepthwiseArgs& args, int64_t row, int32_t first, int32_t last) {
  float sums[kMostPixels * kBlockChannels];
  for (int64_t c = 0; c < args.channels; c += kBlockChannels) {
    DepthwiseArgs block = args;
    block.channels = std::min(kBlockChannels, args.channels - c);
    block.in += c;
    block.weight += c;
    block.bias += c;
    const Lines lines(block, row);
    DepthwiseRun run = run_of(block, lines, stride_of_weights(args), kBlockChannels);
    for (int32_t x = first; x < last; x += kMostPixels) {
      const int32_t count = std::min(kMostPixels, last - x);
      row_pixels(block, lines, run, x, x + count, sums);
      for (int32_t p = 0; p < count; ++p) {
        const int64_t pixel = row * args.out_width + x + p;
        best().finish(sums + p * kBlockChannels, args.out + pixel * args.out_stride + c, block.channels,
                      args.residual + pixel * args.residual_stride + c, args.activation, args.final_activation);
      }
    }
  }
}

void finish_pixels(float* out, int64_t pixel, int32_t count, int64_t channels, int activation, int final_activation) {
  if (is_clamp(activation) && final_activation == kNone) return;
  for (int32_t p = 0; p < count; ++p, out += pixel) best().finish(out, out, channels, nullptr, activation, final_activation);
}

}  // namespace

void depthwise_run(const DepthwiseRun& run) {
  const PieceTable* plain = pieces_of(run.line_count, run.kernel, run.stride, run.dilation, false);
  if (plain) {
    const int32_t pieces = (run.count + kMostPixels - 1) / kMostPixels;
    for (int32_t i = 0; i < pieces; ++i) {
      const int32_t from = run.count * i / pieces, to = run.count * (i + 1) / pieces;
      (*plain)[to - from - 1](run, {run.lines, from * run.stride * run.pixel, run.out + from * run.out_pixel});
    }
  } else {
    const float* taps[kMostTaps];
    for (int32_t p = 0; p < run.count; ++p) {
      for (int line = 0; line < run.line_count; ++line)
        for (int k = 0; k < run.kernel; ++k)
          taps[line * run.kernel + k] = run.lines[line] + (p * run.stride + k * run.dilation) * run.pixel;
      best().pixel(run, taps, run.line_count * run.kernel, run.out + p * run.out_pixel, 0);
    }
  }
  finish_pixels(run.out, run.out_pixel, run.count, run.channels, run.activation, kNone);
}

void depthwise_pixels(const DepthwiseArgs& args, int64_t row, int32_t first, int32_t last, float* out, int64_t out_pixel) {
  const Lines lines(args, row);
  DepthwiseRun run = run_of(args, lines, stride_of_weights(args), out_pixel);
  row_pixels(args, lines, run, first, last, out);
  finish_pixels(out, out_pixel, last - first, args.channels, args.activation, args.final_activation);
}

void depthwise_rows(const DepthwiseArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* need = args.need ? args.need + row * args.out_width : nullptr;
    int32_t x = next_needed(args, need, 0);
    while (x < args.out_width) {
      const int32_t end = next_other(args, need, x);
      if (args.residual)
        residual_pixels(args, row, x, end);
      else
        depthwise_pixels(args, row, x, end, args.out + (row * args.out_width + x) * args.out_stride, args.out_stride);
      x = next_needed(args, need, end);
    }
  }
}
