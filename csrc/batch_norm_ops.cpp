// Batch norms of taps_fast/_ops.py on top of their CPU kernels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "norm_run.h"

namespace taps_fast {
namespace {

using namespace cpu;

std::vector<const void*> rows_of(const NormCall& call, const char* name, const Tensor& table) {
  const int64_t tables = num_tables(call), size = compute_size(call.rows.dtype);
  check(table.dim() == 2 && table.size(0) == tables && table.size(1) == call.rows.channels && table.is_contiguous() &&
            table.scalar_type() == call.wide(),
        "batch_norm: ", name, " must be contiguous, of shape [", tables, ", ", call.rows.channels, "]");
  std::vector<const void*> rows;
  for (int64_t t = 0; t < tables; t++)
    rows.push_back(static_cast<const char*>(table.const_data_ptr()) + t * call.rows.channels * size);
  return rows;
}

/// y of a batch norm by the statistics given for each row of a table.
Tensor normalised(NormCall& call, const void* of_x, const std::vector<const void*>& weight,
                  const std::vector<const void*>& bias, std::vector<const void*> mean,
                  const std::vector<const void*>& variance, const std::vector<double>& eps) {
  const int64_t tables = num_tables(call), channels = call.rows.channels;
  const Membership& member = call.rows.member;
  for (int64_t g = 0; member.offsets && g < tables; g++)
    if (member.offsets[g] == member.offsets[g + 1]) mean[task_row(member, g)] = nullptr;
  Tensor out = call.like_x();
  const auto [scale, shift] = tables_of<2>(tables * channels * compute_size(call.rows.dtype));
  const NormTables n{call.rows.dtype == DType::kFloat64,
                     tables,
                     channels,
                     weight.empty() ? nullptr : weight.data(),
                     bias.empty() ? nullptr : bias.data(),
                     mean.data(),
                     variance.data(),
                     eps.data(),
                     scale,
                     shift,
                     std::max<int64_t>(1, kItemElements / std::max<int64_t>(channels, 1))};
  run_items(n, norm_kernels().norm_tables);
  const int64_t stride = member.offsets ? channels : 0;
  Pointwise p{call.rows,       Activation::kNone, of_x,         nullptr,      out.mutable_data_ptr(),
              {scale, stride}, {shift, stride},   {nullptr, 0}, {nullptr, 0}, 0};
  run_pointwise(p);
  return out;
}

Tensor batch_norm_eval(const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& mean,
                       const Tensors& variance, const std::vector<double>& eps, const OptionalTensor& ids,
                       const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  const char* op = "batch_norm_eval";
  NormCall call(op, x, ids, order, offsets, inner);
  const auto scales = call.vectors("weight", weight), shifts = call.vectors("bias", bias);
  const auto means = call.vectors("mean", mean), variances = call.vectors("variance", variance);
  check(!mean.empty() && mean.size() == variance.size() && mean.size() == eps.size(), op,
        ": mean, variance and eps must be one for each table, got ", mean.size(), ", ", variance.size(), " and ",
        eps.size());
  return normalised(call, call.elements("x", x), scales, shifts, means, variances, eps);
}

/// Which tables have statistics that are given, and not those of their rows.
std::vector<bool> read_fixed(const char* op, const Numbers& fixed, const std::vector<double>& eps, int64_t tables) {
  check(int64_t(eps.size()) == tables, op, ": eps must be ", tables, " numbers, got ", eps.size());
  std::vector<bool> is_fixed(tables);
  for (int64_t t : fixed) {
    check(0 <= t && t < tables, op, ": fixed must be in [0, ", tables, "), got ", t);
    is_fixed[t] = true;
  }
  return is_fixed;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const Tensors& weight, const Tensors& bias,
                                                    const Tensors& mean, const Tensors& variance, const Numbers& fixed,
                                                    const std::vector<double>& eps, const OptionalTensor& ids,
                                                    const OptionalTensor& order, const OptionalTensor& offsets,
                                                    int64_t inner) {
  const char* op = "batch_norm_train";
  NormCall call(op, x, ids, order, offsets, inner);
  read_fixed(op, fixed, eps, num_tables(call));
  const auto scales = call.vectors("weight", weight), shifts = call.vectors("bias", bias);
  check(mean.size() == fixed.size() && variance.size() == fixed.size(), op,
        ": mean and variance must be one for each fixed table, got ", mean.size(), " and ", variance.size(), " for ",
        fixed.size());
  const void* of_x = call.elements("x", x);
  GroupSums sums{.in = call.rows, .activation = Activation::kNone, .x = of_x};
  auto [found_mean, found_variance] = run_sums(sums, true);
  for (size_t i = 0; i < fixed.size(); i++) {
    call.copy_vector("mean", mean[i], found_mean, fixed[i]);
    call.copy_vector("variance", variance[i], found_variance, fixed[i]);
  }
  Tensor y = normalised(call, of_x, scales, shifts, rows_of(call, "mean", found_mean),
                        rows_of(call, "variance", found_variance), eps);
  return {y, found_mean, found_variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_grad(const Tensor& dy, const Tensor& x, const Tensors& weight,
                                                   const Tensor& mean, const Tensor& variance, const Numbers& fixed,
                                                   const std::vector<double>& eps, const OptionalTensor& ids,
                                                   const OptionalTensor& order, const OptionalTensor& offsets,
                                                   int64_t inner, bool need_dx) {
  const char* op = "batch_norm_grad";
  NormCall call(op, x, ids, order, offsets, inner);
  const int64_t tables = num_tables(call), channels = call.rows.channels;
  const std::vector<bool> is_fixed = read_fixed(op, fixed, eps, tables);
  const auto weights = call.vectors("weight", weight), means = rows_of(call, "mean", mean),
             variances = rows_of(call, "variance", variance);
  const void *of_x = call.elements("x", x), *of_dy = call.elements("dy", dy);
  const int64_t stride = call.rows.member.offsets ? channels : 0;
  GroupSums sums{.in = call.rows,
                 .activation = Activation::kNone,
                 .x = of_x,
                 .dy = of_dy,
                 .center = {mean.const_data_ptr(), stride}};
  auto [dweight, dbias] = run_sums(sums, false);  // so far Σ dy·(x - mean) and Σ dy
  const auto [scale, slope, offset] = tables_of<3>(tables * channels * compute_size(call.rows.dtype));
  with_compute_type(
      call.rows.dtype, [&, scale = scale, slope = slope, offset = offset, dweight = dweight, dbias = dbias](auto zero) {
        using C = decltype(zero);
        for (int64_t g = 0; g < tables; g++) {
          const int64_t t = task_row(call.rows.member, g), values = rows_of_group(call.rows, g) * call.rows.pixels;
          const C share = is_fixed[t] ? 0 : 1 / static_cast<C>(std::max<int64_t>(values, 1));
          const C *w = weights.empty() ? nullptr : static_cast<const C*>(weights[t]),
                  *m = static_cast<const C*>(means[t]), *v = static_cast<const C*>(variances[t]);
          C *along = static_cast<C*>(dweight.mutable_data_ptr()) + t * channels,
            *plain = static_cast<C*>(dbias.mutable_data_ptr()) + t * channels;
          C *a = reinterpret_cast<C*>(scale) + t * channels, *b = reinterpret_cast<C*>(slope) + t * channels,
            *c = reinterpret_cast<C*>(offset) + t * channels;
          for (int64_t j = 0; j < channels; j++) {
            const C rstd = 1 / std::sqrt(v[j] + static_cast<C>(eps[t]));
            a[j] = w ? w[j] * rstd : rstd;
            b[j] = -a[j] * rstd * rstd * along[j] * share;
            c[j] = -a[j] * plain[j] * share - b[j] * m[j];
            along[j] *= rstd;
          }
        }
      });
  if (!need_dx) return {new_tensor(x.scalar_type(), {0}), dweight, dbias};
  Tensor dx = call.like_x();
  Pointwise p{call.rows,       Activation::kNone, of_x, of_dy, dx.mutable_data_ptr(), {scale, stride}, {nullptr, 0},
              {slope, stride}, {offset, stride},  0};
  run_pointwise(p);
  return {dx, dweight, dbias};
}

/// Moves the running statistics of the tables named in `of`, each by its momentum (below 0: a cumulative average),
/// where its task has samples.
void track_statistics(const Tensors& means, const Tensors& variances, const Tensors& batches, const Numbers& of,
                      const std::vector<double>& momentum, const Tensor& mean, const Tensor& variance,
                      const Tensor& offsets, int64_t values) {
  const char* op = "track_statistics";
  const int64_t tables = mean.size(0), channels = mean.size(1);
  check(means.size() == of.size() && variances.size() == of.size() && batches.size() == of.size() &&
            momentum.size() == of.size(),
        op, ": means, variances, batches and momentum must be one for each of ", of.size(), " tables");
  check(offsets.numel() == tables + 1 && offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long, op,
        ": offsets must be ", tables + 1, " contiguous int64, got ", offsets.numel());
  const int64_t* begin = static_cast<const int64_t*>(offsets.const_data_ptr());
  const DType dtype = dtype_of(op, mean.scalar_type(), "mean");
  check(dtype == DType::kFloat32 || dtype == DType::kFloat64, op, ": mean must be float32 or float64");
  for (size_t i = 0; i < of.size(); i++) {
    const int64_t t = of[i];
    check(0 <= t && t < tables, op, ": of must be in [0, ", tables, "), got ", t);
    const int64_t group = t + 1 < tables ? t + 1 : 0;
    const double n = static_cast<double>(begin[group + 1] - begin[group]) * values;
    if (n == 0) continue;
    check(batches[i].numel() == 1 && batches[i].scalar_type() == ScalarType::Long, op, ": batches must be int64");
    Tensor counter = batches[i];
    const int64_t seen = ++*static_cast<int64_t*>(counter.mutable_data_ptr());
    const double by = momentum[i] < 0 ? 1.0 / seen : momentum[i];
    const auto move = [&](const char* name, const Tensor& given, const Tensor& table, double scale) {
      Tensor held = given;
      check(held.numel() == channels, op, ": ", name, " must have ", channels, " elements, got ", held.numel());
      const bool ready = held.is_contiguous() && held.scalar_type() == table.scalar_type();
      Tensor moved = ready ? held : torch::stable::contiguous(torch::stable::to(held, table.scalar_type()));
      with_compute_type(dtype, [&](auto zero) {
        using C = decltype(zero);
        C* to = static_cast<C*>(moved.mutable_data_ptr());
        const C *found = static_cast<const C*>(table.const_data_ptr()) + t * channels, share = static_cast<C>(by),
                rescale = static_cast<C>(scale);
        for (int64_t j = 0; j < channels; j++) to[j] += share * (found[j] * rescale - to[j]);
      });
      if (!ready) torch::stable::copy_(held, moved);
    };
    move("means", means[i], mean, 1);
    move("variances", variances[i], variance, n / std::max(n - 1, 1.0));
  }
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("batch_norm_eval", TORCH_BOX(&taps_fast::batch_norm_eval));
  m.impl("batch_norm_train", TORCH_BOX(&taps_fast::batch_norm_train));
  m.impl("batch_norm_grad", TORCH_BOX(&taps_fast::batch_norm_grad));
  m.impl("track_statistics", TORCH_BOX(&taps_fast::track_statistics));
}
