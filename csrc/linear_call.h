// What the linear operators are given, checked and as the kernels want it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <ostream>
#include <vector>

#include "checks.h"
#include "cpu/plan.h"

namespace taps_fast {

using cpu::ceil_div;
using cpu::Coding;
using cpu::Groups;
using cpu::Matrix;
using cpu::Term;
using cpu::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// A tensor's layout, read once: every look at a tensor is a call through the C interface.
struct Layout {
  explicit Layout(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    dtype = t.scalar_type();
  }

  int64_t dim;
  int64_t *sizes, *strides;
  ScalarType dtype;
};

/// Its shape, as error messages print it.
inline std::ostream& operator<<(std::ostream& s, const Layout& t) {
  s << "[";
  for (int64_t i = 0; i < t.dim; i++) s << (i ? ", " : "") << t.sizes[i];
  return s << "]";
}

/// Tensors whose rows the kernels can walk; a copy is made, and kept alive here, only of others.
class Inputs {
 public:
  Inputs(const char* op, ScalarType dtype) : op_(op), dtype_(dtype) {}

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    return matrix(name, t, Layout(t), rows, cols);
  }

  /// `turned`: the transposed matrix, as it lies in memory. Of one that is not read, all but its data is checked.
  Matrix matrix(const char* name, const Tensor& t, const Layout& layout, int64_t rows, int64_t cols,
                bool turned = false, bool read = true) {
    check(layout.dim == 2 && layout.sizes[0] == rows && layout.sizes[1] == cols, op_, ": ", name, " must have shape [",
          rows, ", ", cols, "], got ", layout);
    check(layout.dtype == dtype_, op_, ": ", name, " must have scalar type ", int(dtype_), ", got ", int(layout.dtype));
    if (!read) return {nullptr, 0};
    if (turned) return {t.const_data_ptr(), layout.strides[1]};
    if (layout.strides[1] == 1 || cols <= 1) return {t.const_data_ptr(), layout.strides[0]};
    kept_.push_back(torch::stable::contiguous(t));
    return {kept_.back().const_data_ptr(), cols};
  }

  const void* vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) {
    const Layout layout(t);
    check(t.numel() == size, op_, ": ", name, " must have ", size, " elements, got ", layout);
    check(layout.dtype == dtype, op_, ": ", name, " must have scalar type ", int(dtype), ", got ", int(layout.dtype));
    if (t.is_contiguous()) return t.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  const char* op_;
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

inline Groups read_groups(const char* op, Inputs& inputs, int64_t rows, const Tensor& coeffs, const OptionalTensor& ids,
                          const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
        ": ids, order and offsets must come together");
  Groups groups;
  if (!ids) return groups;
  const Layout table(coeffs);
  check(table.dim == 2, op, ": coeffs must have shape [T, K] with tasks, got ", table);
  groups.tasks = table.sizes[0];
  groups.batch = ids->numel();
  groups.inner = inner;
  groups.order = static_cast<const int64_t*>(inputs.vector("order", *order, groups.batch, ScalarType::Long));
  groups.offsets = static_cast<const int64_t*>(inputs.vector("offsets", *offsets, groups.tasks + 2, ScalarType::Long));
  check_groups(op, rows, inner, groups.batch, groups.tasks, groups.order, groups.offsets);
  return groups;
}

/// What makes deltas of codes numbers, as linear_coded is given it: a scale for each delta, and the tiles of masks.
struct Codes {
  const std::vector<Tensor>&scales, &tiles;
  const std::vector<int64_t>& tile_of;  // -1: no mask

  static bool is_coded(const Tensor& delta, ScalarType dtype) {
    const ScalarType own = delta.scalar_type();
    return own != dtype && (own == ScalarType::Byte || own == ScalarType::Char);
  }

  /// The terms of entry k: one, or as many as a stack holds.
  void add(std::vector<Term>& terms, Inputs& inputs, const Tensor& delta, size_t k, int64_t rows, int64_t cols,
           bool wide) const {
    const char* op = "linear_coded";
    const bool bits = delta.scalar_type() == ScalarType::Byte;
    Term term{{nullptr, 0}, 1.0, bits ? Coding::kSign : Coding::kInt8};
    term.code_stride = bits ? 8 * ceil_div(cols, 64) : cols;
    const Layout codes(delta), scale(scales[k]);
    const int64_t stacked = codes.dim == 3, count = stacked ? codes.sizes[0] : 1, size = rows * term.code_stride;
    check(codes.dim == 2 + stacked && codes.sizes[stacked] == rows && codes.sizes[stacked + 1] == term.code_stride, op,
          ": codes must have shape [", rows, ", ", term.code_stride, "], or one more axis in front, got ", codes);
    check(scale.dim == stacked || scale.dim == stacked + 1, op, ": scales must be one number or ", rows,
          " a delta, got ", scale);
    term.scale_step = scale.dim > stacked;
    const int64_t scale_size = term.scale_step ? rows : 1;
    const auto* code = static_cast<const uint8_t*>(inputs.vector("codes", delta, count * size, codes.dtype));
    const auto* scale_data = static_cast<const char*>(
        inputs.vector("scales", scales[k], count * scale_size, wide ? ScalarType::Double : ScalarType::Float));
    if (tile_of[k] >= 0) {
      check(bits && tile_of[k] < int64_t(tiles.size()), op, ": tile_of must be below ", tiles.size(),
            " and name a tile for bits alone, got ", tile_of[k]);
      term.coding = Coding::kMask;
      term.matrix = inputs.matrix("tiles", tiles[tile_of[k]], rows, cols);
    }
    for (int64_t n = 0; n < count; n++) {
      term.codes = code + n * size;
      term.scale = scale_data + n * scale_size * (wide ? sizeof(double) : sizeof(float));
      terms.push_back(term);
    }
  }
};

/// Whether all weights are views of transposed matrices, as where a network stores them as [I, O].
inline bool are_turned(const Layout& base, const std::vector<Tensor>& deltas) {
  const auto turned = [](const Layout& t) {
    return t.dim == 2 && t.strides[0] == 1 && t.strides[1] >= t.sizes[0] && t.sizes[0] > 1 && t.sizes[1] > 1;
  };
  return turned(base) &&
         std::all_of(deltas.begin(), deltas.end(), [&](const Tensor& delta) { return turned(Layout(delta)); });
}

/// `read`: whether the matrix of delta k, or with -1 the base's, is of use.
template <class Read>
Weight read_weight(Inputs& inputs, const Tensor& base, const Layout& layout, const std::vector<Tensor>& deltas,
                   const Tensor& coeffs, const OptionalTensor& base_coeffs, int64_t tasks, const Codes* codes,
                   bool turned, const Read& read) {
  const int64_t rows = layout.sizes[0], cols = layout.sizes[1];
  Weight weight;
  weight.base = inputs.matrix("base", base, layout, rows, cols, turned, read(-1));
  weight.deltas.reserve(deltas.size());
  weight.wide = layout.dtype == ScalarType::Double;
  for (size_t k = 0; k < deltas.size(); k++) {
    if (codes && codes->is_coded(deltas[k], layout.dtype))
      codes->add(weight.deltas, inputs, deltas[k], k, rows, cols, weight.wide);
    else
      weight.deltas.push_back(
          {inputs.matrix("deltas", deltas[k], Layout(deltas[k]), rows, cols, turned, read(k)), 1.0});
  }
  const ScalarType dtype = weight.wide ? ScalarType::Double : ScalarType::Float;
  weight.coeffs = inputs.vector("coeffs", coeffs, tasks * weight.deltas.size(), dtype);
  weight.base_coeffs = base_coeffs ? inputs.vector("base_coeffs", *base_coeffs, tasks, dtype) : nullptr;
  return weight;
}

}  // namespace taps_fast
