// The runs that a call is made of: steps for the whole batch, for the windows of a stage in turn, or for windows that every thread
// takes alone.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "run.h"

// Those of a stage, in order; `batch` has the masks of all `images`.
std::vector<Context> windows_of(const Plan& plan, const Context& batch, const Stage& stage, int64_t images);
// In order; they refer to the contexts of the arena.
std::vector<Run> runs_of(const Plan& plan, Arena& arena, const Call& call, Barrier& barrier, std::atomic<int32_t>& spoilt);
// Of a window that one thread takes alone; 0 where there is none.
int64_t most_own_images(const Arena& arena, int64_t images, int threads);
// Tells the batch and the caller what all windows have opened.
void count_open(const std::vector<Run>& runs, Arena& arena, const Call& call);
