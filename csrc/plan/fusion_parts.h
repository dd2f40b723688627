// What the ways to run a channel fusion share: its parts, its coefficients, and what they become before weights are made.

#pragma once

#include "dynamic_task.h"

struct Fusion {
  const Conv &conv, &reduce, &expand;   // the static weight, Q, P
  int64_t outputs, rank, rank_panels, channels;
  bool folded, matrix_first;            // matrix_first: the matrix joins P, panel by panel, and not Q

  Fusion(const Plan& plan, const Step& step);
  // Floats that all threads share, for one image.
  int64_t scale() const { return outputs; }
  int64_t shift() const;
  int64_t left() const;
  int64_t prepared() const { return scale() + shift() + left(); }
  // Floats of a thread: the matrix as panels.
  int64_t panels() const { return rank_panels * rank * kPanel; }
};

struct Coefficients {
  const float* scale;   // [out_channels]
  const float* matrix;  // [rank][rank]: row m holds what latent channel m gives to every latent channel
};

Coefficients coefficients(const Run& run, const Step& step, const Fusion& fusion, int64_t image);
// relu6(z + 3) / 3, or the number itself.
void take_scale(const Step& step, const Fusion& fusion, const float* from, float* to);
// [rank][rank] as panels of 32 columns, zero padded.
void take_panels(const Fusion& fusion, const float* matrix, float* to);
// Rows of `rank` numbers times the matrix in panels: out + r * out_row.
void multiply_panels(const Fusion& fusion, const float* rows, int64_t count, int64_t row, const float* panels, float* out,
                     int64_t out_row);
// What folded weights are made of, for all images. All threads call this; a barrier lies within.
Prepared prepare_folded(Worker& worker, const Step& step, const Fusion& fusion);
