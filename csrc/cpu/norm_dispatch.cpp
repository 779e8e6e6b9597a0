// The norms' table that goes with the kernels that were chosen.
#include "kernels.h"
#include "norm.h"

namespace taps_fast::cpu {

const NormKernels& norm_kernels() {
#if defined(__x86_64__)
  if (kernels().vector_bytes == 64) return norm_kernels_avx512();
  if (kernels().vector_bytes == 32) return norm_kernels_avx2();
#endif
  return norm_kernels_generic();
}

}  // namespace taps_fast::cpu
