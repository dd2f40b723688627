// Which instruction sets kernels are built for, and which one this processor gets.

#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define DYNACONV_X86 1
#define DYNACONV_TARGET_AVX2 __attribute__((target("avx2,fma,prfchw")))
#define DYNACONV_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prfchw")))
#define DYNACONV_TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prfchw")))
#endif

enum class Isa { kPlain = 0, kAvx2, kAvx512 };

// The best that the processor has; DYNACONV_ISA=plain or avx2 asks for less, for tests.
Isa best_isa_level();
// Whether the processor multiplies bfloat16 (AVX512_BF16) and AVX-512 was not asked away.
bool has_bfloat16();
const char* best_isa();
