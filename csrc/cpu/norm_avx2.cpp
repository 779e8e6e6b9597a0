#include "depthwise.h"
#include "group_norm.h"
#include "group_norm_grad.h"
#include "norm_table.h"

namespace taps_fast::cpu {

const NormKernels& norm_kernels_avx2() {
  static constexpr NormKernels table = {"avx2",     pointwise,       group_sums, norm_tables,
                                        group_norm, group_norm_grad, depthwise};
  return table;
}

}  // namespace taps_fast::cpu
