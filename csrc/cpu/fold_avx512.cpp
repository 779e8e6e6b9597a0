#include "fold.h"

namespace taps_fast::cpu {

const FoldKernels& fold_avx512() {
  static constexpr FoldKernels table = make_fold_table("avx512");
  return table;
}

}  // namespace taps_fast::cpu
