// For which chips the kernels were compiled, so that the extension can decline others.
#pragma once

namespace taps_fast::cuda {

/// As in "800,900".
const char* architectures();

/// Whether the chip of a device is one of them, or a later one of the same generation.
bool serves(int device);

}  // namespace taps_fast::cuda
