#include "kernel_table.h"

namespace taps_fast::cpu {

const Kernels& kernels_avx2() {
  static constexpr Kernels table = make_table("avx2");
  return table;
}

}  // namespace taps_fast::cpu
