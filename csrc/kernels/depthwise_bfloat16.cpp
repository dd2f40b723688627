// The depthwise convolution in bfloat16: two taps of 32 channels are interleaved and multiplied at once (vdpbf16ps), which
// takes fewer instructions than going through float32. Sums are float32, the pairs of taps those of csrc/plan/plan.h.

#include "isa.h"

#ifdef DYNACONV_X86
#define DYNACONV_INLINE_TARGET DYNACONV_TARGET_AVX512_BF16
#endif

#include "depthwise.h"

#include <utility>

#include "activations.h"
#include "bfloat16.h"

#ifdef DYNACONV_X86

namespace {

constexpr int kBlock = 32;      // channels at a time
constexpr int kMostPixels = 8;  // of a piece

// Interleaving two vectors leaves channel 8 q + 4 half + r of a block in lane 4 q + r of the vector `half`.
struct Orders {
  int32_t split[2][16];    // where the lanes of a half come from
  int32_t joined[2][16];   // where channels 16 i .. come from, in both halves one after the other
  int16_t packed[kBlock];  // likewise for all of them
};
constexpr Orders orders() {
  Orders made{};
  for (int q = 0; q < 4; ++q)
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < 4; ++r) {
        const int channel = 8 * q + 4 * half + r, lane = 16 * half + 4 * q + r;
        made.split[half][4 * q + r] = channel;
        made.joined[channel / 16][channel % 16] = lane;
        made.packed[channel] = static_cast<int16_t>(lane);
      }
  return made;
}
alignas(64) constexpr Orders kOrders = orders();
alignas(64) constexpr Bfloat16 kNothing[kBlock] = {};

// What all pieces of a convolution share.
struct Shared {
  int64_t pixel;  // elements between neighbouring input pixels, without a table
  int64_t channels;
  const Bfloat16* weight;
  const float* bias;
  int64_t out_pixel, residual_pixel;
  int activation, final_activation;
};

// A piece of a run: up to kMostPixels output pixels. With a table every input column has a pointer, without one they lie
// `pixel` apart, and a line outside of the image is null.
struct Piece {
  const Bfloat16* const* lines;  // [lines][columns], or [lines]
  int64_t first;                 // elements from lines[i] to the first column; 0 with a table
  Bfloat16* out;
  const Bfloat16* residual;      // or null
};

DYNACONV_BF16_INLINE word16 load_words(const void* from) {
  word16 value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
template <bool Whole>
DYNACONV_BF16_INLINE word16 load_channels(const Bfloat16* from, __mmask32 lanes) {
  if constexpr (Whole) return load_words(from);
  else return (word16)_mm512_maskz_loadu_epi16(lanes, from);
}

struct Halves {
  word16 low, high;
};
DYNACONV_BF16_INLINE Halves interleave(word16 a, word16 b) {
  Halves both = {(word16)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b), (word16)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b)};
  return both;
}

DYNACONV_BF16_INLINE float16 pick(const float16& a, const float16& b, const int32_t* order) {
  return (float16)_mm512_permutex2var_ps((__m512)a, (__m512i)load_words(order), (__m512)b);
}

// Any activation, residual and number of channels; sums are [pixels][2][16] in the order of interleaved channels.
DYNACONV_TARGET_AVX512_BF16 void finish(const Shared& shared, const Piece& piece, const float* sums, int pixels, int64_t c) {
  for (int p = 0; p < pixels; ++p, sums += kBlock) {
    const float16 low = load<float16>(sums), high = load<float16>(sums + 16);
    for (int i = 0; i < 2 && c + 16 * i < shared.channels; ++i) {
      const int64_t at = c + 16 * i;
      const __mmask16 lanes = first_lanes(shared.channels - at < 16 ? shared.channels - at : 16);
      float16 value = activate<float16>(pick(low, high, kOrders.joined[i]), shared.activation);
      if (piece.residual) value += load(piece.residual + p * shared.residual_pixel + at, lanes);
      store(piece.out + p * shared.out_pixel + at, activate<float16>(value, shared.final_activation), lanes);
    }
  }
}

// Every loaded input is used by all output pixels that it touches; sums and a kernel row of weights stay in registers.
template <int Kernel, int Stride, int Pixels, bool Table, bool Whole>
DYNACONV_BF16_INLINE void piece_channels(const Shared& shared, const Piece& piece, int64_t c) {
  constexpr int kColumns = (Pixels - 1) * Stride + Kernel, kSingles = (Kernel + 1) / 2;
  const __mmask32 lanes = Whole ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (shared.channels - c)) - 1);
  const float* bias = shared.bias + c;
  const float16 starts[2] = {pick(load<float16>(bias), load<float16>(bias + 16), kOrders.split[0]),
                             pick(load<float16>(bias), load<float16>(bias + 16), kOrders.split[1])};
  float16 sums[Pixels][2];
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p) sums[p][0] = starts[0], sums[p][1] = starts[1];
  const Bfloat16* weight = shared.weight + c * 2 * depthwise_pairs(Kernel, Kernel);

  // Where a line starts, and how far its columns lie apart.
  const auto start = [&](int line) __attribute__((always_inline)) {
    return piece.lines[line] ? piece.lines[line] + piece.first + c : kNothing;
  };
  const auto step = [&](int line) __attribute__((always_inline)) { return piece.lines[line] ? shared.pixel : 0; };
  for (int line = 0; line + 1 < Kernel; line += 2) {
    word16 w[Kernel][2];
#pragma GCC unroll 8
    for (int k = 0; k < Kernel; ++k, weight += 2 * kBlock) w[k][0] = load_words(weight), w[k][1] = load_words(weight + kBlock);
    const Bfloat16* const* table = piece.lines + line * kColumns;
    const Bfloat16 *a = Table ? nullptr : start(line), *b = Table ? nullptr : start(line + 1);
    const int64_t a_step = Table ? 0 : step(line), b_step = Table ? 0 : step(line + 1);
#pragma GCC unroll 32
    for (int column = 0; column < kColumns; ++column) {
      if constexpr (Table) a = table[column] + c, b = table[kColumns + column] + c;
      Halves pair = interleave(load_channels<Whole>(a, lanes), load_channels<Whole>(b, lanes));
      hold(pair.low), hold(pair.high);
      if constexpr (!Table) {
        a += a_step, b += b_step;
        hold(a), hold(b);
      }
#pragma GCC unroll 8
      for (int p = 0; p < Pixels; ++p) {
        const int k = column - p * Stride;
        if (k < 0 || k >= Kernel) continue;
        sums[p][0] = dot_pairs(sums[p][0], pair.low, w[k][0]);
        sums[p][1] = dot_pairs(sums[p][1], pair.high, w[k][1]);
      }
    }
  }

  // The last kernel row: neighbouring columns. What lies behind the last column is 0.
  word16 w[kSingles][2];
#pragma GCC unroll 8
  for (int k = 0; k < kSingles; ++k, weight += 2 * kBlock) w[k][0] = load_words(weight), w[k][1] = load_words(weight + kBlock);
  const Bfloat16* const* table = piece.lines + (Kernel - 1) * kColumns;
  const Bfloat16* at = Table ? table[0] + c : start(Kernel - 1);
  const int64_t at_step = Table ? 0 : step(Kernel - 1);
  word16 next = load_channels<Whole>(at, lanes);
#pragma GCC unroll 32
  for (int column = 0; column < kColumns; ++column) {
    const word16 current = next;
    next = word16{};
    if (column + 1 < kColumns) {
      if constexpr (Table) {
        at = table[column + 1] + c;
      } else {
        at += at_step;
        hold(at);
      }
      next = load_channels<Whole>(at, lanes);
      hold(next);
    }
    // Pairs start where some pixel's kernel has an even column.
    if (Stride == 2 && column % 2) continue;
    if (Stride == 1 && Pixels == 1 && column % 2) continue;
    Halves pair = interleave(current, next);
    hold(pair.low), hold(pair.high);
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) {
      const int k = column - p * Stride;
      if (k < 0 || k >= Kernel || k % 2) continue;
      sums[p][0] = dot_pairs(sums[p][0], pair.low, w[k / 2][0]);
      sums[p][1] = dot_pairs(sums[p][1], pair.high, w[k / 2][1]);
    }
  }

  if (!Whole || piece.residual || !is_clamp(shared.activation) || !is_clamp(shared.final_activation)) {
    float block[Pixels * kBlock];
#pragma GCC unroll 8
    for (int p = 0; p < Pixels; ++p) store<float16>(block + p * kBlock, sums[p][0]), store<float16>(block + p * kBlock + 16, sums[p][1]);
    return finish(shared, piece, block, Pixels, c);
  }
  // The bounds of one activation lie within those of the other.
  const Bounds first = clamp_bounds(shared.activation), last = clamp_bounds(shared.final_activation);
  const float16 low = at_least(broadcast<float16>(first.low), broadcast<float16>(last.low));
  const float16 high = at_most(broadcast<float16>(first.high), broadcast<float16>(last.high));
  const word16 order = load_words(kOrders.packed);
  Bfloat16* out = piece.out + c;
#pragma GCC unroll 8
  for (int p = 0; p < Pixels; ++p, out += shared.out_pixel) {
    const float16 lower = at_most(at_least(sums[p][0], low), high), upper = at_most(at_least(sums[p][1], low), high);
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16((__m512i)order, packed));
  }
}

// With a table rows end where their channels do; without one they have whole blocks of channels.
template <int Kernel, int Stride, int Pixels, bool Table>
DYNACONV_TARGET_AVX512_BF16 void whole_piece(const Shared& given_shared, const Piece& given) {
  // Copies of its own, since a store could otherwise change any of these numbers.
  const Shared shared = given_shared;
  const Piece piece = given;
  int64_t c = 0;
  for (; c + (Table ? kBlock : 1) <= shared.channels; c += kBlock)
    piece_channels<Kernel, Stride, Pixels, Table, true>(shared, piece, c);
  if constexpr (Table)
    if (c < shared.channels) piece_channels<Kernel, Stride, Pixels, Table, false>(shared, piece, c);
}

// Kernels of other sizes: one pixel from the pointers of its taps, [rows][columns].
DYNACONV_TARGET_AVX512_BF16 void single_pixel(const Shared& shared, const Piece& piece, int rows, int columns) {
  const int64_t pairs = depthwise_pairs(rows, columns);
  for (int64_t c = 0; c < shared.channels; c += kBlock) {
    const int64_t left = shared.channels - c;
    const __mmask32 lanes = left >= kBlock ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << left) - 1);
    const float* bias = shared.bias + c;
    float16 low = pick(load<float16>(bias), load<float16>(bias + 16), kOrders.split[0]);
    float16 high = pick(load<float16>(bias), load<float16>(bias + 16), kOrders.split[1]);
    const Bfloat16* weight = shared.weight + c * 2 * pairs;
    const auto add = [&](const Bfloat16* a, const Bfloat16* b) DYNACONV_TARGET_AVX512_BF16 {
      const word16 second = b ? load_channels<false>(b + c, lanes) : word16{};
      const Halves pair = interleave(load_channels<false>(a + c, lanes), second);
      low = dot_pairs(low, pair.low, load_words(weight));
      high = dot_pairs(high, pair.high, load_words(weight + kBlock));
      weight += 2 * kBlock;
    };
    int row = 0;
    for (; row + 1 < rows; row += 2)
      for (int k = 0; k < columns; ++k) add(piece.lines[row * columns + k], piece.lines[(row + 1) * columns + k]);
    for (int k = 0; row < rows && k < columns; k += 2)
      add(piece.lines[row * columns + k], k + 1 < columns ? piece.lines[row * columns + k + 1] : nullptr);
    float block[kBlock];
    store<float16>(block, low);
    store<float16>(block + 16, high);
    finish(shared, piece, block, 1, c);
  }
}

using PieceFunction = void (*)(const Shared&, const Piece&);
struct PieceTable {
  PieceFunction by_pixels[kMostPixels];
};
template <int Kernel, int Stride, bool Table, int... Pixels>
constexpr PieceTable pieces(std::integer_sequence<int, Pixels...>) {
  return {{whole_piece<Kernel, Stride, Pixels + 1, Table>...}};
}
template <int Kernel, int Stride, bool Table>
constexpr PieceTable kPieces = pieces<Kernel, Stride, Table>(std::make_integer_sequence<int, kMostPixels>());

// The kernels for one size, or null where only single pixels serve.
template <bool Table>
const PieceTable* pieces_of(int rows, int columns, int stride, int dilation) {
  static constexpr const PieceTable* kTables[3][2] = {{&kPieces<3, 1, Table>, &kPieces<3, 2, Table>},
                                                      {&kPieces<5, 1, Table>, &kPieces<5, 2, Table>},
                                                      {&kPieces<7, 1, Table>, &kPieces<7, 2, Table>}};
  if (rows != columns || (rows != 3 && rows != 5 && rows != 7) || stride > 2 || dilation != 1) return nullptr;
  return kTables[rows / 2 - 1][stride - 1];
}

// Pixels [first, last) of output row `row`, which belong together.
void row_pixels(const DepthwiseArgsBfloat16& args, const Shared& shared, int64_t row, int32_t first, int32_t last, Piece piece) {
  const int rows = args.kernel[0], columns = args.kernel[1], stride = args.stride[1], dilation = args.dilation[1];
  const int64_t image = row / args.out_height;
  const int32_t top = static_cast<int32_t>(row % args.out_height) * args.stride[0] - args.padding[0];
  const Bfloat16* taps[kMostTaps];
  const PieceTable* table = pieces_of<true>(rows, columns, stride, dilation);
  const int32_t most = table ? kMostPixels : 1, pieces = (last - first + most - 1) / most;
  piece.lines = taps;
  for (int32_t i = 0; i < pieces; ++i) {
    const int32_t from = first + (last - first) * i / pieces, to = first + (last - first) * (i + 1) / pieces;
    const int32_t left = from * stride - args.padding[1], count = table ? (to - from - 1) * stride + columns : columns;
    const Bfloat16** tap = taps;
    for (int line = 0; line < rows; ++line) {
      const int32_t y = top + line * args.dilation[0];
      const bool inside = y >= 0 && y < args.height;
      const Bfloat16* start = args.in + (image * args.height + (inside ? y : 0)) * args.width * args.in_stride;
      for (int column = 0; column < count; ++column) {
        const int32_t x = left + column * dilation;
        *tap++ = inside && x >= 0 && x < args.width ? start + x * args.in_stride : args.zeros;
      }
    }
    if (table) table->by_pixels[to - from - 1](shared, piece);
    else single_pixel(shared, piece, rows, columns);
    piece.out += (to - from) * shared.out_pixel;
    if (piece.residual) piece.residual += (to - from) * shared.residual_pixel;
  }
}

Shared shared_of(const DepthwiseArgsBfloat16& args, int64_t out_pixel) {
  Shared shared{};
  shared.channels = args.channels;
  shared.weight = args.weight;
  shared.bias = args.bias;
  shared.out_pixel = out_pixel;
  shared.residual_pixel = args.residual_stride;
  shared.activation = args.activation;
  shared.final_activation = args.final_activation;
  return shared;
}

}  // namespace

void depthwise_run(const DepthwiseRunBfloat16& run) {
  Shared shared{};
  shared.pixel = run.pixel;
  shared.channels = run.channels;
  shared.weight = run.weight;
  shared.bias = run.bias;
  shared.out_pixel = run.out_pixel;
  shared.activation = run.activation;
  Piece piece{run.lines, 0, run.out, nullptr};
  if (const PieceTable* plain = pieces_of<false>(run.line_count, run.kernel, run.stride, run.dilation)) {
    const int32_t pieces = (run.count + kMostPixels - 1) / kMostPixels;
    for (int32_t i = 0; i < pieces; ++i) {
      const int32_t from = run.count * i / pieces, to = run.count * (i + 1) / pieces;
      piece.first = from * run.stride * run.pixel;
      piece.out = run.out + from * run.out_pixel;
      plain->by_pixels[to - from - 1](shared, piece);
    }
    return;
  }
  const Bfloat16* taps[kMostTaps];
  piece.lines = taps;
  for (int32_t p = 0; p < run.count; ++p, piece.out += run.out_pixel) {
    for (int line = 0; line < run.line_count; ++line)
      for (int k = 0; k < run.kernel; ++k)
        taps[line * run.kernel + k] =
            run.lines[line] ? run.lines[line] + (p * run.stride + k * run.dilation) * run.pixel : kNothing;
    single_pixel(shared, piece, run.line_count, run.kernel);
  }
}

void depthwise_pixels(const DepthwiseArgsBfloat16& args, int64_t row, int32_t first, int32_t last, Bfloat16* out,
                      int64_t out_pixel) {
  row_pixels(args, shared_of(args, out_pixel), row, first, last, {nullptr, 0, out, nullptr});
}

void depthwise_rows(const DepthwiseArgsBfloat16& args, int64_t first, int64_t last) {
  const Shared shared = shared_of(args, args.out_stride);
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* need = args.need ? args.need + row * args.out_width : nullptr;
    int32_t x = next_needed(args, need, 0);
    while (x < args.out_width) {
      const int32_t end = next_other(args, need, x);
      const int64_t pixel = row * args.out_width + x;
      row_pixels(args, shared, row, x, end,
                 {nullptr, 0, args.out + pixel * args.out_stride,
                  args.residual ? args.residual + pixel * args.residual_stride : nullptr});
      x = next_needed(args, need, end);
    }
  }
}

#else

// Plans in bfloat16 are refused here (csrc/plan/check.cpp).
void depthwise_run(const DepthwiseRunBfloat16&) {}
void depthwise_pixels(const DepthwiseArgsBfloat16&, int64_t, int32_t, int32_t, Bfloat16*, int64_t) {}
void depthwise_rows(const DepthwiseArgsBfloat16&, int64_t, int64_t) {}

#endif
