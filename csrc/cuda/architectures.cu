#include "architectures.h"
#include "runtime.h"

#ifdef TAPS_FAST_EMULATED

namespace taps_fast::cuda {

bool serves(int) { return emulator::settings.served; }

}  // namespace taps_fast::cuda

#elif defined(__CUDA_ARCH_LIST__)  // nvcc's

#include <cstdlib>

#define TEXT_OF_VALUE(...) #__VA_ARGS__
#define TEXT_OF(...) TEXT_OF_VALUE(__VA_ARGS__)

namespace taps_fast::cuda {
namespace {

bool is_compiled_for(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const char* next = architectures();
  while (*next) {
    char* end;
    const long chip = std::strtol(next, &end, 10) / 10;
    if (chip / 10 == major && chip % 10 <= minor) return true;
    next = *end ? end + 1 : end;
  }
  return false;
}

}  // namespace

const char* architectures() { return TEXT_OF(__CUDA_ARCH_LIST__); }

bool serves(int device) {
  enum : signed char { kUnknown, kYes, kNo };
  static std::atomic<signed char> known[64];
  std::atomic<signed char>& answer = known[device & 63];
  if (answer.load(std::memory_order_relaxed) == kUnknown) answer = is_compiled_for(device) ? kYes : kNo;
  return answer.load(std::memory_order_relaxed) == kYes;
}

}  // namespace taps_fast::cuda

#endif
