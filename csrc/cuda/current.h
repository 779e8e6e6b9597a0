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

/// Makes a tensor's device the current one for as long as this lives.
class Current {
 public:
  explicit Current(const torch::stable::Tensor& on) : guard_(on.get_device_index()) {
    // Looked up when needed: linked to it, the extension would not load into a PyTorch without CUDA, nor be tested
    // there.
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    check(get, "taps_fast: this PyTorch has no CUDA stream");
    TORCH_ERROR_CODE_CHECK(get(on.get_device_index(), &stream));
  }
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace taps_fast::cuda

#endif
