#include "kernel_table.h"

namespace taps_fast::cpu {

const Kernels& kernels_generic() {
  static constexpr Kernels table = make_table("generic");
  return table;
}

}  // namespace taps_fast::cpu
