// How a tensor lies in memory, for the CPU and the CUDA extension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace taps_fast {

/// Whether t holds its elements in the order [N, …, C].
inline bool channels_last(const torch::stable::Tensor& t) {
  int64_t expected = 1;
  const auto fits = [&](int64_t axis) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t axis = t.dim() - 1; axis > 1; axis--)
    if (!fits(axis)) return false;
  return fits(0);
}

}  // namespace taps_fast
