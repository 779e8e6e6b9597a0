#include "architectures.h"

#ifdef __CUDA_ARCH_LIST__  // nvcc's; the emulator has no chips
#define TEXT_OF_VALUE(...) #__VA_ARGS__
#define TEXT_OF(...) TEXT_OF_VALUE(__VA_ARGS__)

namespace taps_fast::cuda {

const char* architectures() { return TEXT_OF(__CUDA_ARCH_LIST__); }

}  // namespace taps_fast::cuda

#endif
