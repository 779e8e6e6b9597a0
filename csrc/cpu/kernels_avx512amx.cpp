#if defined(__AMX_BF16__)
#include "kernel_table.h"

namespace taps_fast::cpu {

const Kernels& kernels_avx512amx() {
  static constexpr Kernels table = make_table("avx512amx");
  return table;
}

const char* amx_refusal() {
  if (!amx::permitted()) return "the system does not permit its use";
  return product_is_right() ? nullptr : "its tiles gave a wrong product when they were tried";
}

}  // namespace taps_fast::cpu
#else
#include "kernels.h"

namespace taps_fast::cpu {

const Kernels& kernels_avx512amx() { return kernels_avx512bf16(); }
const char* amx_refusal() { return "the compiler did not know it"; }

}  // namespace taps_fast::cpu
#endif
