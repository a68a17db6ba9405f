// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace onepass {

enum class Isa : int { baseline, avx2, avx512 };

constexpr const char* isa_names[] = {"baseline", "avx2", "avx512"};

#if defined(__x86_64__)
// __builtin_cpu_supports knows this one in newer compilers only.
inline bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// The best that this machine runs; found once.
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c() ? Isa::avx2 : Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

// The best one, or a lower one named by the environment variable ONEPASS_ISA, which is read at every call.
inline Isa active_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("ONEPASS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string known;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, isa_names[i]) == 0) return static_cast<Isa>(i);
    known += std::string(i > 0 ? ", " : "") + isa_names[i];
  }
  throw std::invalid_argument("onepass: ONEPASS_ISA must be one of what this machine runs, " + known + "; got '" + wanted + "'");
}

}  // namespace onepass
