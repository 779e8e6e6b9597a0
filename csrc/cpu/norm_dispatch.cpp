// The norms' table that goes with the kernels that were chosen.
#include <string>

#include "kernels.h"
#include "norm.h"

namespace taps_fast::cpu {

const NormKernels& norm_kernels() {
#if defined(__x86_64__)
  const std::string isa = kernels().name;
  if (isa == norm_kernels_avx512().name) return norm_kernels_avx512();
  if (isa == norm_kernels_avx2().name) return norm_kernels_avx2();
#endif
  return norm_kernels_generic();
}

}  // namespace taps_fast::cpu
