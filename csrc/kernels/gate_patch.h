// Logits of a 3x3 gate, a patch of neighbouring positions at a time: its weights and sums stay in registers, with the channels
// along the vectors, so that a position costs nine products a channel and every row is read once or twice.

#pragma once

#include <cstdint>

constexpr int kPatchRows = 2, kPatchColumns = 7;  // positions of a patch
constexpr int kMostPatchStride = 2;

// Rows that the positions of a patch read: lines of the input, and rows of a line.
constexpr int patch_lines(int stride) { return stride * (kPatchRows - 1) + 3; }
constexpr int patch_line(int stride) { return stride * (kPatchColumns - 1) + 3; }
constexpr int kMostPatchTaps = patch_lines(kMostPatchStride) * patch_line(kMostPatchStride);

// Weights of a gate as its patches read them: blocks of neighbouring channels, of each the nine taps and the linear layer,
// zeros where there is none. Weights that lie a power of two apart would push each other out of the nearest cache. float32
// [blocks][10][16]; for rows in bfloat16 [blocks][10][32], rounded as the weights of all other layers are. dtype as in plan.h:
// that of the rows.
int64_t patch_weight_bytes(int dtype, int64_t channels);
// weight: [9][channels], with `squeeze` followed by [channels].
void pack_patch_weights(int dtype, int64_t channels, const float* weight, bool squeeze, void* packed);

// sums[r * kPatchColumns + p] = sum over taps (i, j) of dot(from[(stride * r + i) * patch_line(stride) + stride * p + j], tap
// 3 i + j of `weight`). Returns what the linear layer makes of the rows that this patch alone counts as its own: from the
// centre tap on `stride` lines of `stride` rows for each position. Meanwhile the lines that no patch has read before are fetched
// of the rows that lie `next` bytes behind these.
using GatePatch = float (*)(const void* const* from, int64_t channels, const void* weight, float* sums, int64_t next);

// stride: 1 .. kMostPatchStride, in both directions. bfloat16 needs a processor with has_bfloat16().
GatePatch gate_patch(int dtype, int stride);
// Those for processors that have more.
GatePatch gate_patch_avx512(int stride);
GatePatch gate_patch_bfloat16(int stride);
