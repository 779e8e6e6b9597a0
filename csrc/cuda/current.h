// Where a launch goes: the tensors' device, and the stream that PyTorch would use there now.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef TAPS_FAST_EMULATED

namespace taps_fast::cuda {

struct Current {
  explicit Current(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};

}  // namespace taps_fast::cuda

#else

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/check.h"

namespace taps_fast::cuda {

/// A function of PyTorch's CUDA library, or null. Looked up when needed: linked to that library, the extension would
/// not load into a PyTorch without CUDA, nor be tested there. Python loads it where only a handle finds its symbols.
inline void* of_torch_cuda(const char* name) {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(library ? library : RTLD_DEFAULT, name);
}

/// Makes a tensor's device the current one for as long as this lives.
class Current {
 public:
  explicit Current(const torch::stable::Tensor& on) : guard_(on.get_device_index()) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = reinterpret_cast<Get>(of_torch_cuda("aoti_torch_get_current_cuda_stream"));
    check(get, "taps_fast: no function for the current stream in PyTorch's libtorch_cuda.so");
    TORCH_ERROR_CODE_CHECK(get(on.get_device_index(), &stream));
  }
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace taps_fast::cuda

#endif
