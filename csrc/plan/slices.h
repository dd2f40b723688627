// Where an expansion with its depthwise convolution and the channel fusion that projects its result are both cut by the same
// channels, every thread reads what it has written. Then each thread's channels lie together, [threads][positions][channels of
// the thread] of every image: in rows of all channels, a core that fetches ahead takes the lines of the other one.

#pragma once

#include <cstdint>
#include <vector>

#include "run.h"

// Of each such expansion its only reader, of each such reader the expansion, and -1 for all other steps.
std::vector<int32_t> partners_of(const Plan& plan);
// Whether the step `index` finds its input in slices.
bool reads_slices(const Run& run, int32_t index, int threads);
