// The flat plan that one call executes: tables of plain structures, filled by dynaconv/engine/_structures.py.
//
// Every value is a matrix of rows [N * height * width, channels], channels-last, in one arena or outside of it. A masked
// value is stored on its full grid; only the rows that its grid lists are computed, the others hold anything. Sizes are
// fixed but for the number of images N.

#pragma once

#include <cstdint>

constexpr int kPlanAbi = 9;

// Order as in dynaconv/engine/_structures.py.
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

enum Activation : int32_t {
  kNone = 0, kRelu, kRelu6, kSilu, kHardswish, kSigmoid, kHardsigmoid, kGelu, kLeakyRelu, kTanh, kElu, kMish, kGeluTanh,
  kActivations
};
// kLeakyRelu may say its slope, n / 2^24 with n from 1 on, as kLeakyRelu + (n << kSlopeShift); alone it is 0.01.
constexpr int kSlopeShift = 7;
constexpr int32_t kind_of(int32_t activation) { return activation & ((1 << kSlopeShift) - 1); }
constexpr float slope_of(int32_t activation) {
  return activation >> kSlopeShift ? static_cast<float>(activation >> kSlopeShift) * (1.0f / (1 << 24)) : 0.01f;
}

struct Value {
  int64_t offset;    // bytes for one image from the arena's start; the run multiplies by N. Ignored when external
  int32_t height, width, channels;
  int32_t stride;    // elements from one row to the next, >= first + channels
  int32_t dtype;
  int32_t external;  // index into Call::externals, or -1: lives in the arena
  int32_t first;     // where in a row the channels begin: values may be parts of the rows of one memory. 0 when external
  int32_t reserved;
};

// Weights and geometry. `weight` is packed for the kernel that the step names:
//   kConv       [groups][panels of 32 outputs][taps * in_channels / groups][32], zero padded; taps in row-major order
//   kDepthwise  [taps][channels]
//   kStem       as kConv
//   kGate       [taps][C] float32, for squeeze followed by [C] of the Linear; bias[0] is the sum of both biases. Where the
//               rows are bfloat16, a step may round them likewise
// For bfloat16 inputs (for kStem: outputs) the weights are bfloat16, rounded to the nearest, with pairs of neighbours in
// depth beside each other:
//   kConv       [groups][panels of 32 outputs][taps][(in_channels / groups + 1) / 2][32][2], zeros beside odd channels
//   kStem       as kConv with ky as the taps and (kx, channel) as their channels
//   kDepthwise  [panels of 32 channels][pairs of taps][2][16][2]: channel 8 q + 4 half + r lies at [half][4 q + r]. Kernel
//               rows 2 i and 2 i + 1 pair up column by column; a last odd row pairs columns 2 j and 2 j + 1, the last of
//               them with zero. Its bias is padded to whole panels
//   kDynamicConv  [groups][panels of 32 outputs][in_channels / groups][taps][experts][32] float32; one channel a group:
//               [panels of 32 channels][taps][experts][32], bias [panels * 32]. conv[1]: biases to mix,
//               [groups][panels][experts][32]
//   kChannelFusion  factored: all as kConv; folded: conv[0] as kDynamicConv with one expert, conv[1] [in_channels][rank].
//               The panels of conv[2] follow the groups of conv[0]
// bias: [groups][panels * 32] float32, zero padded; depthwise [channels]. Never null.
struct Conv {
  const void* weight;
  const float* bias;
  const void* winograd;  // 3x3, stride 1, groups 1: [panels][16 points][in_channels][32] of F(2x2, 3x3), or null; bfloat16
                         // [panels][16 points][(in_channels + 1) / 2][32][2], and the result is bfloat16, too
  int32_t in_channels, out_channels, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t reserved;
};

// A mask on one grid over the batch. A run keeps for it: need [N * height * width] bytes, the list of open rows, and
// (with `closed`) the list of the others.
struct Grid {
  int32_t height, width;
  int32_t closed;    // 1: some step walks the closed rows
  int32_t tiles;     // 1: some step walks tiles of 2x2 positions (Winograd)
};

enum Kind : int32_t {
  kLayout = 0,    // external image(s), planes or rows -> rows `out`, converted to its dtype
  kConv,          // out = act(conv(in) [+ in2]); groups allowed; a Linear is a 1x1 on a 1x1 grid. Where the convolution has
                  // Winograd weights they are used when cheaper; with a grid, grid2 then says which inputs hold something
  kStem,          // conv from an external image of few channels (planes or rows), out rows; without in2
  kDepthwise,     // out = act(depthwise(in) [+ in2]); in bfloat16 what is infinite or NaN may reach one output more in its line
  kInverted,      // out = final_act(in2 + project(act2(depthwise(act1(expand(in))))) ); conv[0] may be -1 (no expansion), and
                  // with a mask and an expansion grid2 says which inputs are read. ints[1]: closed rows become in2 (1), or
                  // final_act(in2) (2).
                  // conv[2] = -1 (or ints[0] > 0), float32 without in2: no projection, out = act2(depthwise(act1(expand(in)))), and
                  // aux[1] (or -1) takes its mean over the open positions, 0 where there is none. With ints[0] = 1 the expansion is a folded channel
                  // fusion, with 2 a factored one: conv[0] is its static weight, conv[2] is P and aux[0] what kFusionFactors made
  kMaxPool,       // geometry of conv[0] (weight null), padding counts as -inf
  kAvgPool,       // geometry of conv[0]; ints[0] = 1: padding counts in the average
  kMean,          // [N, h, w, C] -> [N, bins, bins, C], adaptive average (bins may share positions); with grid: over open
                  // rows only
  kAdd,           // out = act(in + in2), in2 of the same grid, or 1x1 grid, or 1 channel (broadcast); ints[0] = 1: in - in2;
                  // aux[0] (or -1), one float a position: in + aux[0] * in2, where aux[0] is 0 without looking at in2; with
                  // ints[1] = 1 act changes nothing there
  kMultiply,      // out = act(in * in2), broadcast as kAdd
  kActivate,      // out = act(in); ints[0] = 1, for dense float32 of one channel: act(in * floats[0] + floats[1]); ints[0] = 2:
                  // negative numbers times the slope of their channel, conv[0].bias [C]
  kGate,          // logits [N, h, w, 1] of conv[0]: ints[0] = 1 squeeze (3x3 + mean * linear), 0: convolution only;
                  // squeeze keeps its sums in aux[0], float32 [N, in.height, 1, 1]. ints[1] = 1, squeeze at stride 1: bias[1 + t]
                  // is added for every tap t that lies inside the map
  kThreshold,     // logits `in` >= floats[0] -> grid `grid`, within grid2 (or -1); Call::forced replaces the decision. Logits
                  // of G channels on a 1x1 grid decide about the 1 x G positions of their grid
  kDilate,        // grid `grid` -> grid `grid2`: what conv[0] reads for the open rows of `grid`; Call::forced[grid2] replaces it
  kMaskValue,     // grid -> float rows [N, h, w, 1]; a grid of 1 x G positions also [N, 1, 1, G]
  kLayerNorm,     // over channels: weight/bias in conv[0] (weight [C], bias [C]), floats[0] = eps
  kSoftmax,       // over channels in groups of ints[0], of in * floats[0]
  kCopy,          // channels ints[1], ints[1] + ints[3], .. of in into channels ints[0], ints[0] + ints[2], .. of out, as many
                  // as both have (a step of 0 counts as 1): concatenation, interleaving
  kDynamicConv,   // as kConv with a kernel for each image, mixed from ints[0] experts: coefficients aux[0], [experts] or with
                  // ints[1] = 1 [outputs][experts], mix the kernels and the biases of conv[1] (or -1); the kernels are scaled
                  // by aux[1] [taps], aux[2] [in_channels], aux[3] [outputs] (or -1). One expert needs no coefficients (-1).
                  // ints[2] = 1: Winograd may be used, as for kConv
  kChannelFusion, // DCD: out = act(scale * (conv[0](in) + bias) + P (matrix (Q in + bias)) [+ in2]), where Q = conv[1] reads
                  // what the centre tap reads and P = conv[2]. aux[0] [out_channels + rank * rank]: scale (with ints[4] = 1
                  // before relu6(z + 3) / 3), then row m of the matrix: what latent channel m gives to every other.
                  // ints[0] = ints[1] = 1; ints[2] as for kDynamicConv; ints[3] = 0: folded to a kernel for each image,
                  // 1: factored
  kFusionFactors, // what the coefficients of a 1x1 kChannelFusion come to, for steps that fold its kernel themselves: out is one
                  // row [N, 1, 1, n] of the outputs' scale, padded to panels of 32, then Q's bias and each row of Q [in_channels]
                  // [rank] = conv[1] times the matrix, padded to 16. aux[0] and ints[4] as there; in = -1. Factored, with in: conv[1]
                  // as kConv, and the rows are those of Q in + bias for every position of in, times the matrix
  kRouter,        // out = act2(conv[2](h)) of h = act0(conv[0](in)), or of h * act1(conv[1](h)) where conv[1] is given. conv[0]
                  // reads all of in at once, so that each image has one row; the others are linear layers. float32
  kNarrow,        // the step of kind ints[0] (kConv, kDepthwise, kInverted; float32) of each image's open channels: `grid` (1 x G) decides
                  // about G groups of the inputs (ints[1] = 1), the outputs (ints[2] = 1) or both, or of kInverted's hidden
                  // channels. Open channels lie first in the rows
  kResample,      // every position of out is a sum of rows of in, along each axis by itself. conv[0].weight [h * taps + w * taps][2]
                  // float32: for the taps conv[0].kernel[0] of each line of out, then for kernel[1] of each column, the line or
                  // column of in (-1: zeros) and its factor; conv[0].out_channels counts these pairs. ints[0] x ints[1] = P > 1,
                  // with one tap: rows of in hold P rows of out beside each other, and (y, x) takes that of number
                  // (y + ints[2]) % ints[0] * ints[1] + (x + ints[3]) % ints[1]
  kKinds
};

struct Step {
  int32_t kind;
  int32_t in, in2, out;          // values, -1: none. in2 is added before the last activation (kConv, kDepthwise, kInverted)
  int32_t conv[3];               // -1: none
  int32_t activation[3];         // of each convolution; activation[0] for all other kinds
  int32_t final_activation;      // after in2 was added
  int32_t grid, grid2;           // -1: every row
  int32_t closed;                // 1: walk the closed rows of `grid` instead of the open ones
  float run_all_above;           // open share of `grid` above which all rows are computed; > 1: never
  int32_t aux[4];                // further values (routing coefficients ...), -1: none
  int32_t ints[8];
  float floats[4];
};

struct PlanData {
  int32_t abi;
  int32_t value_count, conv_count, grid_count, step_count, external_count;
  int64_t arena_bytes;           // for one image
  const Value* values;
  const Conv* convs;
  const Grid* grids;
  const Step* steps;
};

// One run of steps [first, last). Several runs of one forward share `context` (ATen in between).
struct Call {
  int64_t images;
  int32_t threads;
  int32_t first, last;
  int32_t reserved;
  void* const* externals;            // data pointers
  const int32_t* external_planes;    // 1: [N, C, H, W] contiguous planes; 0: rows
  const uint8_t* const* forced;      // for each grid, null or [N * h * w] decisions of 0 and 1
  int64_t* open_rows;                // out, may be null: [grid_count] open rows over the batch
  double* step_ns;                   // out, may be null: [step_count] wall time of each step, nanoseconds
};

extern "C" {
// Checks everything that can be checked without an input and returns a handle, or null and the reason in `error`.
// The weights stay the caller's and must outlive the handle.
void* dynaconv_plan_create(const PlanData* data, char* error, int64_t error_size);
void dynaconv_plan_destroy(void* plan);
// Safe to call from several threads: each run takes a context (arena) of its own from a pool.
void* dynaconv_plan_acquire(void* plan, int64_t images);   // null: out of memory, or not 1 .. most_images
int64_t dynaconv_plan_most_images(void* plan);             // more would not fit the numbers that count rows and bytes
void dynaconv_plan_release(void* plan, void* context);
// Pointer to a value of the context (for ATen in between), valid until release.
void* dynaconv_plan_value(void* plan, void* context, int32_t value);
// 0 done; 1 bad call (see error); 3: done, but a mask was decided from logits that are NaN: `error` is the number of the step.
int dynaconv_plan_run(void* plan, void* context, const Call* call, char* error, int64_t error_size);
// A whole forward in one call: acquire, run, release. 2: no context for so many images.
int dynaconv_plan_forward(void* plan, const Call* call, char* error, int64_t error_size);
int64_t dynaconv_plan_memory(void* plan);                  // bytes held by all contexts
int32_t dynaconv_plan_abi();                               // kPlanAbi of this library
// For tests, before the first acquire: maps of a batch beyond `batch` bytes take windows of at most `window` bytes, in
// stretches of at least `steps` (stages.h).
void dynaconv_plan_limits(void* plan, int64_t batch, int64_t window, int32_t steps);
}
