// What this processor can do at most, measured on the spot: the roofs that benchmarks/engine.py holds layers against.

#include <chrono>
#include <vector>

#include "isa.h"
#include "vectors.h"

#ifdef DYNACONV_X86
#include <immintrin.h>
#endif

namespace {

// Enough independent sums to hide the latency of a multiply-add on every port.
constexpr int kSums = 12;

// They start from memory: the compiler would merge sums that it knows to be equal.
template <typename Vector>
DYNACONV_INLINE float multiply_add(const float* from, int64_t rounds) {
  Vector sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = load<Vector>(from + s * kLanesOf<Vector>);
  const Vector half = broadcast<Vector>(0.5f);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] * half + half;
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  return sums[0][0];
}

// Four running sums, so that reading and not adding is what it waits for.
template <typename Vector>
DYNACONV_INLINE float read(const float* data, int64_t count) {
  constexpr int kStep = 4 * kLanesOf<Vector>;
  Vector sums[4] = {};
  for (int64_t i = 0; i + kStep <= count; i += kStep)
    for (int s = 0; s < 4; ++s) sums[s] += load<Vector>(data + i + s * kLanesOf<Vector>);
  return (sums[0] + sums[1] + sums[2] + sums[3])[0];
}

using MultiplyAdd = float (*)(const float* from, int64_t rounds);
using Read = float (*)(const float* data, int64_t count);

float multiply_add_plain(const float* from, int64_t rounds) { return multiply_add<float4>(from, rounds); }
float read_plain(const float* data, int64_t count) { return read<float4>(data, count); }

#ifdef DYNACONV_X86
DYNACONV_TARGET_AVX2 float multiply_add_avx2(const float* from, int64_t rounds) {
  return multiply_add<float8>(from, rounds);
}
DYNACONV_TARGET_AVX2 float read_avx2(const float* data, int64_t count) { return read<float8>(data, count); }
DYNACONV_TARGET_AVX512 float multiply_add_avx512(const float* from, int64_t rounds) {
  return multiply_add<float16>(from, rounds);
}
DYNACONV_TARGET_AVX512 float read_avx512(const float* data, int64_t count) { return read<float16>(data, count); }

DYNACONV_TARGET_AVX512_BF16 float multiply_add_bfloat16(const float* from, int64_t rounds) {
  __m512 sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = _mm512_loadu_ps(from + 16 * s);
  const __m512bh pairs = {};
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_dpbf16_ps(sums[s], pairs, pairs);
  for (int s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  return _mm512_cvtss_f32(sums[0]);
}
#endif

// Seconds that `work(thread)` takes on all threads at once.
template <typename Work>
double seconds_of(int threads, Work work) {
  std::vector<float> results(16 * static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) results[16 * t] = work(t);
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  // The results are looked at, or the compiler would leave the work out.
  for (const float result : results)
    if (result == 12345.0f) return 0;
  return passed.count();
}

}  // namespace

extern "C" {

int dynaconv_has_bfloat16() { return has_bfloat16(); }

// Multiply-adds a second of `threads` cores, in float32 or in bfloat16 with float32 sums; 0 where it cannot.
double dynaconv_peak_macs(int bfloat16, int threads, int64_t rounds) {
  MultiplyAdd work = multiply_add_plain;
  int lanes = kLanesOf<float4>;
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx2) work = multiply_add_avx2, lanes = kLanesOf<float8>;
  if (best_isa_level() == Isa::kAvx512) work = multiply_add_avx512, lanes = kLanesOf<float16>;
  if (bfloat16 && has_bfloat16()) work = multiply_add_bfloat16, lanes = 2 * kLanesOf<float16>;
#endif
  if (bfloat16 && !has_bfloat16()) return 0;
  float from[kSums * kLanesOf<float16>];
  for (float& value : from) value = 1.0f / static_cast<float>(1 + (&value - from));
  const double seconds = seconds_of(threads, [&](int) { return work(from, rounds); });
  return static_cast<double>(rounds) * kSums * lanes * threads / seconds;
}

// Bytes a second that `threads` cores read from `data` together, each its own part, front to back, `repeats` times.
double dynaconv_peak_read(const float* data, int64_t count, int threads, int64_t repeats) {
  Read work = read_plain;
#ifdef DYNACONV_X86
  if (best_isa_level() == Isa::kAvx2) work = read_avx2;
  if (best_isa_level() == Isa::kAvx512) work = read_avx512;
#endif
  const int64_t part = count / threads;
  const double seconds = seconds_of(threads, [=](int t) {
    float sum = 0;
    for (int64_t i = 0; i < repeats; ++i) sum += work(data + t * part, part);
    return sum;
  });
  return static_cast<double>(part) * threads * sizeof(float) * repeats / seconds;
}
}
