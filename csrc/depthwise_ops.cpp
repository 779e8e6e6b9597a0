// The depthwise convolution of taps_fast/_ops.py on top of its CPU kernel.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"
#include "cpu/norm.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor depthwise(const Tensor& x, const Tensor& weight, const Tensor& table, const std::vector<int64_t>& kernel,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation) {
  const char* op = "depthwise";
  check(x.dim() == 4 && x.is_contiguous(), op, ": x must be contiguous [N, H, W, C], got ", x.dim(), " dimensions");
  const int64_t n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    check(pair->size() == 2, op, ": kernel, stride, padding and dilation must be 2 integers each, got ", pair->size());
  for (int axis = 0; axis < 2; axis++)
    check(kernel[axis] >= 1 && stride[axis] >= 1 && padding[axis] >= 0 && dilation[axis] >= 1, op,
          ": kernel, stride and dilation must be at least 1 and padding at least 0, got ", kernel[axis], ", ",
          stride[axis], ", ", dilation[axis], " and ", padding[axis]);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(weight.dim() == 3 && weight.is_contiguous() && weight.scalar_type() == wide &&
            weight.size(1) == kernel[0] * kernel[1] && weight.size(2) == c,
        op, ": weight must be contiguous [tables, ", kernel[0] * kernel[1], ", ", c, "] of scalar type ", int(wide));
  check(table.numel() == n && table.is_contiguous() && table.scalar_type() == ScalarType::Long, op, ": table must be ",
        n, " int64, got ", table.numel());
  const auto* tables = static_cast<const int64_t*>(table.const_data_ptr());
  for (int64_t i = 0; i < n; i++)
    check(0 <= tables[i] && tables[i] < weight.size(0), op, ": table must be in [0, ", weight.size(0), "), got ",
          tables[i]);
  const auto length = [&](int axis, int64_t size) {
    const int64_t steps = size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    check(steps >= 0, op, ": padding must make x at least as large as the kernel, got ", padding[axis], " (x ", size,
          ", kernel ", kernel[axis], ", dilation ", dilation[axis], ")");
    return steps / stride[axis] + 1;
  };
  const int64_t out_h = length(0, h), out_w = length(1, w);
  Tensor out = new_tensor(x.scalar_type(), {n, out_h, out_w, c});
  const cpu::Depthwise p{.dtype = dtype_of(op, x.scalar_type()),
                         .images = n,
                         .channels = c,
                         .in_h = h,
                         .in_w = w,
                         .out_h = out_h,
                         .out_w = out_w,
                         .kernel_h = kernel[0],
                         .kernel_w = kernel[1],
                         .stride_h = stride[0],
                         .stride_w = stride[1],
                         .pad_h = padding[0],
                         .pad_w = padding[1],
                         .dilation_h = dilation[0],
                         .dilation_w = dilation[1],
                         .x = x.const_data_ptr(),
                         .weight = weight.const_data_ptr(),
                         .table = tables,
                         .out = out.mutable_data_ptr()};
  const double results = double(out.numel());
  run_items(p, cpu::norm_kernels().depthwise, threads_for(2 * results, results * kernel[0] * kernel[1]));
  return out;
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) { m.impl("depthwise", TORCH_BOX(&taps_fast::depthwise)); }
