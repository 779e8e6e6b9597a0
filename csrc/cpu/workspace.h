// Scratch memory of the calling thread.
#pragma once

#include <cstdint>

namespace taps_fast::cpu {

/// At least `bytes`, aligned to a page, kept by this thread for its next call; throws std::bad_alloc.
void* workspace(int64_t bytes);

}  // namespace taps_fast::cpu
