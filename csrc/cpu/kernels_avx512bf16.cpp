#include "kernel_table.h"

namespace taps_fast::cpu {

const Kernels& kernels_avx512bf16() {
  static constexpr Kernels table = make_table("avx512bf16");
  return table;
}

}  // namespace taps_fast::cpu
