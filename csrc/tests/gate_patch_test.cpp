// A patch of gate logits against plain loops, with rows exactly as long as they must be.

#include "../kernels/gate_patch.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../kernels/bfloat16.h"
#include "../kernels/isa.h"
#include "plan_builder.h"

namespace {

constexpr int kPositions = kPatchRows * kPatchColumns;

bool right(int dtype, int stride, int channels, bool squeezes, std::mt19937& random) {
  const int line = patch_line(stride), taps = patch_lines(stride) * line;
  std::vector<std::vector<float>> rows(taps);
  std::vector<std::vector<Bfloat16>> halves(taps);
  std::vector<const void*> from(taps);
  for (int i = 0; i < taps; ++i) {
    from[i] = (rows[i] = noise(random, channels)).data();
    if (dtype == kFloat32) continue;
    for (float& v : rows[i]) {
      halves[i].push_back(narrowed(v));
      v = widened(halves[i].back());
    }
    from[i] = halves[i].data();
  }
  std::vector<float> weight = noise(random, (9 + squeezes) * channels);
  std::vector<float> packed(patch_weight_bytes(dtype, channels) / sizeof(float), NAN), sums(kPositions, NAN);
  pack_patch_weights(dtype, channels, weight.data(), squeezes, packed.data());
  for (float& w : weight) w = dtype == kBfloat16 ? widened(narrowed(w)) : w;
  const float all = gate_patch(dtype, stride)(from.data(), channels, packed.data(), sums.data(), 0);
  double wanted = 0, worst = 0;
  for (int y = 1; squeezes && y <= stride * kPatchRows; ++y)
    for (int x = 1; x <= stride * kPatchColumns; ++x)
      for (int c = 0; c < channels; ++c) wanted += double(rows[y * line + x][c]) * weight[9 * channels + c];
  for (int i = 0; i < kPositions; ++i) {
    const int y = stride * (i / kPatchColumns), x = stride * (i % kPatchColumns);
    double sum = 0;
    for (int t = 0; t < 9; ++t)
      for (int c = 0; c < channels; ++c) sum += double(rows[(y + t / 3) * line + x + t % 3][c]) * weight[t * channels + c];
    // What is not a number is wrong, too.
    const double off = std::fabs(sum - sums[i]);
    worst = off <= worst ? worst : off;
    if (off != off) return false;
  }
  const double scale = std::sqrt(9.0 * channels);
  if (worst <= 1e-5 * scale && std::fabs(wanted - all) <= 1e-5 * kPositions * stride * scale) return true;
  std::fprintf(stderr, "dtype %d, stride %d, %d channels, squeeze %d: off by %g and %g\n", dtype, stride, channels, squeezes, worst,
               std::fabs(wanted - all));
  return false;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int failures = 0;
  for (const int dtype : {kFloat32, kBfloat16})
    for (int stride = 1; stride <= kMostPatchStride; ++stride)
      for (const int channels : {1, 3, 4, 5, 8, 12, 13, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 100, 160})
        for (const bool squeezes : {false, true})
          if (dtype == kFloat32 || has_bfloat16()) failures += !right(dtype, stride, channels, squeezes, random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
