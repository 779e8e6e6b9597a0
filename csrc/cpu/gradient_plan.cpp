// Jobs of dw.
//
//   one job for each task present:  P_t = Σ_{r in t} dy_rᵀ x_r   -> its dcoeffs, and every gradient that is c · P_t;
//                                   Σ_{r in t} dy_r              -> its row of dbias
//   one job for each gradient that several tasks share:  Σ_t c_t P_t = Σ_r c_t(r) dy_rᵀ x_r
//
// so the workspace is one tile whatever K and T are, and each target is written once, by one job.
#include <algorithm>

#include "plan.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kTileRows = 192, kTileCols = 512, kStep = 64, kRowsAtOnce = 256;
// Of few rows the gradients themselves are what takes time, and long pieces of their rows take less.
constexpr int64_t kWideTileRows = 48, kWideTileCols = 2048;

/// A wanted gradient: Σ over `parts` of factor · P_task.
struct Sum {
  MutableMatrix out;
  std::vector<std::pair<int64_t, double>> parts;  // (member, factor)
};

}  // namespace

void GradientPlan::finish(const Weight& weight, const Groups& groups, const Wanted& wanted, int64_t num_rows,
                          int threads, const Kernels& table) {
  const int64_t num_deltas = weight.deltas.size();
  std::vector<int64_t> task, begin, end;  // of each member: a group with rows
  if (groups.offsets) {
    for (int64_t g = 0; g <= groups.tasks; g++) {
      const int64_t start = rows_.size();
      for_each_row(groups, g, num_rows, [&](int64_t r) { rows_.push_back(r); });
      if (static_cast<int64_t>(rows_.size()) == start) continue;
      task.push_back(g - 1);
      begin.push_back(start);
      end.push_back(rows_.size());
    }
  } else if (num_rows > 0) {
    task = {0};
    begin = {0};
    end = {num_rows};
  }
  const int64_t members = task.size();

  // The gradients, as sums over members.
  std::vector<Sum> sums;
  if (wanted.dbase.data) {
    sums.push_back({wanted.dbase, {}});
    for (int64_t m = 0; m < members; m++)
      if (const double c = task[m] < 0 ? 1.0 : weight.base_coeff(task[m]); c != 0) sums.back().parts.push_back({m, c});
  }
  for (size_t i = 0; i < wanted.ddeltas_for.size(); i++) {
    sums.push_back({wanted.ddeltas[i], {}});
    for (int64_t m = 0; m < members; m++)
      if (const double c = task[m] < 0 ? 0.0 : weight.coeff(task[m], wanted.ddeltas_for[i]); c != 0)
        sums.back().parts.push_back({m, c});
  }

  // One job a member.
  std::vector<std::vector<int64_t>> pairs_of(groups.offsets ? groups.tasks : 1);
  if (wanted.dcoeffs) {
    if (wanted.pairs.empty()) {
      for (size_t t = 0; t < pairs_of.size(); t++)
        for (int64_t k = 0; k < num_deltas; k++) pairs_of[t].push_back(k);
    } else {
      for (int64_t pair : wanted.pairs) pairs_of[pair / num_deltas].push_back(pair % num_deltas);
    }
  }
  for (int64_t m = 0; m < members; m++) {
    Job job{begin[m], end[m], static_cast<int64_t>(dots_.size()), 0, static_cast<int64_t>(targets_.size()), 0, nullptr};
    if (task[m] >= 0)
      for (int64_t k : pairs_of[task[m]]) {
        dots_.push_back({weight.deltas[k].matrix, static_cast<int64_t>(positions_.size())});
        positions_.push_back(task[m] * num_deltas + k);
      }
    for (const Sum& sum : sums)
      if (sum.parts.size() == 1 && sum.parts[0].first == m) targets_.push_back({sum.out, sum.parts[0].second});
    job.dot_end = dots_.size();
    job.target_end = targets_.size();
    if (wanted.dbias) {
      const int64_t row = task[m] < 0 ? groups.tasks : task[m];  // the base's is the last
      job.sums = static_cast<char*>(wanted.dbias) + row * problem.rows * compute_size(problem.dtype);
    }
    if (job.dot_end > job.dot_begin || job.target_end > job.target_begin || job.sums) jobs_.push_back(job);
  }

  // One job a sum over several members; a sum over none is a job without rows, which stores zeros.
  const bool scaled = std::any_of(sums.begin(), sums.end(), [](const Sum& s) { return s.parts.size() > 1; });
  if (scaled) scales_.assign(rows_.size(), 1.0);
  for (const Sum& sum : sums) {
    if (sum.parts.size() == 1) continue;
    const int64_t start = rows_.size(), target = targets_.size(), dot = dots_.size();
    for (const auto& [m, factor] : sum.parts) {
      for (int64_t r = begin[m]; r < end[m]; r++) rows_.push_back(rows_[r]);
      scales_.insert(scales_.end(), end[m] - begin[m], factor);
    }
    targets_.push_back({sum.out, 1.0});
    jobs_.push_back({start, static_cast<int64_t>(rows_.size()), dot, dot, target, target + 1, nullptr});
  }

  problem.row_index = groups.offsets ? rows_.data() : nullptr;
  problem.row_scale = scaled ? scales_.data() : nullptr;
  problem.jobs = jobs_.data();
  problem.num_jobs = jobs_.size();
  problem.dots = dots_.data();
  problem.targets = targets_.data();

  Blocking& b = problem.blocking;
  int64_t most = 1;
  for (const Job& job : jobs_) most = std::max(most, job.row_end - job.row_begin);
  const bool pairs = problem.dtype == DType::kBFloat16 && !scaled;
  const bool few = most <= (pairs ? table.bfloat16_outer_rows : table.outer_rows);
  b.row_block = std::min(problem.rows, few ? kWideTileRows : kTileRows);
  b.col_block = std::min(problem.cols, round_up(even_part(problem.cols, few ? kWideTileCols : kTileCols), kStep));
  // No thread is to wait for another.
  while (threads > 1 && b.row_block > kWideTileRows && num_items(problem) < 2 * threads)
    b.row_block = std::max(round_up(ceil_div(b.row_block, 2), table.tile_rows), kWideTileRows);
  b.depth_block = std::min(most, kRowsAtOnce * compute_size(DType::kFloat32) / compute_size(problem.dtype));
  partials_.assign(positions_.size() * num_tiles(problem), 0.0);
  problem.partials = partials_.data();
}

int64_t GradientPlan::workspace_bytes(const Kernels& table) const {
  const int64_t size = compute_size(problem.dtype), lanes = table.vector_bytes / size;
  const Blocking& b = problem.blocking;
  const int64_t left = round_up(b.row_block, lanes), right = round_up(b.col_block, lanes);
  return size *
         ((left + right) * b.depth_block + b.row_block * right + table.row_buffers * round_up(b.depth_block, lanes));
}

void GradientPlan::reduce(void* dcoeffs, bool wide) const {
  const int64_t tiles = num_tiles(problem);
  for (size_t slot = 0; slot < positions_.size(); slot++) {
    double sum = 0;
    for (int64_t i = 0; i < tiles; i++) sum += partials_[slot * tiles + i];
    if (wide) static_cast<double*>(dcoeffs)[positions_[slot]] = sum;
    else static_cast<float*>(dcoeffs)[positions_[slot]] = static_cast<float>(sum);
  }
}

}  // namespace taps_fast::cpu
