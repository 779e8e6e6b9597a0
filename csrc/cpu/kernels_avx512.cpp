#include "kernel_table.h"

namespace taps_fast::cpu {

const Kernels& kernels_avx512() {
  static constexpr Kernels table = make_table("avx512");
  return table;
}

}  // namespace taps_fast::cpu
