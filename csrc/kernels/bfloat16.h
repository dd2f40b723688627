// bfloat16 in AVX-512 registers: read as float32 by a shift, written rounded to the nearest, ties to even.

#pragma once

#include <cstdint>

#include "activations.h"
#include "isa.h"
#include "vectors.h"

DYNACONV_INLINE float widened(Bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

DYNACONV_INLINE Bfloat16 narrowed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  // What is not a number stays that, though its low bits are lost.
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#ifdef DYNACONV_X86
#include <immintrin.h>

#define DYNACONV_BF16_INLINE static inline __attribute__((always_inline)) DYNACONV_TARGET_AVX512_BF16

typedef uint16_t short8 __attribute__((vector_size(16)));
typedef uint16_t short16 __attribute__((vector_size(32)));
typedef uint32_t word8 __attribute__((vector_size(32)));
typedef uint32_t word16 __attribute__((vector_size(64)));

// One instruction, which GCC lets a template name that is compiled for another target in the end.
#ifdef DYNACONV_ONE_INSTRUCTION
typedef int16_t Shorts8 __attribute__((vector_size(16)));
typedef int16_t Shorts16 __attribute__((vector_size(32)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
DYNACONV_INLINE float16 widen(short16 values) {
  return (float16)((word16)__builtin_ia32_pmovzxwd512_mask((Shorts16)values, Ints16{}, 0xffff) << 16);
}
DYNACONV_INLINE float8 widen(short8 values) { return (float8)((word8)__builtin_ia32_pmovzxwd256((Shorts8)values) << 16); }
DYNACONV_INLINE short16 narrow(float16 values) { return (short16)__builtin_ia32_cvtneps2bf16_v16sf(values); }
DYNACONV_INLINE short8 narrow(float8 values) { return (short8)__builtin_ia32_cvtneps2bf16_v8sf(values); }
#else
DYNACONV_INLINE float16 widen(short16 values) { return (float16)(__builtin_convertvector(values, word16) << 16); }
DYNACONV_INLINE float8 widen(short8 values) { return (float8)(__builtin_convertvector(values, word8) << 16); }
DYNACONV_INLINE short16 narrow(float16 values) {
  const word16 bits = (word16)values, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(values == values ? rounded : bits >> 16 | 0x40, short16);
}
DYNACONV_INLINE short8 narrow(float8 values) {
  const word8 bits = (word8)values, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(values == values ? rounded : bits >> 16 | 0x40, short8);
}
#endif

// As many lanes as float vectors of type `Vector` have.
template <typename Vector>
DYNACONV_INLINE Vector load(const Bfloat16* from) {
  decltype(narrow(Vector{})) values;
  __builtin_memcpy(&values, from, sizeof(values));
  return widen(values);
}

template <typename Vector>
DYNACONV_INLINE void store(Bfloat16* to, const Vector& values) {
  const auto bits = narrow(values);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// The lowest `count` of 16 lanes. Memory of the others is not touched, and they are read as 0.
DYNACONV_BF16_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

DYNACONV_BF16_INLINE float16 load(const Bfloat16* from, __mmask16 lanes) {
  return widen((short16)_mm256_maskz_loadu_epi16(lanes, from));
}
DYNACONV_BF16_INLINE void store(Bfloat16* to, float16 values, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)narrow(values));
}

// sum[i] + left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1].
DYNACONV_BF16_INLINE float16 dot_pairs(float16 sum, word16 left, word16 right) {
  return (float16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
DYNACONV_BF16_INLINE float8 dot_pairs(float8 sum, word8 left, word8 right) {
  return (float8)_mm256_dpbf16_ps((__m256)sum, (__m256bh)left, (__m256bh)right);
}
#endif
