// Compiler vectors of each instruction set's width: the same template source serves AVX-512, AVX2 and everything else.

#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define DYNACONV_X86 1
#endif

// A template is compiled for the instruction set of the function that it is inlined into, so it must be inlined. A file whose
// functions all have one target may name it before: Clang does not hand vectors from one target to another.
#ifndef DYNACONV_INLINE_TARGET
#define DYNACONV_INLINE_TARGET
#endif
#define DYNACONV_INLINE static inline __attribute__((always_inline)) DYNACONV_INLINE_TARGET
#define DYNACONV_INLINE_MEMBER inline __attribute__((always_inline)) DYNACONV_INLINE_TARGET

typedef float float4 __attribute__((vector_size(16)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float16 __attribute__((vector_size(64)));

// The upper half of a float; bfloat16.h computes with it.
struct Bfloat16 {
  uint16_t bits;
};

template <typename Vector>
constexpr int kLanesOf = sizeof(Vector) / sizeof(float);

// memcpy is how an unaligned vector is read and written without breaking the language's rules; it compiles to one move.
template <typename Vector>
DYNACONV_INLINE Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename Vector>
DYNACONV_INLINE void store(float* to, const Vector& value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// The sum makes GCC broadcast once; of `value - Vector{}` and of a loop over lanes it makes one insertion for each lane.
template <typename Vector>
DYNACONV_INLINE Vector broadcast(float value) {
  return Vector{} + value;
}

// Keeps a loaded value in a register: GCC would load it again for every use.
template <typename Vector>
DYNACONV_INLINE void hold(Vector& value) {
#if defined(DYNACONV_X86) && defined(__GNUC__) && !defined(__clang__)
  if constexpr (sizeof(Vector) == 64)
    asm("" : "+v"(value));
  else
    asm("" : "+x"(value));
#else
  static_cast<void>(value);
#endif
}

// Keeps a pointer that walks from being rewritten as many pointers that stand still and do not fit the registers.
template <typename T>
DYNACONV_INLINE void hold(const T*& pointer) {
#ifdef __GNUC__
  asm("" : "+r"(pointer));
#endif
}

// The bias in every row of a tile.
template <typename Vector, int Rows, int Columns>
DYNACONV_INLINE void start_sums(const float* bias, Vector (&sums)[Rows][Columns]) {
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) {
    const Vector start = load<Vector>(bias + c * kLanesOf<Vector>);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sums[r][c] = start;
  }
}

// The upper half of a vector added to the lower one.
DYNACONV_INLINE float4 folded(float8 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
DYNACONV_INLINE float8 folded(float16 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The sum of all lanes.
DYNACONV_INLINE float total(float4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }
DYNACONV_INLINE float total(float8 v) { return total(folded(v)); }
DYNACONV_INLINE float total(float16 v) { return total(folded(v)); }
