// What the operators share: reading tensors, with every error a caller can make.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <ostream>
#include <vector>

#include "../common/check.h"
#include "types.h"

namespace taps_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// A tensor's shape, for messages: written when one is, so that a check that holds costs nothing.
struct Shape {
  const Tensor& of;
};

inline Shape shape_of(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.of.dim(); i++) out << (i ? ", " : "") << shape.of.size(i);
  return out << "]";
}

/// A new tensor beside another, by libtorch's function: `torch::stable::new_empty` looks the operator up by name.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype = type ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type)) : 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()),
                                                   type ? &dtype : nullptr, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: break;
  }
  check(false, op, ": x must be float32, bfloat16, float16 or float64, got scalar type ", int(x.scalar_type()));
  return {};
}

inline int to_int(const char* op, const char* name, int64_t size) {
  check(size < std::numeric_limits<int>::max() / 2, op, ": ", name, " must be less than 2^30, got ", size);
  return static_cast<int>(size);
}

/// Tensors as the kernels want them. A copy is made, and kept alive here, only of others; the caching allocator hands
/// its memory out again in stream order.
class Inputs {
 public:
  Inputs(const char* op, const Tensor& like) : op_(op), device_(like.get_device_index()) {}

  /// [rows, cols] whose rows are contiguous, `stride` elements apart.
  const void* matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols, ScalarType dtype, int64_t* stride) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op_, ": ", name, " must have shape [", rows, ", ",
          cols, "], got ", shape_of(t));
    expect(name, t, dtype);
    *stride = t.stride(0);
    if (t.stride(1) == 1 || cols <= 1) return t.const_data_ptr();
    *stride = cols;
    return contiguous(t);
  }

  const void* vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) {
    check(t.numel() == size, op_, ": ", name, " must have ", size, " elements, got ", shape_of(t));
    expect(name, t, dtype);
    return t.is_contiguous() ? t.const_data_ptr() : contiguous(t);
  }

  const int64_t* integers(const char* name, const Tensor& t, int64_t size) {
    return static_cast<const int64_t*>(vector(name, t, size, ScalarType::Long));
  }

  const void* contiguous(const Tensor& t) { return keep(torch::stable::contiguous(t)).const_data_ptr(); }

  const Tensor& keep(const Tensor& t) {
    kept_.push_back(t);
    return kept_.back();
  }

  void expect(const char* name, const Tensor& t, ScalarType dtype) const {
    check(t.scalar_type() == dtype, op_, ": ", name, " must have scalar type ", int(dtype), ", got ",
          int(t.scalar_type()));
    check(t.get_device_index() == device_, op_, ": ", name, " must be on device ", device_, ", got ",
          t.get_device_index());
  }

 private:
  const char* op_;
  int device_;
  std::vector<Tensor> kept_;
};

}  // namespace taps_fast::cuda

// The emulator's kernels take CPU tensors, and may not stand in for the CPU extension's.
#ifdef TAPS_FAST_EMULATED
#define TAPS_FAST_NAMESPACE "taps_fast_emulated"
#define TAPS_FAST_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(taps_fast_emulated, CPU, m)
#else
#define TAPS_FAST_NAMESPACE "taps_fast"
#define TAPS_FAST_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(taps_fast, CUDA, m)
#endif
