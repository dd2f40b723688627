// The one place that asks the processor what it can do.

#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace {

Isa ask() {
#ifdef DYNACONV_X86
  const char* wish = std::getenv("DYNACONV_ISA");
  const auto allowed = [wish](const char* isa) { return wish == nullptr || *wish == 0 || std::strcmp(wish, isa) == 0; };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

}  // namespace

Isa best_isa_level() {
  static const Isa level = ask();
  return level;
}

bool has_bfloat16() {
#ifdef DYNACONV_X86
  static const bool has = best_isa_level() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

const char* best_isa() {
  switch (best_isa_level()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "plain";
  }
}
