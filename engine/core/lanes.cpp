#include "engine/core/lanes.h"

namespace vesper::cpu {

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("f16c") != 0;
  return has;
}

}  // namespace vesper::cpu
