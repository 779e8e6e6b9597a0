// tile.h in tiles of AMX: up to 32 rows times half a strip of columns, summed over the panel's depth.
//
//   out[i, j] (+)= scale · Σ_p a_i[p] · strip[p · width + j]        p counts pairs
//
// 2 × 2 tiles of sums with two tiles of either operand take all eight, and each tile loaded is used twice. A panel of
// pairs is what the right operand wants as it is: 16 pairs of depths by 16 columns. The left one wants rows at one
// distance, so they are copied, [depth / 32, kTileRows, 32 numbers] and zeros, which also spares those that lie a power
// of two apart from sharing the same few lines of L1. Rows that are not there are multiplied and not stored.
#pragma once

#include "amx.h"
#include "tile.h"
#include "transpose.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kAmxPairs = kAmxBytes / sizeof(Pair);  // of depth, in one step
constexpr int64_t kAmxColumns = kAmxBytes / sizeof(float);
static_assert(kTileRows == 2 * kAmxRows && kStripVectors % 2 == 0 && kLanes<float> == kAmxColumns);

template <>
constexpr int64_t kFetchDepth<Pair> = kAmxPairs * 2 / kStripVectors;  // a strip takes several tiles

/// All tiles are as large as can be while this lives. It starts and ends with each thread's run, because whatever else
/// runs there (oneDNN) has shapes of its own, and because a thread without tiles is cheaper to switch.
class AmxScope {
 public:
  AmxScope() {
    AmxShapes shapes{};
    shapes.palette = 1;
    for (int64_t i = 0; i < kAmxTiles; i++) {
      shapes.bytes[i] = kAmxBytes;
      shapes.rows[i] = kAmxRows;
    }
    amx::configure(shapes);
  }
  ~AmxScope() { amx::release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

/// kDown × kAcross tiles of sums, of which num_rows rows are stored. `fetch` lines are fetched a step.
template <int kDown, int kAcross>
void tile(const Pair* rows, int64_t num_rows, const Pair* strip, int64_t width, float* out, int64_t out_stride,
          int64_t depth, bool accumulate, float scale, Ahead* ahead, int64_t fetch) {
  amx::zero<0>();
  amx::zero<1>();
  amx::zero<2>();
  amx::zero<3>();
  const auto step = [&](const Pair* a, const Pair* b, int64_t b_stride) __attribute__((always_inline)) {
    if (fetch > 0) ahead->fetch(fetch);
    amx::load<4>(a, kAmxBytes);
    amx::load<6>(b, b_stride * sizeof(Pair));
    amx::multiply<0, 4, 6>();
    if constexpr (kAcross == 2) {
      amx::load<7>(b + kAmxColumns, b_stride * sizeof(Pair));
      amx::multiply<1, 4, 7>();
    }
    if constexpr (kDown == 2) {
      amx::load<5>(a + kAmxRows * kAmxPairs, kAmxBytes);
      amx::multiply<2, 5, 6>();
      if constexpr (kAcross == 2) amx::multiply<3, 5, 7>();
    }
  };
  int64_t p = 0;
  for (; p + kAmxPairs <= depth; p += kAmxPairs) step(rows + p * kTileRows, strip + p * width, width);
  if (p < depth) {
    // What lies behind the strip may be no number, and 0 times that is none either.
    constexpr int64_t columns = kAcross * kAmxColumns;
    alignas(kAmxBytes) Pair last[kAmxPairs * columns] = {};
    for (int64_t i = 0; p + i < depth; i++)
      for (int64_t j = 0; j < columns; j += kAmxColumns)
        store(last + i * columns + j, load(strip + (p + i) * width + j));
    step(rows + p * kTileRows, last, columns);
  }
  // Through memory, because only there they can be scaled and added up: sums of blocks, as in tile.h.
  alignas(kAmxBytes) float sums[kTileRows * 2 * kAmxColumns];
  constexpr int64_t row = 2 * kAmxColumns, below = kAmxRows * row, row_bytes = row * sizeof(float);
  amx::store<0>(sums, row_bytes);
  if constexpr (kAcross == 2) amx::store<1>(sums + kAmxColumns, row_bytes);
  if constexpr (kDown == 2) amx::store<2>(sums + below, row_bytes);
  if constexpr (kDown == 2 && kAcross == 2) amx::store<3>(sums + below + kAmxColumns, row_bytes);
  for (int64_t i = 0; i < num_rows; i++)
#pragma GCC unroll 2
    for (int64_t j = 0; j < kAcross * kAmxColumns; j += kAmxColumns) {
      float* y = out + i * out_stride + j;
      const FloatVec sum = scale * load(sums + i * row + j);
      store(y, accumulate ? load(y) + sum : sum);
    }
}

/// Copies for `tile_row` of rows that are columns of what is packed: pair p of row i is from[p · stride + i].
void copy_columns(Pair* rows, const Pair* from, int64_t stride, int64_t num_rows, int64_t depth) {
  for (int64_t p = 0; p < depth; p += kAmxPairs)
    for (int64_t i = 0; i < num_rows; i += kAmxRows) {
      FloatVec r[kAmxPairs];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kAmxPairs; k++) r[k] = p + k < depth ? load(from + (p + k) * stride + i) : FloatVec{};
      transpose(r);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kAmxPairs; k++) store(rows + p * kTileRows + (i + k) * kAmxPairs, r[k]);
    }
}

/// As in tile.h, but `rows` are copies as `interleave` makes them of kTileRows rows.
void tile_row(const Pair* rows, int64_t num_rows, const Pair* panel, int64_t num_columns, float* out,
              int64_t out_stride, int64_t depth, bool accumulate, float scale, Ahead* ahead, int64_t fetch) {
  constexpr int64_t width = kAmxColumns * kStripVectors;
  with_constant<2>(ceil_div(num_rows, kAmxRows), [&](auto down) {
    for (int64_t j = 0; j < num_columns; j += 2 * kAmxColumns) {
      const int64_t begin = j / width * width, strip_width = min(width, round_up(num_columns - begin, kAmxColumns));
      const Pair* strip = panel + begin * depth + j - begin;
      with_constant<2>(ceil_div(num_columns - j, kAmxColumns), [&](auto across) {
        tile<down.value, across.value>(rows, num_rows, strip, strip_width, out + j, out_stride, depth, accumulate,
                                       scale, ahead, fetch);
      });
    }
  });
}

/// Whether the tiles give the right product, of sizes that no tile divides. Small integers: each sum is exact.
bool product_is_right() {
  constexpr int64_t num_rows = 21, columns = 83, numbers = 77, depth = ceil_div(numbers, 2);
  constexpr int64_t most_columns = round_up(columns, kAmxColumns);
  const auto left = [](int64_t i, int64_t p) { return static_cast<float>(p < numbers ? (i * 7 + p * 3) % 13 - 6 : 0); };
  const auto right = [](int64_t p, int64_t j) {
    return static_cast<float>(p < numbers ? (p * 5 + j * 11) % 17 - 8 : 0);
  };
  const auto pair = [](float first, float second) {
    return Pair{__builtin_bit_cast(uint32_t, first) >> 16 | (__builtin_bit_cast(uint32_t, second) & 0xffff0000)};
  };
  alignas(kAmxBytes) Pair rows[round_up(depth, kAmxPairs) * kTileRows] = {};
  for (int64_t i = 0; i < num_rows; i++)
    for (int64_t p = 0; p < depth; p++)
      rows[(p / kAmxPairs * kTileRows + i) * kAmxPairs + p % kAmxPairs] = pair(left(i, 2 * p), left(i, 2 * p + 1));
  Pair panel[depth * most_columns];
  constexpr int64_t width = kAmxColumns * kStripVectors;
  for (int64_t j = 0; j < most_columns; j++)
    for (int64_t p = 0; p < depth; p++) {
      const int64_t begin = j / width * width, strip_width = min(width, most_columns - begin);
      panel[begin * depth + p * strip_width + j - begin] = pair(right(2 * p, j), right(2 * p + 1, j));
    }
  float out[num_rows * most_columns];
  for (float& y : out) y = 1;
  {
    const AmxScope scope;
    tile_row(rows, num_rows, panel, columns, out, most_columns, depth, true, 0.5f, nullptr, 0);
  }
  for (int64_t i = 0; i < num_rows; i++)
    for (int64_t j = 0; j < columns; j++) {
      float sum = 0;
      for (int64_t p = 0; p < numbers; p++) sum += left(i, p) * right(p, j);
      if (out[i * most_columns + j] != 1 + 0.5f * sum) return false;
    }
  return true;
}

}  // namespace
}  // namespace taps_fast::cpu
