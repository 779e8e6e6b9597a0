// taps_fast::coded_fwd and coded_dx on CPU: checks tensors, orders rows by task, cuts them into passes, runs.
#include "coded_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "common/text.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using namespace cpu;

constexpr int64_t kFewestColumns = 32;  // of one item
constexpr int64_t kMostColumns = 256;  // so that a tile that masks share stays in L2
constexpr int64_t kMostSignColumns = 1024;  // one table serves them all
constexpr int64_t kItemsPerThread = 4;

Coding coding_of(const char* op, StringHandle handle) {
  const std::string format = take(handle);
  if (format == "bits") return Coding::kSign;
  if (format == "mask") return Coding::kMask;
  check(format == "int8", op, ": format must be bits, mask or int8, got '", format, "'");
  return Coding::kInt8;
}

const CodedKernels& coded_kernels() {
  static const CodedKernels& chosen = []() -> const CodedKernels& {
#if defined(__x86_64__)
    if (kernels().vector_bytes == 64) return coded_avx512();
    if (kernels().vector_bytes == 32) return coded_avx2();
#endif
    return coded_generic();
  }();
  return chosen;
}

/// What a call is given besides its input and its output.
struct Arguments {
  const char* op;
  const Tensors& codes;
  const OptionalTensor& tile;
  const Tensor& factors;
  const std::vector<int64_t>& which;
  const OptionalTensor &ids, &order, &offsets;
  int64_t inner, in_features;
  Coding coding;
};

const Tensor& matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols, ScalarType type) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.scalar_type() == type && t.is_contiguous(), op,
        ": ", name, " must be contiguous, of shape [", rows, ", ", cols, "] and scalar type ", int(type));
  return t;
}

void run(const Arguments& a, bool transposed, const Tensor& in, Tensor& out) {
  const char* op = a.op;
  const ScalarType type = in.scalar_type();
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t tasks = a.which.size(), rows = in.size(0);
  check(a.factors.dim() == 2, op, ": factors must have 2 dimensions");
  const int64_t out_features = a.factors.size(1);
  matrix(op, "factors", a.factors, tasks, out_features, wide);
  matrix(op, transposed ? "x" : "dy", in, rows, transposed ? a.in_features : out_features, type);

  CodedProduct p{};
  p.dtype = dtype_of(op, type);
  p.transposed = transposed;
  p.wide_out = out.scalar_type() != type;
  p.out_features = out_features;
  p.in_features = a.in_features;
  Term like{{nullptr, a.in_features}, 1.0, a.coding, nullptr, 0, nullptr, 1};
  const bool bits = like.coding != Coding::kInt8;
  like.code_stride = bits ? 8 * ceil_div(a.in_features, 64) : a.in_features;
  for (const Tensor& codes : a.codes)
    matrix(op, "codes", codes, out_features, like.code_stride, bits ? ScalarType::Byte : ScalarType::Char);
  check((like.coding == Coding::kMask) == a.tile.has_value(), op, ": tile must be given for mask and for nothing else");
  if (a.tile) like.matrix.data = matrix(op, "tile", *a.tile, out_features, a.in_features, type).const_data_ptr();
  p.in = {in.const_data_ptr(), in.size(1)};
  p.out = {out.mutable_data_ptr(), out.size(1)};
  if (rows == 0 || out_features == 0 || a.in_features == 0) return;

  std::vector<int64_t> order;
  std::vector<Term> terms;
  std::vector<Pass> passes;
  const auto add = [&](int64_t task, int64_t begin, int64_t end) {
    const int64_t code = a.which[task], term = terms.size();
    check(code < int64_t(a.codes.size()) && code >= -1, op, ": which must be in [-1, ", a.codes.size(), "), got ",
          code);
    terms.push_back(like);
    terms.back().codes = static_cast<const uint8_t*>(a.codes[code].const_data_ptr());
    terms.back().scale =
        static_cast<const char*>(a.factors.const_data_ptr()) + task * out_features * compute_size(p.dtype);
    passes.push_back({begin, end, term, term + 1, false, true});
  };
  check(a.ids.has_value() == a.order.has_value() && a.ids.has_value() == a.offsets.has_value(), op,
        ": ids, order and offsets must come together");
  if (a.ids) {
    const int64_t batch = a.ids->numel();
    const auto holds = [](const Tensor& t, int64_t size) {
      return t.numel() == size && t.scalar_type() == ScalarType::Long && t.is_contiguous();
    };
    check(holds(*a.order, batch) && holds(*a.offsets, tasks + 2), op,
          ": order and offsets must be contiguous int64 of a batch of ", batch, " and ", tasks, " tasks, got ",
          a.order->numel(), " and ", a.offsets->numel());
    const Groups groups{static_cast<const int64_t*>(a.order->const_data_ptr()),
                        static_cast<const int64_t*>(a.offsets->const_data_ptr()), batch, tasks, a.inner};
    check_groups(op, rows, a.inner, batch, tasks, groups.order, groups.offsets);
    for (int64_t t = 0; t < tasks; t++) {
      if (a.which[t] < 0) continue;
      const int64_t begin = order.size();
      for_each_row(groups, t + 1, rows, [&](int64_t r) { order.push_back(r); });
      add(t, begin, order.size());
    }
    p.row_index = order.data();
  } else {
    check(tasks == 1, op, ": which must have one entry without tasks, got ", tasks);
    if (a.which[0] >= 0) add(0, 0, rows);
  }
  p.terms = terms.data();
  run_coded(p, passes);
}

Tensor coded_fwd(const Tensor& y, const Tensor& x, const Tensors& codes, const OptionalTensor& tile,
                 const Tensor& factors, const std::vector<int64_t>& which, const OptionalTensor& ids,
                 const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle format) {
  const Coding coding = coding_of("coded_fwd", format);
  check(x.dim() == 2, "coded_fwd: x must have 2 dimensions");
  matrix("coded_fwd", "y", y, x.size(0), factors.size(1), y.scalar_type());
  check(y.scalar_type() == x.scalar_type() || y.scalar_type() == factors.scalar_type(),
        "coded_fwd: y must have the scalar type of x or of factors, got ", int(y.scalar_type()));
  Tensor out = new_tensor(y.scalar_type(), y.sizes());
  const int64_t size = y.scalar_type() == ScalarType::Double ? 8 : y.scalar_type() == ScalarType::Float ? 4 : 2;
  if (y.numel()) std::memcpy(out.mutable_data_ptr(), y.const_data_ptr(), y.numel() * size);
  run({"coded_fwd", codes, tile, factors, which, ids, order, offsets, inner, x.size(1), coding}, true, x, out);
  return out;
}

Tensor coded_dx(const Tensor& dy, const Tensors& codes, const OptionalTensor& tile, const Tensor& factors,
                const std::vector<int64_t>& which, const OptionalTensor& ids, const OptionalTensor& order,
                const OptionalTensor& offsets, int64_t inner, StringHandle format, int64_t in_features) {
  const Coding coding = coding_of("coded_dx", format);
  check(dy.dim() == 2, "coded_dx: dy must have 2 dimensions");
  Tensor out = new_zeros(dy.scalar_type(), {dy.size(0), in_features});
  run({"coded_dx", codes, tile, factors, which, ids, order, offsets, inner, in_features, coding}, false, dy, out);
  return out;
}

}  // namespace

void run_coded(CodedProduct& p, const std::vector<Pass>& passes) {
  const CodedKernels& kernels = coded_kernels();
  std::vector<Pass> cut;
  bool signs = true;
  for (const Pass& pass : passes) {
    const int64_t part = even_part(std::max<int64_t>(pass.row_end - pass.row_begin, 1), kernels.tile_rows);
    for (int64_t r = pass.row_begin; r < pass.row_end; r += part) {
      cut.push_back(pass);
      cut.back().row_begin = r;
      cut.back().row_end = std::min(r + part, pass.row_end);
    }
    for (int64_t t = pass.term_begin; t < pass.term_end; t++) signs = signs && p.terms[t].coding == Coding::kSign;
  }
  if (cut.empty()) return;
  p.passes = cut.data();
  p.num_passes = cut.size();
  p.col_block = signs && p.transposed ? kMostSignColumns : kMostColumns;
  // A code takes as long as a number: it is smaller, but has to be decoded.
  const double codes = double(p.out_features) * p.in_features;
  const int64_t threads = threads_for(codes * p.num_passes, codes * cut.back().row_end);
  while (p.col_block > kFewestColumns && num_items(p) < kItemsPerThread * threads) p.col_block /= 2;
  run_queue(p, kernels.run, kernels.workspace_bytes(p), threads);
}

}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("coded_fwd", TORCH_BOX(&taps_fast::coded_fwd));
  m.impl("coded_dx", TORCH_BOX(&taps_fast::coded_dx));
}
