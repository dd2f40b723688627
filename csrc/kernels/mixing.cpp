// Kernels that mix experts, one template for all instruction sets.

#include "mixing.h"

#include "gemm.h"
#include "isa.h"
#include "vectors.h"

namespace {

// sums[r][i] for `Rows` x `Images`, one vector of outputs from `experts` and `shares` on. `Count` experts, 0: call.count.
template <typename Vector, int Count, int Images, int Rows>
DYNACONV_INLINE void sum_experts(const MixCall& call, const float* experts, const float* shares,
                                 Vector (&sums)[Rows][Images]) {
  const int64_t step = int64_t{Count ? Count : call.count} * kPanel;
  const auto add = [&](bool first) __attribute__((always_inline)) {
    Vector own[Images];
#pragma GCC unroll 4
    for (int i = 0; i < Images; ++i) {
      own[i] = load<Vector>(shares + i * step);
      hold(own[i]);
    }
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) {
      Vector weight = load<Vector>(experts + r * step);
      if constexpr (Images > 1) hold(weight);
#pragma GCC unroll 4
      for (int i = 0; i < Images; ++i) sums[r][i] = first ? weight * own[i] : sums[r][i] + weight * own[i];
    }
    experts += kPanel;
    shares += kPanel;
  };
  add(true);
  if constexpr (Count > 0) {
#pragma GCC unroll 8
    for (int e = 1; e < Count; ++e) add(false);
  } else {
    for (int e = 1; e < call.count; ++e) add(false);
  }
}

template <typename Vector, int Count, int Images, int Rows>
DYNACONV_INLINE void mix_rows(const MixCall& call, int64_t row) {
  const int64_t count = Count ? Count : call.count;
  for (int c = 0; c < kPanel; c += kLanesOf<Vector>) {
    Vector sums[Rows][Images];
    sum_experts<Vector, Count, Images, Rows>(call, call.experts + row * count * kPanel + c, call.shares + c, sums);
    if (call.scale) {
      for (int i = 0; i < Images; ++i)
        for (int r = 0; r < Rows; ++r) sums[r][i] *= call.scale[i * call.rows + row + r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      float* const out = call.out + (call.places ? call.places[row + r] : (row + r) * kPanel) + c;
#pragma GCC unroll 4
      for (int i = 0; i < Images; ++i) store<Vector>(out + i * call.image_step, sums[r][i]);
    }
  }
}

template <typename Vector, int Count, int Images, int Rows>
DYNACONV_INLINE void mix_images(const MixCall& call) {
  int64_t row = 0;
  for (; row + Rows <= call.rows; row += Rows) mix_rows<Vector, Count, Images, Rows>(call, row);
  for (; row < call.rows; ++row) mix_rows<Vector, Count, Images, 1>(call, row);
}

// `Sums` is how many vectors of sums fit the registers beside what they are made of.
template <typename Vector, int Count, int Sums>
DYNACONV_INLINE void mix_counted(const MixCall& call) {
  switch (call.images) {
    case 1: mix_images<Vector, Count, 1, Sums / 2>(call); break;
    case 2: mix_images<Vector, Count, 2, Sums / 2>(call); break;
    case 3: mix_images<Vector, Count, 3, Sums / 4>(call); break;
    default: mix_images<Vector, Count, 4, Sums / 4>(call); break;
  }
}

template <typename Vector, int Sums>
DYNACONV_INLINE void mix(const MixCall& call) {
  if (call.count == 4) mix_counted<Vector, 4, Sums>(call);
  else mix_counted<Vector, 0, Sums>(call);
}

// G g G^T with G = [1 0 0; 1 1 1; 1 -1 1; 0 0 1], a vector of outputs at a time. The halves of Winograd's G are left to the
// transform of the patches, of which there are fewer than weights.
template <typename Vector, int Images>
DYNACONV_INLINE void transform(const Vector (&sums)[9][Images], int image, float* out, int64_t point_step) {
  Vector half[4][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vector first = sums[j][image], last = sums[6 + j][image];
    const Vector outer = first + last, inner = sums[3 + j][image];
    half[0][j] = first;
    half[1][j] = outer + inner;
    half[2][j] = outer - inner;
    half[3][j] = last;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, out += 4 * point_step) {
    const Vector outer = half[i][0] + half[i][2], inner = half[i][1];
    store<Vector>(out, half[i][0]);
    store<Vector>(out + point_step, Vector(outer + inner));
    store<Vector>(out + 2 * point_step, Vector(outer - inner));
    store<Vector>(out + 3 * point_step, half[i][2]);
  }
}

// The nine taps of one channel, from `row` on.
template <typename Vector, int Count, int Images>
DYNACONV_INLINE void winograd_channel(const MixCall& call, int64_t row, int first) {
  const int64_t count = Count ? Count : call.count;
  const float* const shares = call.shares + first * count * kPanel;
  float* const out = call.out + first * call.image_step + row / 9 * kPanel;
  for (int c = 0; c < kPanel; c += kLanesOf<Vector>) {
    Vector sums[9][Images];
    sum_experts<Vector, Count, Images, 9>(call, call.experts + row * count * kPanel + c, shares + c, sums);
    if (call.scale) {
      for (int i = 0; i < Images; ++i)
        for (int r = 0; r < 9; ++r) sums[r][i] *= call.scale[(first + i) * call.rows + row + r];
    }
#pragma GCC unroll 2
    for (int i = 0; i < Images; ++i) transform<Vector, Images>(sums, i, out + i * call.image_step + c, call.point_step);
  }
}

// All images of a channel before the next: its experts are near then.
template <typename Vector, int Count, int Most>
DYNACONV_INLINE void winograd_counted(const MixCall& call) {
  for (int64_t row = 0; row < call.rows; row += 9) {
    int first = 0;
    for (; first + Most <= call.images; first += Most) winograd_channel<Vector, Count, Most>(call, row, first);
    if constexpr (Most > 1)
      if (first < call.images) winograd_channel<Vector, Count, 1>(call, row, first);
  }
}

template <typename Vector, int Most>
DYNACONV_INLINE void mix_winograd(const MixCall& call) {
  if (call.count == 4) winograd_counted<Vector, 4, Most>(call);
  else winograd_counted<Vector, 0, Most>(call);
}

// Both vectors of a row take the same factor.
template <typename Vector, int Rows>
DYNACONV_INLINE void fuse_rows(const FuseCall& call, int64_t row) {
  constexpr int kLanes = kLanesOf<Vector>;
  for (int c = 0; c < kPanel; c += 2 * kLanes) {
    const Vector first = load<Vector>(call.shares + c), second = load<Vector>(call.shares + c + kLanes);
    const float* const weights = call.weights + row * kPanel + c;
    Vector sums[Rows][2];
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      sums[r][0] = load<Vector>(weights + r * kPanel) * first;
      sums[r][1] = load<Vector>(weights + r * kPanel + kLanes) * second;
    }
    const float* left = call.left + row * call.left_row;
    const float* right = call.right + c;
    for (int64_t l = 0; l < call.rank; ++l, ++left, right += kPanel) {
      Vector low = load<Vector>(right), high = load<Vector>(right + kLanes);
      hold(low);
      hold(high);
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) {
        const float value = left[r * call.left_row];
        sums[r][0] += low * value;
        sums[r][1] += high * value;
      }
    }
    float* const out = call.out + row * kPanel + c;
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
      store<Vector>(out + r * kPanel, sums[r][0]);
      store<Vector>(out + r * kPanel + kLanes, sums[r][1]);
    }
  }
}

template <typename Vector, int Most>
DYNACONV_INLINE void fuse(const FuseCall& call) {
  int64_t row = 0;
  for (; row + Most <= call.rows; row += Most) fuse_rows<Vector, Most>(call, row);
  for (; row + 4 <= call.rows; row += 4) fuse_rows<Vector, 4>(call, row);
  for (; row < call.rows; ++row) fuse_rows<Vector, 1>(call, row);
}

#define DYNACONV_MIXING(NAME, TARGET, VECTOR, SUMS, MOST, ROWS)                              \
  TARGET void mix_##NAME(const MixCall& call) { mix<VECTOR, SUMS>(call); }                   \
  TARGET void winograd_##NAME(const MixCall& call) { mix_winograd<VECTOR, MOST>(call); }     \
  TARGET void fuse_##NAME(const FuseCall& call) { fuse<VECTOR, ROWS>(call); }                \
  constexpr MixKernels kMixing_##NAME = {mix_##NAME, winograd_##NAME, fuse_##NAME};

DYNACONV_MIXING(plain, , float4, 8, 1, 4)
#ifdef DYNACONV_X86
DYNACONV_MIXING(avx2, DYNACONV_TARGET_AVX2, float8, 8, 1, 6)
DYNACONV_MIXING(avx512, DYNACONV_TARGET_AVX512, float16, 16, 2, 12)
#endif

}  // namespace

const MixKernels& mix_kernels() {
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx512) return kMixing_avx512;
  if (best_isa_level() == Isa::kAvx2) return kMixing_avx2;
#endif
  return kMixing_plain;
}
