#include "fold.h"

namespace taps_fast::cpu {

const FoldKernels& fold_avx2() {
  static constexpr FoldKernels table = make_fold_table("avx2");
  return table;
}

}  // namespace taps_fast::cpu
