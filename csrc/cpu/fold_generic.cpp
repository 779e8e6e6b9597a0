#include "fold.h"

namespace taps_fast::cpu {

const FoldKernels& fold_generic() {
  static constexpr FoldKernels table = make_fold_table("generic");
  return table;
}

}  // namespace taps_fast::cpu
