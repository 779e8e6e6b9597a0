// What the operators on convolutions are given, as groups of images that share one weight: each weight is summed into
// memory that the next one writes over, and PyTorch's convolutions run its images. They do in one call what
// taps_fast/_aten.py does in many, which is a good part of a small layer's time; that file runs what is left here, as
// their overloads "uncompiled". (No operator with a str is called: in PyTorch 2.10 to 2.13 each such call loses 48
// bytes.)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "checks.h"
#include "common/layout.h"
#include "fold.h"

// What PyTorch's last error says; PyTorch 2.13 and newer have it.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace taps_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

/// The arguments that all of them have.
struct Conv2d {
  const char* op;
  const Tensor &x, &base;
  const Tensors& deltas;
  const Tensor& coeffs;
  const OptionalTensor& base_coeffs;
  const Integers &stride, &padding, &dilation;
  int64_t groups;
  const OptionalTensor &ids, &order, &offsets;
  int64_t inner;

  bool depthwise() const { return base.size(1) == 1 && groups > 1; }
  /// Of sums and coefficients.
  ScalarType wide() const { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }
};

/// What a function of PyTorch's returned.
inline void check_call_of(const char* op, AOTITorchError error) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const auto what = torch_exception_get_what_without_backtrace;
  if (what) check(false, what());
  check(false, op, ": PyTorch's convolution failed, and has printed why");
}

/// Images of one task, ascending.
struct Part {
  int64_t task;  // -1: the base
  std::vector<int64_t> images;
};

/// Images that share one weight, scale · base + Σ coeff · deltas[k].
struct Group {
  double scale = 1;
  std::vector<int64_t> used;
  std::vector<double> coeffs;  // of those
  std::vector<Part> parts;
  std::vector<int64_t> images;  // of all parts, ascending
};

/// The weight of task `task` (-1: the base), without images.
inline Group weight_of(const Conv2d& c, int64_t task) {
  Group group;
  if (task < 0) return group;
  if (c.base_coeffs) group.scale = number(*c.base_coeffs, task);
  const int64_t num_deltas = c.deltas.size();
  for (int64_t k = 0; k < num_deltas; k++) {
    const double coeff = number(c.coeffs, task * num_deltas + k);
    if (coeff == 0) continue;
    group.used.push_back(k);
    group.coeffs.push_back(coeff);
  }
  return group;
}

/// What upstream promises of numbers that are read here by their pointers.
inline void check_call(const Conv2d& c) {
  const ScalarType type = c.x.scalar_type();
  check(c.x.dim() == 4 && c.base.dim() == 4, c.op, ": x and base must have 4 dimensions, got ", c.x.dim(), " and ",
        c.base.dim());
  check(c.ids.has_value() == c.order.has_value() && c.ids.has_value() == c.offsets.has_value(), c.op,
        ": ids, order and offsets must come together");
  const int64_t tasks = c.ids ? c.offsets->numel() - 2 : 1, num_deltas = c.deltas.size();
  const auto numbers = [&](const char* name, const Tensor& t, int64_t size, ScalarType wanted) {
    check(t.numel() == size && t.scalar_type() == wanted, c.op, ": ", name, " must have ", size,
          " elements of scalar type ", int(wanted), ", got ", t.numel(), " of ", int(t.scalar_type()));
  };
  numbers("base", c.base, c.base.numel(), type);
  for (const Tensor& delta : c.deltas) numbers("deltas", delta, c.base.numel(), type);
  numbers("coeffs", c.coeffs, tasks * num_deltas, c.wide());
  if (c.base_coeffs) numbers("base_coeffs", *c.base_coeffs, tasks, c.wide());
  check(c.coeffs.is_contiguous() && (!c.base_coeffs || c.base_coeffs->is_contiguous()), c.op,
        ": coeffs and base_coeffs must be contiguous");
  if (!c.ids) return;
  const int64_t batch = c.order->numel();
  numbers("order", *c.order, batch, ScalarType::Long);
  numbers("offsets", *c.offsets, tasks + 2, ScalarType::Long);
  check(tasks >= 0 && c.order->is_contiguous() && c.offsets->is_contiguous(), c.op,
        ": order and offsets must be contiguous");
  check(c.x.size(0) == batch * c.inner, c.op, ": x must have batch times inner images, got ", c.x.size(0), " (batch ",
        batch, ", inner ", c.inner, ")");
  check_groups(c.op, c.x.size(0), c.inner, batch, tasks, static_cast<const int64_t*>(c.order->const_data_ptr()),
               static_cast<const int64_t*>(c.offsets->const_data_ptr()));
}

/// A group for each distinct weight, and never none at all. Without tasks the images are not listed.
inline std::vector<Group> groups_of(const Conv2d& c) {
  std::vector<Group> found;
  const auto add = [&](int64_t task) -> Part& {
    found.push_back(weight_of(c, task));
    return found.back().parts.emplace_back(Part{task, {}});
  };
  if (!c.ids) {
    add(0);
    return found;
  }
  const auto *order = static_cast<const int64_t*>(c.order->const_data_ptr()),
             *offsets = static_cast<const int64_t*>(c.offsets->const_data_ptr());
  const int64_t tasks = c.offsets->numel() - 2;
  std::map<std::vector<int64_t>, size_t> places;  // by bits, so that a NaN is like itself
  for (int64_t task = -1; task < tasks; task++) {
    const int64_t begin = offsets[task + 1], end = offsets[task + 2];
    if (begin == end) continue;
    Group group = weight_of(c, task);
    std::vector<int64_t> key{std::bit_cast<int64_t>(group.scale + 0.0)};
    for (size_t i = 0; i < group.used.size(); i++) {
      key.push_back(group.used[i]);
      key.push_back(std::bit_cast<int64_t>(group.coeffs[i]));
    }
    const auto [place, is_new] = places.try_emplace(key, found.size());
    if (is_new) found.push_back(std::move(group));
    Part part{task, {}};
    for (int64_t i = begin; i < end; i++)
      for (int64_t r = 0; r < c.inner; r++) part.images.push_back(order[i] * c.inner + r);
    std::sort(part.images.begin(), part.images.end());
    found[place->second].parts.push_back(std::move(part));
  }
  for (Group& group : found) {
    for (const Part& part : group.parts)
      group.images.insert(group.images.end(), part.images.begin(), part.images.end());
    std::sort(group.images.begin(), group.images.end());
  }
  if (found.empty()) add(-1);
  return found;
}

/// A thread's memory for a weight, as large as its largest: fresh pages cost as much as the sum.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  void* at_least(const char* op, size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(kAlignment, cpu::round_up(bytes, kAlignment));
      check(data_, op, ": out of memory for a weight of ", bytes, " bytes");
      size_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// Whether t holds its elements without gaps, contiguous or channels last.
inline bool is_dense(const Tensor& t) { return t.is_contiguous() || channels_last(t); }

/// Whether t holds its elements without gaps, in the order of memory that `like` has.
inline bool lies_as(const Tensor& t, const Tensor& like) {
  if (like.is_contiguous()) return t.is_contiguous();
  return channels_last(like) && channels_last(t);
}

/// The weight if it is one tensor as it is: the base, or a baked delta.
inline const Tensor* stored(const Conv2d& c, const Group& group) {
  if (group.scale == 1 && group.used.empty()) return &c.base;
  if (group.scale == 0 && group.used.size() == 1 && group.coeffs[0] == 1) return &c.deltas[group.used[0]];
  return nullptr;
}

/// Whether `weight` can make the group's weight; one that is stored needs no sum.
inline bool has_weight(const Conv2d& c, const Group& group) {
  if (stored(c, group)) return true;
  for (const int64_t k : group.used)
    if (!lies_as(c.deltas[k], c.base)) return false;
  return is_dense(c.base);
}

/// scale · base + Σ coeff · delta in the coefficients' type, rounded once; valid until this thread's next one.
inline Tensor weight(const Conv2d& c, const Group& group) {
  if (const Tensor* as_it_is = stored(c, group)) return *as_it_is;
  thread_local Scratch scratch;
  std::vector<const void*> terms;
  for (const int64_t k : group.used) terms.push_back(c.deltas[k].const_data_ptr());
  const cpu::DType dtype = dtype_of(c.op, c.base.scalar_type(), "base");
  void* out = scratch.at_least(c.op, c.base.numel() * cpu::element_size(dtype));
  fold_one(dtype, c.base.numel(), c.base.const_data_ptr(), group.scale, terms, group.coeffs, out);
  return torch::stable::from_blob(out, c.base.sizes(), c.base.strides(), c.base.device(), c.base.scalar_type());
}

/// How a batch of images lies, each of them one piece of memory.
struct Images {
  char* data;
  int64_t bytes;  // of one

  Images(const Tensor& t, int64_t count)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), bytes(count ? t.numel() / count : 0) {
    bytes *= cpu::element_size(dtype_of("conv2d", t.scalar_type()));
  }
};

/// Copies images, as many as there are places.
template <class Copy>
void copy_images(int64_t count, int64_t bytes, const Copy& copy) {
  constexpr int64_t kWorthAThread = 1 << 16;
  const int64_t grain = std::max<int64_t>(kWorthAThread / std::max<int64_t>(bytes, 1), 1);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) copy(i);
  });
}

/// [count, …] of t's other axes, in the order of memory that `last` says.
inline Tensor empty_like(const Tensor& t, int64_t count, bool last, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::empty({count, t.size(1), t.size(2), t.size(3)}, type ? *type : t.scalar_type(), std::nullopt,
                              t.device(), std::nullopt, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

/// Some images of x, which is dense; adjacent ones are not copied.
inline Tensor images_of(const Tensor& x, const std::vector<int64_t>& images) {
  const int64_t count = images.size();
  if (images.back() - images.front() == count - 1) {
    Tensor all = x;
    return torch::stable::narrow(all, 0, images.front(), count);
  }
  Tensor taken = empty_like(x, count, x.stride(1) == 1 && x.size(1) > 1);
  const Images in(x, x.size(0)), out(taken, count);
  copy_images(count, in.bytes,
              [&](int64_t i) { std::memcpy(out.data + i * out.bytes, in.data + images[i] * in.bytes, in.bytes); });
  return taken;
}

/// Puts the images of one group into `whole`, of `total` images, which is made as the first part lies.
inline void put(OptionalTensor& whole, int64_t total, const std::vector<int64_t>& images, const Tensor& part) {
  if (!whole) whole = empty_like(part, total, !part.is_contiguous() && channels_last(part));
  const int64_t count = images.size();
  if (!lies_as(part, *whole)) {
    for (int64_t i = 0; i < count; i++) {
      Tensor source = part, image = torch::stable::narrow(*whole, 0, images[i], 1);
      torch::stable::copy_(image, torch::stable::narrow(source, 0, i, 1));
    }
    return;
  }
  const Images in(part, count), out(*whole, total);
  copy_images(count, in.bytes,
              [&](int64_t i) { std::memcpy(out.data + images[i] * out.bytes, in.data + i * in.bytes, in.bytes); });
}

}  // namespace taps_fast
