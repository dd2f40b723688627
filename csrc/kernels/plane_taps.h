// What a 3x3 gate does along the lines of a picture that lies in planes.

#pragma once

#include <cstdint>

// sums[x] += taps[0] * line[stride * x - 1] + taps[1] * line[stride * x] + taps[2] * line[stride * x + 1] for x < count; zeros lie
// before and behind the line. stride 1 or 2, stride * (count - 1) < width.
void slide_taps(const float* line, int64_t width, int64_t stride, const float* taps, int64_t count, float* sums);
// The sum of a line.
float line_sum(const float* line, int64_t count);
