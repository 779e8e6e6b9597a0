// taps_fast::conv2d_merge on CPU: each distinct weight of a batch is summed into memory that the next one writes over,
// and PyTorch's convolution runs its images. It does in one call what taps_fast/_aten.py does in many, which is a good
// part of a small layer's time; that file runs what is left here, as conv2d_merge.uncompiled. (No operator with a str
// is called: in PyTorch 2.10 to 2.13 each such call loses 48 bytes.)
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "checks.h"
#include "common/layout.h"
#include "fold.h"
#include "norm_run.h"

// What PyTorch's last error says; PyTorch 2.13 and newer have it.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace taps_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

/// The operator's arguments.
struct Conv2d {
  const Tensor &x, &base;
  const Tensors& deltas;
  const Tensor& coeffs;
  const OptionalTensor &base_coeffs, &bias;
  const Integers &stride, &padding, &dilation;
  int64_t groups;
  const OptionalTensor &ids, &order, &offsets;
  int64_t inner;
};

Tensor call(const char* op, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    const auto what = torch_exception_get_what_without_backtrace;
    check(false, what ? what() : "conv2d_merge: PyTorch's convolution failed, and has printed why");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor convolve(const Conv2d& c, const Tensor& images, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 7> stack{from(images),    from(weight),     from(bias),    from(c.stride),
                                    from(c.padding), from(c.dilation), from(c.groups)};
  return call("aten::conv2d", "", stack.data());
}

Tensor uncompiled(const Conv2d& c) {
  std::array<StableIValue, 14> stack{from(c.x),           from(c.base),   from(c.deltas), from(c.coeffs),
                                     from(c.base_coeffs), from(c.bias),   from(c.stride), from(c.padding),
                                     from(c.dilation),    from(c.groups), from(c.ids),    from(c.order),
                                     from(c.offsets),     from(c.inner)};
  return call("taps_fast::conv2d_merge", "uncompiled", stack.data());
}

/// y += the bias of each image's task.
void add_bias_of_tasks(const Conv2d& c, Tensor& y) {
  NormCall call("conv2d_merge", y, c.ids, c.order, c.offsets, c.inner);
  const OptionalTensor bias = torch::stable::to(*c.bias, c.coeffs.scalar_type());
  cpu::Pointwise p{call.rows,
                   cpu::Activation::kNone,
                   call.elements("x", y),
                   nullptr,
                   y.mutable_data_ptr(),
                   call.table("scale", std::nullopt, 1),
                   call.table("bias", bias, 0),
                   {nullptr, 0},
                   {nullptr, 0},
                   0};
  run_pointwise(p);
}

/// Images that share one weight, scale · base + Σ coeff · deltas[k].
struct Group {
  double scale = 1;
  std::vector<int64_t> used;
  std::vector<double> coeffs;  // of those
  std::vector<int64_t> images;  // ascending

  bool adjacent() const { return images.back() - images.front() == int64_t(images.size()) - 1; }
};

double number(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Double ? static_cast<const double*>(t.const_data_ptr())[i]
                                               : static_cast<const float*>(t.const_data_ptr())[i];
}

/// The weight of task `task` (-1: the base), without images.
Group weight_of(const Conv2d& c, int64_t task) {
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
void check_call(const Conv2d& c) {
  const char* op = "conv2d_merge";
  const ScalarType type = c.x.scalar_type();
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(c.x.dim() == 4 && c.base.dim() == 4, op, ": x and base must have 4 dimensions, got ", c.x.dim(), " and ",
        c.base.dim());
  check(c.ids.has_value() == c.order.has_value() && c.ids.has_value() == c.offsets.has_value(), op,
        ": ids, order and offsets must come together");
  const int64_t tasks = c.ids ? c.offsets->numel() - 2 : 1, num_deltas = c.deltas.size();
  const auto numbers = [&](const char* name, const Tensor& t, int64_t size, ScalarType wanted) {
    check(t.numel() == size && t.scalar_type() == wanted, op, ": ", name, " must have ", size,
          " elements of scalar type ", int(wanted), ", got ", t.numel(), " of ", int(t.scalar_type()));
  };
  numbers("base", c.base, c.base.numel(), type);
  for (const Tensor& delta : c.deltas) numbers("deltas", delta, c.base.numel(), type);
  numbers("coeffs", c.coeffs, tasks * num_deltas, wide);
  if (c.base_coeffs) numbers("base_coeffs", *c.base_coeffs, tasks, wide);
  check(c.coeffs.is_contiguous() && (!c.base_coeffs || c.base_coeffs->is_contiguous()), op,
        ": coeffs and base_coeffs must be contiguous");
  if (!c.ids) return;
  const int64_t batch = c.order->numel();
  numbers("order", *c.order, batch, ScalarType::Long);
  numbers("offsets", *c.offsets, tasks + 2, ScalarType::Long);
  check(tasks >= 0 && c.order->is_contiguous() && c.offsets->is_contiguous(), op,
        ": order and offsets must be contiguous");
  check(c.x.size(0) == batch * c.inner, op, ": x must have batch times inner images, got ", c.x.size(0), " (batch ",
        batch, ", inner ", c.inner, ")");
  check_groups(op, c.x.size(0), c.inner, batch, tasks, static_cast<const int64_t*>(c.order->const_data_ptr()),
               static_cast<const int64_t*>(c.offsets->const_data_ptr()));
}

/// A group for each distinct weight, and never none at all.
std::vector<Group> groups_of(const Conv2d& c) {
  if (!c.ids) return {weight_of(c, 0)};
  const auto *order = static_cast<const int64_t*>(c.order->const_data_ptr()),
             *offsets = static_cast<const int64_t*>(c.offsets->const_data_ptr());
  const int64_t tasks = c.offsets->numel() - 2;
  std::vector<Group> found;
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
    for (int64_t i = begin; i < end; i++)
      for (int64_t r = 0; r < c.inner; r++) found[place->second].images.push_back(order[i] * c.inner + r);
  }
  for (Group& group : found) std::sort(group.images.begin(), group.images.end());
  if (found.empty()) found.emplace_back();
  return found;
}

/// A thread's memory for a weight, as large as its largest: fresh pages cost as much as the sum.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(kAlignment, cpu::round_up(bytes, kAlignment));
      check(data_, "conv2d_merge: out of memory for a weight of ", bytes, " bytes");
      size_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// Whether t holds its elements without gaps, in the order of memory that `like` has.
bool lies_as(const Tensor& t, const Tensor& like) {
  if (like.is_contiguous()) return t.is_contiguous();
  return channels_last(like) && channels_last(t);
}

/// Whether `sum` can make the group's weight; a weight that is stored needs no sum.
bool can_sum(const Conv2d& c, const Group& group) {
  for (const int64_t k : group.used)
    if (!lies_as(c.deltas[k], c.base)) return false;
  return c.base.is_contiguous() || channels_last(c.base);
}

/// The weight if it is one tensor as it is: the base, or a baked delta.
const Tensor* stored(const Conv2d& c, const Group& group) {
  if (group.scale == 1 && group.used.empty()) return &c.base;
  if (group.scale == 0 && group.used.size() == 1 && group.coeffs[0] == 1) return &c.deltas[group.used[0]];
  return nullptr;
}

/// scale · base + Σ coeff · delta in the coefficients' type, rounded once; valid until this thread's next sum.
Tensor sum(const Conv2d& c, const Group& group) {
  thread_local Scratch scratch;
  std::vector<const void*> terms;
  std::vector<double> coeffs = group.coeffs;
  for (const int64_t k : group.used) terms.push_back(c.deltas[k].const_data_ptr());
  if (group.scale != 0 && group.scale != 1) {
    terms.push_back(c.base.const_data_ptr());
    coeffs.push_back(group.scale);
  }
  const cpu::DType dtype = dtype_of("conv2d_merge", c.base.scalar_type(), "base");
  void* out = scratch.at_least(c.base.numel() * cpu::element_size(dtype));
  fold_one(dtype, c.base.numel(), group.scale == 1 ? c.base.const_data_ptr() : nullptr, terms, coeffs, out);
  return torch::stable::from_blob(out, c.base.sizes(), c.base.strides(), c.base.device(), c.base.scalar_type());
}

/// How a batch of images lies, each of them one piece of memory.
struct Images {
  char* data;
  int64_t bytes;  // of one

  Images(const Tensor& t, int64_t count)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), bytes(count ? t.numel() / count : 0) {
    bytes *= cpu::element_size(dtype_of("conv2d_merge", t.scalar_type()));
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

Tensor empty_like(const Tensor& t, int64_t images, bool last) {
  return torch::stable::empty({images, t.size(1), t.size(2), t.size(3)}, t.scalar_type(), std::nullopt, t.device(),
                              std::nullopt, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor images_of(const Tensor& x, const Group& group) {
  if (group.adjacent()) {
    Tensor all = x;
    return torch::stable::narrow(all, 0, group.images.front(), group.images.size());
  }
  const int64_t count = group.images.size();
  Tensor taken = empty_like(x, count, x.stride(1) == 1 && x.size(1) > 1);
  const Images in(x, x.size(0)), out(taken, count);
  copy_images(count, in.bytes, [&](int64_t i) {
    std::memcpy(out.data + i * out.bytes, in.data + group.images[i] * in.bytes, in.bytes);
  });
  return taken;
}

void put(Tensor& y, const Group& group, const Tensor& part) {
  const int64_t count = group.images.size();
  if (!lies_as(part, y)) {
    for (int64_t i = 0; i < count; i++) {
      Tensor source = part, image = torch::stable::narrow(y, 0, group.images[i], 1);
      torch::stable::copy_(image, torch::stable::narrow(source, 0, i, 1));
    }
    return;
  }
  const Images in(part, count), out(y, y.size(0));
  copy_images(count, in.bytes, [&](int64_t i) {
    std::memcpy(out.data + group.images[i] * out.bytes, in.data + i * in.bytes, in.bytes);
  });
}

Tensor conv2d_merge(const Tensor& x, const Tensor& base, const Tensors& deltas, const Tensor& coeffs,
                    const OptionalTensor& base_coeffs, const OptionalTensor& bias, const Integers& stride,
                    const Integers& padding, const Integers& dilation, int64_t num_groups, const OptionalTensor& ids,
                    const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  const Conv2d c{x,       base,     deltas,     coeffs, base_coeffs, bias,    stride,
                 padding, dilation, num_groups, ids,    order,       offsets, inner};
  check_call(c);
  const std::vector<Group> groups = groups_of(c);
  const bool mixed = groups.size() > 1, depthwise = base.size(1) == 1 && num_groups > 1;
  if (mixed && (depthwise || !(x.is_contiguous() || channels_last(x)))) return uncompiled(c);
  for (const Group& group : groups)
    if (!stored(c, group) && !can_sum(c, group)) return uncompiled(c);
  const bool by_task = bias && bias->dim() == 2;
  const OptionalTensor shared = by_task ? OptionalTensor() : bias;
  const auto weight = [&](const Group& group) {
    const Tensor* as_it_is = stored(c, group);
    return as_it_is ? *as_it_is : sum(c, group);
  };
  OptionalTensor y;
  for (const Group& group : groups) {
    if (!mixed) {
      y = convolve(c, x, weight(group), shared);
      break;
    }
    Tensor part = convolve(c, images_of(x, group), weight(group), shared);
    if (!y) y = empty_like(part, x.size(0), !part.is_contiguous() && channels_last(part));
    put(*y, group, part);
  }
  if (by_task) add_bias_of_tasks(c, *y);
  return *y;
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) { m.impl("conv2d_merge", TORCH_BOX(&taps_fast::conv2d_merge)); }
