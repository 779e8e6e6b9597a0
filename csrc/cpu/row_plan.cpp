// Passes of forward and dx.
//
// Rows are ordered so that those which share the base's product lie together: closed rows of every task, base rows, and
// (split, or many small groups) the rows of open tasks, whose deltas then need only their own product. The other open
// groups follow, each with its terms summed into one panel. Cost grows with the open gates of the tasks present.
#include <algorithm>
#include <cmath>

#include "plan.h"

namespace taps_fast::cpu {
namespace {

// A panel takes 256 KiB of L2 (float32; 512 KiB for two-byte types, whose rows are converted once a panel), which
// leaves room for the weights of the next one, fetched meanwhile (two terms: 512 KiB), and for the rows' sums. Forward
// reads weights along its depth, dx along its columns.
constexpr int64_t kForwardColBytes = 256, kForwardDepth = 1024;
constexpr int64_t kBackwardColBytes = 512, kBackwardDepth = 512;
// Very many rows and their outputs stay in no cache from one panel to the next, so that fewer and wider panels gain:
// seen on Cascade Lake from about 2,048 rows on.
constexpr int64_t kWidePanelRows = 2048, kWidePanelBytes = 384 << 10;
// Without a panel, and each weight read by one pass only, forward reads rows of weights whole: memory brings one long
// piece in less time than several short ones. This bounds the buffer of converted inputs, a row of it.
constexpr int64_t kInputBytes = 64 << 10, kDepthStep = 64;
constexpr int64_t kSumsBytes = 1 << 20;  // float32 sums that one item keeps between depth blocks and passes
constexpr int64_t kMostRows = 2048;  // rows of one item
constexpr int64_t kFewestRows = 192;  // splitting rows packs a panel again: worth about 25 rows
constexpr int64_t kManyItems = 8;  // a thread
constexpr int64_t kSmallGroup = 4;  // rows; up to here the base's product is shared with other groups
constexpr int64_t kSignRows = 12, kByteRows = 6;  // most_rows_apart
constexpr int64_t kMaskRows = 1;  // find_choices
// Few rows of dx pass over weights once, and memory brings one long piece in less time than many short ones: items are
// wide, and threads share the depth. The sums of an item, which are read and written with every few rows of weights,
// may take this much of L2; those of all items, a part of the depth each, this much a thread.
constexpr int64_t kUnpackedBytes = 128 << 10, kPartialsBytes = 1 << 20;
constexpr int64_t kUnpackedCols = 8192;  // of an item: its buffers are as wide
constexpr int64_t kFewestDepth = 16, kDepthOfRow = 4;  // of a part: its sums are to be few beside the weights it reads

/// Most rows for which a coded term has a product of its own, beside one product of the base for the whole batch: more
/// make up for decoding into a panel. A task beside others finds the base in L2 and so packs in less time. Masks of few
/// rows are terms like dense ones (dot.h): their tile is read without decoding.
int64_t most_rows_apart(Coding coding, Algorithm algorithm) {
  if (coding == Coding::kDense || algorithm == Algorithm::kBlend) return -1;
  if (algorithm == Algorithm::kSplit) return INT64_MAX;
  if (coding == Coding::kMask) return -1;
  return coding == Coding::kSign ? kSignRows : kByteRows;
}

/// Most rows of a pass for which the kernels pack no weights (dot.h, axpy.h).
int64_t most_rows_unpacked(const RowProduct& problem, const Kernels& table, bool reads_once) {
  const bool pairs = problem.dtype == DType::kBFloat16;
  if (!problem.transposed && problem.rows_come && reads_once)
    return pairs ? table.bfloat16_axpy_rows_coming : table.axpy_rows_coming;
  if (!problem.transposed) return pairs ? table.bfloat16_axpy_rows : table.axpy_rows;
  if (problem.dtype == DType::kFloat32)
    return problem.rows_come ? table.float32_dot_rows_coming : table.float32_dot_rows;
  return pairs ? table.bfloat16_dot_rows : table.dot_rows;
}

/// One group of the batch: its rows and the terms of its weight.
struct Member {
  int64_t task;
  double base_coeff;
  int64_t rows;
  std::vector<Term> deltas, apart;
  int64_t choice = -1;  // the first member that masks the same tile; -1: none other does
};

bool mask_one_tile(const std::vector<Term>& a, const std::vector<Term>& b) {
  const auto masks = [](const std::vector<Term>& t) { return t.size() == 1 && t[0].coding == Coding::kMask; };
  return masks(a) && masks(b) && a[0].matrix.data == b[0].matrix.data && a[0].matrix.stride == b[0].matrix.stride;
}

/// Marks the members whose weights are the base and a mask, of one size for all outputs, on a tile that others mask as
/// well. With up to min_rows rows products of base and tile apart cost less, with more than max_rows a panel of its
/// own.
void find_choices(std::vector<Member>& members, int64_t min_rows, int64_t max_rows) {
  const auto can_choose = [&](const Member& m) {
    return m.rows > min_rows && m.rows <= max_rows && m.base_coeff == 1 && mask_one_tile(m.deltas, m.deltas) &&
           m.deltas[0].scale_step == 0;
  };
  for (size_t i = 0; i < members.size(); i++) {
    if (members[i].choice >= 0 || !can_choose(members[i])) continue;
    for (size_t j = i + 1; j < members.size(); j++)
      if (can_choose(members[j]) && mask_one_tile(members[i].deltas, members[j].deltas))
        members[i].choice = members[j].choice = i;
  }
}

Member member(const Weight& weight, int64_t task, double base_coeff, int64_t rows, Algorithm algorithm) {
  Member found{task, base_coeff, rows, {}, {}};
  for (size_t k = 0; k < weight.deltas.size() && task >= 0; k++) {
    Term term = weight.deltas[k];
    term.coeff = weight.coeff(task, k);
    if (term.coeff != 0) (rows <= most_rows_apart(term.coding, algorithm) ? found.apart : found.deltas).push_back(term);
  }
  return found;
}

}  // namespace

void RowPlan::add_group(int64_t row_begin, int64_t row_end, const std::vector<Term>& terms, bool first, bool last) {
  const int64_t begin = terms_.size();
  terms_.insert(terms_.end(), terms.begin(), terms.end());
  passes_.push_back({row_begin, row_end, begin, static_cast<int64_t>(terms_.size()), first, last});
}

void RowPlan::finish(const Weight& weight, const Groups& groups, Algorithm algorithm, bool bias_by_task, int threads,
                     const Kernels& table) {
  std::vector<Member> members;
  if (groups.offsets) {
    const int64_t rows_per_sample = groups.batch ? problem.rows / groups.batch : 0;
    for (int64_t g = 0; g <= groups.tasks; g++) {
      const int64_t rows = (groups.offsets[g + 1] - groups.offsets[g]) * rows_per_sample;
      if (rows == 0) continue;
      members.push_back(member(weight, g - 1, weight.base_coeff(g - 1), rows, algorithm));
    }
  } else {
    members.push_back(member(weight, 0, weight.base_coeff(0), problem.rows, algorithm));
  }

  if (problem.transposed && problem.dtype != DType::kFloat64 && algorithm != Algorithm::kSplit)
    find_choices(members, kMaskRows,
                 problem.dtype == DType::kBFloat16 ? table.bfloat16_choice_rows : table.choice_rows);

  const auto open = [](const Member& m) { return !m.deltas.empty(); };
  const auto cheap_to_share = [&](const Member& m) { return !open(m) || (m.rows <= kSmallGroup && m.choice < 0); };
  const bool share = std::count_if(members.begin(), members.end(), cheap_to_share) > 1;
  const auto shares_base = [&](const Member& m) {  // a base coefficient of NaN is like no other
    return !std::isnan(m.base_coeff) && (!open(m) || algorithm == Algorithm::kSplit || (share && cheap_to_share(m)));
  };
  // Sharers first, by base coefficient; among equals closed before open, so that a run's closed rows lie together. Then
  // choices, each as a run.
  std::stable_sort(members.begin(), members.end(), [&](const Member& a, const Member& b) {
    if (shares_base(a) != shares_base(b)) return shares_base(a);
    if (!shares_base(a)) return a.choice > b.choice;
    return a.base_coeff != b.base_coeff ? a.base_coeff < b.base_coeff : open(a) < open(b);
  });

  int64_t row = 0;
  size_t begins = 0;  // the first pass of a choice
  for (size_t i = 0; i < members.size();) {
    if (!shares_base(members[i])) {
      std::vector<Term> terms = members[i].deltas;
      if (members[i].base_coeff != 0) terms.insert(terms.begin(), {weight.base, members[i].base_coeff});
      add_group(row, row + members[i].rows, terms, true, true);
      const int64_t choice = members[i].choice;
      if (choice >= 0 && i > 0 && members[i - 1].choice == choice) passes_[begins].choice_end = passes_.size();
      else begins = passes_.size() - 1;
      row += members[i++].rows;
      continue;
    }
    size_t end = i;
    int64_t rows = 0, closed = 0;
    for (; end < members.size() && shares_base(members[end]) && members[end].base_coeff == members[i].base_coeff;
         end++) {
      rows += members[end].rows;
      if (!open(members[end])) closed += members[end].rows;
    }
    // Closed rows are complete after the base's product (or, at base coefficient 0, with no product at all).
    const bool has_base = members[i].base_coeff != 0;
    const std::vector<Term> base = {{weight.base, members[i].base_coeff}};
    if (has_base && closed == rows) {
      add_group(row, row + rows, base, true, true);
    } else {
      if (has_base) add_group(row, row + rows, base, true, false);
      if (closed && weight.has_base) add_group(row, row + closed, {}, !has_base, true);
    }
    for (const size_t start = i; i < end; row += members[i++].rows) {
      const std::vector<Term>& deltas = members[i].deltas;
      for (size_t d = 0; d < deltas.size(); d++)
        add_group(row, row + members[i].rows, {deltas[d]}, !has_base && d == 0, d + 1 == deltas.size());
      const bool goes_on = problem.transposed && i > start && mask_one_tile(members[i - 1].deltas, deltas);
      if (goes_on) passes_[begins].choice_end = passes_.size();
      else begins = passes_.size() - 1;
    }
  }

  row = 0;
  for (const Member& m : members) {
    if (!m.apart.empty()) {
      const int64_t begin = terms_.size();
      terms_.insert(terms_.end(), m.apart.begin(), m.apart.end());
      apart_.push_back({row, row + m.rows, begin, static_cast<int64_t>(terms_.size()), false, true});
    }
    row += m.rows;
  }
  if (groups.offsets) {
    rows_.reserve(problem.rows);
    for (const Member& m : members)
      for_each_row(groups, m.task + 1, problem.rows, [&](int64_t r) {
        rows_.push_back(r);
        if (bias_by_task) bias_rows_.push_back(m.task < 0 ? groups.tasks : m.task);
      });
    problem.row_index = rows_.data();
    problem.bias_index = bias_by_task ? bias_rows_.data() : nullptr;
  }
  problem.terms = terms_.data();
  problem.passes = passes_.data();
  problem.num_passes = passes_.size();

  problem.rows_come = rows_come_by_themselves();
  problem.few_rows = most_rows_unpacked(problem, table, reads_weights_once());
  choose_blocks(threads, table);
}

bool RowPlan::has_codes(const Pass& pass) const {
  return std::any_of(terms_.begin() + pass.term_begin, terms_.begin() + pass.term_end,
                     [](const Term& t) { return t.coding != Coding::kDense && t.coding != Coding::kMask; });
}

bool RowPlan::reads_weights_once() const {
  std::vector<const void*> read;
  for (const Term& term : terms_) read.push_back(term.matrix.data);
  std::sort(read.begin(), read.end());
  return std::adjacent_find(read.begin(), read.end()) == read.end();
}

void RowPlan::choose_blocks(int threads, const Kernels& table) {
  Blocking& b = problem.blocking;
  const int64_t lanes = table.vector_bytes / compute_size(problem.dtype);
  const bool choice = std::any_of(passes_.begin(), passes_.end(), [](const Pass& p) { return p.choice_end > 0; });
  const int64_t bytes = problem.transposed ? kForwardColBytes : kBackwardColBytes;
  const int64_t strip = lanes * table.strip_vectors;
  int64_t most_cols = choice ? strip : bytes / element_size(problem.dtype);
  const bool packs = choice || std::any_of(passes_.begin(), passes_.end(), [&](const Pass& p) {
                       return p.row_end - p.row_begin > problem.few_rows || has_codes(p);
                     });
  b.depth_block = std::clamp<int64_t>(problem.depth, 1, problem.transposed ? kForwardDepth : kBackwardDepth);
  if (problem.transposed && !choice && problem.rows >= kWidePanelRows) {
    const int64_t wide = kWidePanelBytes / (compute_size(problem.dtype) * b.depth_block);
    most_cols = std::max(most_cols, wide / strip * strip);
  }
  if (problem.transposed && !packs && reads_weights_once())
    b.depth_block =
        round_up(even_part(std::max<int64_t>(problem.depth, 1), kInputBytes / compute_size(problem.dtype)), kDepthStep);
  // Equal parts of whole strips, then of vectors: an item of half the size would leave its thread waiting.
  const int64_t fewest_parts = ceil_div(problem.cols, most_cols);
  const auto part_of_cols = [&](int64_t parts) {
    const int64_t cols = ceil_div(problem.cols, parts);
    return round_up(cols, cols < strip ? lanes : strip);
  };
  // Fewer columns an item, then fewer rows, until no thread waits for another. Each takes its next item before it runs
  // one, to fetch what that reads, so one item a thread is too few.
  const auto busy = [&] {
    const int64_t items = num_items(problem), rounds = ceil_div(items, threads);
    return threads == 1 || items >= kManyItems * threads || (rounds > 1 && items * 20 >= rounds * threads * 19);
  };
  b.row_block = even_part(problem.rows, kMostRows);
  problem.depth_part = std::max<int64_t>(problem.depth, 1);
  const bool panels = packs || problem.transposed;
  if (panels) {
    b.col_block = part_of_cols(fewest_parts);
    for (int64_t parts = fewest_parts + 1; b.col_block > lanes && !busy(); parts++) b.col_block = part_of_cols(parts);
  } else {
    const int64_t size = compute_size(problem.dtype), sums = size * std::max<int64_t>(problem.rows, 1);
    const int64_t most = std::clamp(kUnpackedBytes / sums, most_cols, kUnpackedCols);
    b.col_block = std::max(round_up(even_part(problem.cols, most), lanes), lanes);
    const int64_t wanted = threads > 1 ? ceil_div(2 * threads, num_blocks(problem)) : 1;
    const int64_t parts = std::clamp<int64_t>(threads * kPartialsBytes / (sums * problem.cols), 1, wanted);
    problem.depth_part =
        round_up(std::max({ceil_div(problem.depth, parts), kDepthOfRow * problem.rows, int64_t(1)}), kFewestDepth);
  }
  if (panels && !busy() && problem.rows >= 2 * kFewestRows) {
    b.col_block = part_of_cols(fewest_parts);
    while (b.row_block >= 2 * kFewestRows && !busy()) b.row_block = ceil_div(b.row_block, 2);
  }
  keeps_sums_ = problem.depth_part > b.depth_block || std::any_of(passes_.begin(), passes_.end(), [&](const Pass& p) {
                  const int64_t rows = p.row_end - p.row_begin;
                  return !p.first || !p.last || p.choice_end || (rows > table.axpy_rows && rows <= problem.few_rows);
                });
  b.panel_depth = packs ? std::max(b.depth_block, table.choice_panels) : 0;
  if (keeps_sums_) b.row_block = std::min(b.row_block, kSumsBytes / (compute_size(problem.dtype) * b.col_block));
  parts_done_.assign(num_blocks(problem), 0);
  problem.parts_done = parts_done_.data();
}

int64_t RowPlan::partials_bytes() const {
  const int64_t parts = num_parts(problem);
  return parts > 1 ? parts * problem.rows * problem.cols * compute_size(problem.dtype) : 0;
}

int64_t RowPlan::workspace_bytes(const Kernels& table) const {
  const int64_t size = compute_size(problem.dtype), lanes = table.vector_bytes / size;
  const Blocking& b = problem.blocking;
  const int64_t buffer_rows = table.row_buffers, stride = round_up(b.col_block, lanes);
  return size * (stride * b.panel_depth + buffer_rows * round_up(b.depth_block, lanes) +
                 (buffer_rows + (keeps_sums_ ? b.row_block : 0)) * stride);
}

}  // namespace taps_fast::cpu
