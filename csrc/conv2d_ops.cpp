// taps_fast::conv2d_merge on CPU: the convolution of each distinct weight's images, by PyTorch.
#include <array>

#include "conv2d_call.h"
#include "norm_run.h"

namespace taps_fast {
namespace {

using torch::stable::detail::from;

Tensor call(const Conv2d& c, const char* op, const char* overload, StableIValue* stack) {
  check_call_of(c.op, torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor convolve(const Conv2d& c, const Tensor& images, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 7> stack{from(images),    from(weight),     from(bias),    from(c.stride),
                                    from(c.padding), from(c.dilation), from(c.groups)};
  return call(c, "aten::conv2d", "", stack.data());
}

Tensor uncompiled(const Conv2d& c, const OptionalTensor& bias) {
  std::array<StableIValue, 14> stack{from(c.x),           from(c.base),   from(c.deltas), from(c.coeffs),
                                     from(c.base_coeffs), from(bias),     from(c.stride), from(c.padding),
                                     from(c.dilation),    from(c.groups), from(c.ids),    from(c.order),
                                     from(c.offsets),     from(c.inner)};
  return call(c, c.op, "uncompiled", stack.data());
}

/// y += the bias of each image's task.
void add_bias_of_tasks(const Conv2d& c, const Tensor& bias, Tensor& y) {
  NormCall call("conv2d_merge", y, c.ids, c.order, c.offsets, c.inner);
  const OptionalTensor wide = torch::stable::to(bias, c.coeffs.scalar_type());
  cpu::Pointwise p{call.rows,
                   cpu::Activation::kNone,
                   call.elements("x", y),
                   nullptr,
                   y.mutable_data_ptr(),
                   call.table("scale", std::nullopt, 1),
                   call.table("bias", wide, 0),
                   {nullptr, 0},
                   {nullptr, 0},
                   0};
  run_pointwise(p);
}

Tensor conv2d_merge(const Tensor& x, const Tensor& base, const Tensors& deltas, const Tensor& coeffs,
                    const OptionalTensor& base_coeffs, const OptionalTensor& bias, const Integers& stride,
                    const Integers& padding, const Integers& dilation, int64_t num_groups, const OptionalTensor& ids,
                    const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  const Conv2d c{"taps_fast::conv2d_merge",
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
  check_call(c);
  const std::vector<Group> groups = groups_of(c);
  const bool mixed = groups.size() > 1;
  if (mixed && (c.depthwise() || !is_dense(x))) return uncompiled(c, bias);
  for (const Group& group : groups)
    if (!has_weight(c, group)) return uncompiled(c, bias);
  const bool by_task = bias && bias->dim() == 2;
  const OptionalTensor shared = by_task ? OptionalTensor() : bias;
  OptionalTensor y;
  for (const Group& group : groups) {
    if (mixed) put(y, x.size(0), group.images, convolve(c, images_of(x, group.images), weight(c, group), shared));
    else y = convolve(c, x, weight(c, group), shared);
  }
  if (by_task) add_bias_of_tasks(c, *bias, *y);
  return *y;
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) { m.impl("conv2d_merge", TORCH_BOX(&taps_fast::conv2d_merge)); }
