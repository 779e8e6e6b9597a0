// The gradients of one weight, base_coeffs[0] · base + Σ_k coeffs[k] · deltas[k], by PyTorch's products of many rows in
// float32, where those are faster than ours. They need no memory beyond the results: the weight is summed for dx where
// the first gradient of a weight will lie, and P = dyᵀ x takes its place.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace taps_fast {

struct OneWeight {
  const torch::stable::Tensor& base;
  const std::vector<torch::stable::Tensor>& deltas;
  const torch::stable::Tensor& coeffs;
  const std::optional<torch::stable::Tensor>& base_coeffs;
};

/// Whether they can take these, which are unchecked so far.
bool vendor_takes(const OneWeight& weight, const torch::stable::Tensor& dy, const torch::stable::Tensor& x);

/// Whether they are faster with so many rows.
bool vendor_pays(int64_t rows);

/// Null where not asked for; a gradient for each of `ddeltas_for`, or that of the base, always is. `pairs` as in
/// linear_dw. Arguments that linear_dw would not take are errors there, which runs first.
void vendor_gradients(const OneWeight& weight, const torch::stable::Tensor& dy, const torch::stable::Tensor& x,
                      const std::vector<int64_t>& pairs, const std::vector<int64_t>& ddeltas_for,
                      torch::stable::Tensor* dx, torch::stable::Tensor* dcoeffs,
                      std::vector<torch::stable::Tensor>& ddeltas, torch::stable::Tensor* dbase);

}  // namespace taps_fast
