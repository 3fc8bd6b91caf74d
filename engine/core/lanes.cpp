#include "engine/core/lanes.h"

#include <cpuid.h>

namespace vesper::cpu {
namespace {

// __builtin_cpu_supports also asks whether the system saves the wide registers; clang 14 does not know its "f16c".
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") != 0 && has_f16c();
  return has;
}

}  // namespace vesper::cpu
