#pragma once

namespace taps_fast::cuda {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat64: return "float64";
  }
  return "";
}

}  // namespace taps_fast::cuda
