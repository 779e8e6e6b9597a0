// taps_fast::conv2d_grad on CPU: gradients of the images and of weights by one call of PyTorch's for each task, from a
// weight that is summed once more; then what each delta gets of its task's weight gradient P.
//
//   dcoeffs[t, k] = <P_t, deltas[k]>        ddeltas[k] = Σ_t coeffs[t, k] · P_t        dbase = Σ_t base_coeffs[t] · P_t
#include <array>
#include <tuple>

#include "conv2d_call.h"

namespace taps_fast {
namespace {

using torch::stable::detail::from;
using Gradients = std::tuple<Tensor, Tensors, Tensor>;  // dx, ddeltas and then dbase, dcoeffs

/// t in this type: itself where that is its own.
Tensor in_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

/// What is asked for, beside dx.
struct Wanted {
  const Integers &pairs, &ddeltas_for;
  bool dcoeffs, dbase;
};

/// The types of the results read the same both ways: PyTorch 2.13 takes the last result for one of the first type.
Gradients uncompiled(const Conv2d& c, const Tensor& dy, bool split, bool need_dx, const Wanted& w) {
  std::array<StableIValue, 20> stack{from(dy),         from(c.x),           from(c.base),    from(c.deltas),
                                     from(c.coeffs),   from(c.base_coeffs), from(c.stride),  from(c.padding),
                                     from(c.dilation), from(c.groups),      from(c.ids),     from(c.order),
                                     from(c.offsets),  from(c.inner),       from(split),     from(need_dx),
                                     from(w.pairs),    from(w.ddeltas_for), from(w.dcoeffs), from(w.dbase)};
  check_call_of(c.op, torch_call_dispatcher(c.op, "uncompiled", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  return {to<Tensor>(stack[0]), to<Tensors>(stack[1]), to<Tensor>(stack[2])};
}

/// The gradients of a convolution's images and of its weight; what is not asked for is not to be looked at.
struct Backward {
  Tensor dx, p;

  Backward(const Conv2d& c, const Tensor& dy, const Tensor& images, const Tensor& weight, bool need_dx, bool need_p) {
    const bool mask[] = {need_dx, need_p, false};
    std::array<StableIValue, 11> stack{from(dy),
                                       from(images),
                                       from(weight),
                                       from(std::optional<Integers>()),
                                       from(c.stride),
                                       from(c.padding),
                                       from(c.dilation),
                                       from(false),
                                       from(Integers{0, 0}),
                                       from(c.groups),
                                       from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
    check_call_of(c.op, torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
    using torch::stable::detail::to;
    dx = to<Tensor>(stack[0]);
    p = to<Tensor>(stack[1]);
    to<Tensor>(stack[2]);  // frees it
  }
};

/// dcoeffs, ddeltas and dbase, out of the weight gradient of one task after another.
class Sums {
 public:
  Sums(const Conv2d& c, const Wanted& wanted)
      : c_(c), wanted_(wanted), wide_(dtype_of(c.op, c.wide())), sums_(wanted.ddeltas_for.size() + wanted.dbase) {
    const int64_t size = wanted.dcoeffs ? c.coeffs.numel() : 0;
    dcoeffs_ = wanted.dcoeffs ? new_zeros(c.coeffs.scalar_type(), c.coeffs.sizes())
                              : new_tensor(c.coeffs.scalar_type(), {size});
    for (const Tensor& delta : c.deltas) deltas_.push_back(wanted.dcoeffs ? in_type(delta, c.wide()) : delta);
  }

  /// Whether P of this part is of any use.
  bool use(const Group& group, const Part& part) const { return !dots(part).empty() || !users(group).empty(); }

  void add(const Group& group, const Part& part, Tensor p) {
    if (!lies_as(p, c_.base)) {
      Tensor laid = like_base(c_.wide());
      torch::stable::copy_(laid, p);
      p = laid;
    }
    const int64_t size = p.numel();
    if (const std::vector<int64_t> of = dots(part); !of.empty()) {
      std::vector<const void*> deltas;
      for (const int64_t k : of) deltas.push_back(deltas_[k].const_data_ptr());
      const std::vector<double> found = dots_one(wide_, size, p.const_data_ptr(), deltas);
      const int64_t first = part.task * int64_t(c_.deltas.size());
      for (size_t i = 0; i < of.size(); i++) put_number(first + of[i], found[i]);
    }
    const std::vector<User> all = users(group);
    for (const User& user : all) {
      OptionalTensor& sum = sums_[user.place];
      const void* before = sum ? sum->const_data_ptr() : nullptr;
      const bool owned = all.size() == 1;  // nobody else needs P
      if (!sum) sum = owned ? p : like_base(c_.wide());
      if (before || !owned || user.by != 1)
        fold_one(wide_, size, before, 1, {p.const_data_ptr()}, {user.by}, sum->mutable_data_ptr());
    }
  }

  Gradients with(Tensor dx) const {
    Tensors found;
    for (const OptionalTensor& sum : sums_)
      found.push_back(sum ? in_type(*sum, c_.base.scalar_type()) : zeros_like_base());
    return {dx, found, dcoeffs_};
  }

 private:
  /// A gradient that gets `by` times P.
  struct User {
    size_t place;
    double by;
  };

  std::vector<int64_t> dots(const Part& part) const {
    std::vector<int64_t> found;
    const int64_t num_deltas = c_.deltas.size();
    if (!wanted_.dcoeffs || part.task < 0) return found;
    for (int64_t k = 0; k < num_deltas; k++)
      if (wanted_.pairs.empty() || holds(wanted_.pairs, part.task * num_deltas + k)) found.push_back(k);
    return found;
  }

  std::vector<User> users(const Group& group) const {
    std::vector<User> found;
    for (size_t i = 0; i < group.used.size(); i++)
      for (size_t place = 0; place < wanted_.ddeltas_for.size(); place++)
        if (wanted_.ddeltas_for[place] == group.used[i]) found.push_back({place, group.coeffs[i]});
    if (wanted_.dbase && group.scale != 0) found.push_back({sums_.size() - 1, group.scale});
    return found;
  }

  static bool holds(const Integers& numbers, int64_t number) {
    return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
  }

  void put_number(int64_t i, double value) {
    if (wide_ == cpu::DType::kFloat64) static_cast<double*>(dcoeffs_.mutable_data_ptr())[i] = value;
    else static_cast<float*>(dcoeffs_.mutable_data_ptr())[i] = static_cast<float>(value);
  }

  Tensor like_base(ScalarType type) const {
    return empty_like(c_.base, c_.base.size(0), !c_.base.is_contiguous(), type);
  }

  Tensor zeros_like_base() const {
    Tensor zeros = like_base(c_.base.scalar_type());
    return torch::stable::zero_(zeros);
  }

  const Conv2d& c_;
  const Wanted& wanted_;
  const cpu::DType wide_;
  std::vector<OptionalTensor> sums_;
  Tensors deltas_;  // in the type of P
  Tensor dcoeffs_;
};

Gradients conv2d_grad(const Tensor& dy, const Tensor& x, const Tensor& base, const Tensors& deltas,
                      const Tensor& coeffs, const OptionalTensor& base_coeffs, const Integers& stride,
                      const Integers& padding, const Integers& dilation, int64_t num_groups, const OptionalTensor& ids,
                      const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, bool split,
                      bool need_dx, const Integers& pairs, const Integers& ddeltas_for, bool need_dcoeffs,
                      bool need_dbase) {
  const Conv2d c{"taps_fast::conv2d_grad",
                 x,
                 base,
                 deltas,
                 coeffs,
                 base_coeffs,
                 stride,
                 padding,
                 dilation,
                 num_groups,
                 ids,
                 order,
                 offsets,
                 inner};
  const Wanted wanted{pairs, ddeltas_for, need_dcoeffs, need_dbase};
  check_call(c);
  check(dy.dim() == 4 && dy.size(0) == x.size(0) && dy.scalar_type() == x.scalar_type(), c.op, ": dy must have ",
        x.size(0), " images of scalar type ", int(x.scalar_type()), ", got ", dy.dim() ? dy.size(0) : 0, " of ",
        int(dy.scalar_type()));
  const std::vector<Group> groups = groups_of(c);
  size_t parts = 0;
  bool known = !split && is_dense(base);
  for (const Group& group : groups) {
    parts += group.parts.size();
    known &= !need_dx || has_weight(c, group);
  }
  for (const Tensor& delta : deltas) known &= lies_as(delta, base);
  const bool mixed = parts > 1;
  if (mixed && (c.depthwise() || !is_dense(x))) known = false;
  if (!known) return uncompiled(c, dy, split, need_dx, wanted);

  Tensor d = dy;
  if (mixed && !is_dense(dy)) {
    d = empty_like(dy, dy.size(0), !x.is_contiguous());
    torch::stable::copy_(d, dy);
  }
  const bool exact = x.scalar_type() == c.wide();
  const auto of = [&](const Tensor& t, const std::vector<int64_t>& images) { return mixed ? images_of(t, images) : t; };
  Sums sums(c, wanted);
  OptionalTensor dx;
  for (const Group& group : groups) {
    const auto keep = [&](const Tensor& part) {
      if (mixed) put(dx, x.size(0), group.images, part);
      else dx = part;
    };
    const bool at_once = need_dx && exact && group.parts.size() == 1 && sums.use(group, group.parts[0]);
    if (at_once) {
      const Backward both(c, of(d, group.images), of(x, group.images), weight(c, group), true, true);
      keep(both.dx);
      sums.add(group, group.parts[0], both.p);
      continue;
    }
    if (need_dx) keep(Backward(c, of(d, group.images), of(x, group.images), weight(c, group), true, false).dx);
    for (const Part& part : group.parts) {
      if (!sums.use(group, part)) continue;
      const Tensor images = in_type(of(x, part.images), c.wide()), out = in_type(of(d, part.images), c.wide());
      const Tensor shaped = in_type(base, c.wide());  // only its shape and layout count
      sums.add(group, part, Backward(c, out, images, shaped, false, true).p);
    }
  }
  return sums.with(dx ? *dx : new_tensor(x.scalar_type(), {0}));
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) { m.impl("conv2d_grad", TORCH_BOX(&taps_fast::conv2d_grad)); }
