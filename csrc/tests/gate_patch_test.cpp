// A patch of gate logits against plain loops, with rows and weights exactly as long as they must be.

#include "../kernels/gate_patch.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "plan_builder.h"

namespace {

constexpr int kLine = kPatchColumns + 2, kPositions = kPatchRows * kPatchColumns;

bool right(int channels, bool squeezes, std::mt19937& random) {
  std::vector<std::vector<float>> rows(kPatchTaps);
  const float* from[kPatchTaps];
  for (int i = 0; i < kPatchTaps; ++i) from[i] = (rows[i] = noise(random, channels)).data();
  const std::vector<float> weight = noise(random, 9 * channels), linear = noise(random, channels);
  std::vector<float> sums(kPositions, NAN);
  const float all = gate_patch(from, channels, weight.data(), squeezes ? linear.data() : nullptr, sums.data());
  double wanted = 0, worst = 0;
  for (int i = 0; i < kPositions; ++i) {
    const int y = i / kPatchColumns, x = i % kPatchColumns;
    double sum = 0;
    for (int t = 0; t < 9; ++t)
      for (int c = 0; c < channels; ++c) sum += double(rows[(y + t / 3) * kLine + x + t % 3][c]) * weight[t * channels + c];
    for (int c = 0; squeezes && c < channels; ++c) wanted += double(rows[(y + 1) * kLine + x + 1][c]) * linear[c];
    const double off = std::fabs(sum - sums[i]);
    worst = off <= worst ? worst : off;
    if (sums[i] != sums[i]) return false;
  }
  const double scale = std::sqrt(9.0 * channels);
  if (worst <= 1e-5 * scale && std::fabs(wanted - all) <= 1e-5 * kPositions * scale) return true;
  std::fprintf(stderr, "%d channels, squeeze %d: off by %g and %g\n", channels, squeezes, worst, std::fabs(wanted - all));
  return false;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int failures = 0;
  for (const int channels : {1, 3, 4, 5, 8, 12, 13, 16, 17, 24, 31, 33, 40, 64, 100})
    for (const bool squeezes : {false, true}) failures += !right(channels, squeezes, random);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
