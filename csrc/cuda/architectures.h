// For which chips the kernels were compiled, so that the extension can decline others.
#pragma once

namespace taps_fast::cuda {

/// As in "800,900".
const char* architectures();

}  // namespace taps_fast::cuda
