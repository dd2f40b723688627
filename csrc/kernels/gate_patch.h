// Logits of a 3x3 gate, a patch of neighbouring positions at a time: its weights and sums stay in registers, with the channels
// along the vectors, so that a position costs nine products a channel and every row is read once or twice.

#pragma once

#include <cstdint>

constexpr int kPatchRows = 2, kPatchColumns = 7;                            // positions of a patch
constexpr int kPatchTaps = (kPatchRows + 2) * (kPatchColumns + 2);          // rows that they read

// sums[r * kPatchColumns + p] = sum over taps (i, j) of dot(from[(r + i) * (kPatchColumns + 2) + p + j], weight + (3 i + j) *
// channels). Returns the sum over all positions of dot(their own row, linear); 0 without `linear`.
float gate_patch(const float* const* from, int64_t channels, const float* weight, const float* linear, float* sums);
