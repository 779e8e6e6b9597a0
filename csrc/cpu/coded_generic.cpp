#include "coded.h"

namespace taps_fast::cpu {

const CodedKernels& coded_generic() {
  static constexpr CodedKernels table = make_coded_table();
  return table;
}

}  // namespace taps_fast::cpu
