// The call of an operator on rows with channels: what it was given, checked, as norm.h describes it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <optional>
#include <vector>

#include "checks.h"
#include "common/layout.h"
#include "cpu/norm.h"

namespace taps_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What every operator here is given, checked, with copies of what is not dense kept alive.
class NormCall {
 public:
  NormCall(const char* op, const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
           const OptionalTensor& offsets, int64_t inner)
      : op_(op), x_(x) {
    check(x.dim() >= 2, op, ": x must have at least 2 dimensions, got ", x.dim());
    rows.dtype = dtype_of(op, x.scalar_type());
    last_ = !x.is_contiguous() && channels_last(x);
    dense_ = last_ || x.is_contiguous();
    int64_t pixels = 1;
    for (int64_t axis = 2; axis < x.dim(); axis++) pixels *= x.size(axis);
    rows.channels = x.size(1);
    rows.rows = last_ ? x.size(0) * pixels : x.size(0);
    rows.pixels = last_ ? 1 : pixels;
    cpu::Membership& m = rows.member;
    check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
          ": ids, order and offsets must come together");
    m = {nullptr, nullptr, nullptr, 0, 0, 1};
    if (!ids) return;
    m.batch = ids->numel();
    m.tasks = offsets->numel() - 2;
    check(m.tasks >= 0, op, ": offsets must have at least 2 elements, got ", offsets->numel());
    m.inner = last_ ? inner * pixels : inner;
    m.ids = integers("ids", *ids, m.batch);
    m.order = integers("order", *order, m.batch);
    m.offsets = integers("offsets", *offsets, m.tasks + 2);
    check_groups(op, x.size(0), inner, m.batch, m.tasks, m.order, m.offsets);
    for (int64_t b = 0; b < m.batch; b++)
      check(-1 <= m.ids[b] && m.ids[b] < m.tasks, op, ": ids must be in [-1, ", m.tasks, "), got ", m.ids[b]);
  }

  /// A result like x, in its layout where that is dense.
  Tensor like_x() const { return dense_ ? torch::stable::empty_like(x_) : new_tensor(x_.scalar_type(), x_.sizes()); }

  /// The elements of x or of a gradient, in the order that `rows` describes.
  const void* elements(const char* name, const Tensor& t) {
    check(t.dim() == x_.dim() && t.scalar_type() == x_.scalar_type(), op_, ": ", name, " must be like x");
    for (int64_t axis = 0; axis < t.dim(); axis++)
      check(t.size(axis) == x_.size(axis), op_, ": ", name, " must have x's shape, got ", t.size(axis), " for ",
            x_.size(axis), " along axis ", axis);
    if (last_ ? channels_last(t) : t.is_contiguous()) return t.const_data_ptr();
    Tensor dense = last_ ? torch::stable::empty_like(x_) : new_tensor(t.scalar_type(), t.sizes());
    kept_.push_back(torch::stable::copy_(dense, t));
    return kept_.back().const_data_ptr();
  }

  /// A table; `fill` stands in for one that is absent.
  cpu::Matrix table(const char* name, const OptionalTensor& t, std::optional<double> fill) {
    if (!t) {
      if (!fill) return {nullptr, 0};
      Tensor row = new_tensor(wide(), {rows.channels});
      kept_.push_back(torch::stable::fill_(row, *fill));
      return {kept_.back().const_data_ptr(), 0};
    }
    const int64_t count = rows.member.offsets && t->dim() == 2 ? rows.member.tasks + 1 : 1;
    check(t->scalar_type() == wide() && t->numel() == count * rows.channels, op_, ": ", name, " must have ", count,
          " x ", rows.channels, " elements of scalar type ", int(wide()), ", got ", t->numel(), " of ",
          int(t->scalar_type()));
    if (t->is_contiguous()) return {t->const_data_ptr(), count > 1 ? rows.channels : 0};
    kept_.push_back(torch::stable::contiguous(*t));
    return {kept_.back().const_data_ptr(), count > 1 ? rows.channels : 0};
  }

  /// What the module of each task, and last the base's, holds: a vector of channels for each row of a table, or
  /// nothing.
  std::vector<const void*> vectors(const char* name, const std::vector<Tensor>& given) {
    const int64_t count = rows.member.offsets ? rows.member.tasks + 1 : 1;
    check(given.empty() || int64_t(given.size()) == count, op_, ": ", name, " must be ", count,
          " tensors or none, got ", given.size());
    std::vector<const void*> found;
    found.reserve(given.size());
    for (const Tensor& t : given) {
      check(t.numel() == rows.channels, op_, ": ", name, " must have ", rows.channels, " elements, got ", t.numel());
      found.push_back(widened(t));
    }
    return found;
  }

  /// Writes a vector of channels over a row of a table.
  void copy_vector(const char* name, const Tensor& given, Tensor& table, int64_t row) {
    check(given.numel() == rows.channels, op_, ": ", name, " must have ", rows.channels, " elements, got ",
          given.numel());
    const Tensor ready = torch::stable::contiguous(torch::stable::to(given, wide()));
    const int64_t bytes = rows.channels * cpu::compute_size(rows.dtype);
    if (bytes) std::memcpy(static_cast<char*>(table.mutable_data_ptr()) + row * bytes, ready.const_data_ptr(), bytes);
  }

  cpu::Rows rows;
  bool dense() const { return dense_; }
  bool is_channels_last() const { return last_; }
  bool is_empty() const { return rows.rows * rows.channels * rows.pixels == 0; }
  /// The type that results are computed in, and tables have.
  ScalarType wide() const { return rows.dtype == cpu::DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

 private:
  const int64_t* integers(const char* name, const Tensor& t, int64_t size) {
    check(t.numel() == size && t.scalar_type() == ScalarType::Long, op_, ": ", name, " must be ", size, " int64, got ",
          t.numel());
    if (!t.is_contiguous()) kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const int64_t*>((t.is_contiguous() ? t : kept_.back()).const_data_ptr());
  }

  /// The elements of t in the compute type. Those of 16 bits are read here: many small calls would cost more.
  const void* widened(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    const bool dense = t.is_contiguous();
    if (dense && type == wide()) return t.const_data_ptr();
    if (dense && wide() == ScalarType::Float && type == ScalarType::BFloat16)
      return widened_from<torch::headeronly::BFloat16>(t);
    if (dense && wide() == ScalarType::Float && type == ScalarType::Half)
      return widened_from<torch::headeronly::Half>(t);
    kept_.push_back(torch::stable::contiguous(torch::stable::to(t, wide())));
    return kept_.back().const_data_ptr();
  }

  template <class T>
  const void* widened_from(const Tensor& t) {
    const T* from = static_cast<const T*>(t.const_data_ptr());
    widened_.emplace_back(from, from + t.numel());
    return widened_.back().data();
  }

  const char* op_;
  const Tensor& x_;
  bool last_, dense_;
  std::vector<Tensor> kept_;
  std::vector<std::vector<float>> widened_;
};

}  // namespace taps_fast
