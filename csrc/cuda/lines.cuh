// Reading the elements, tables and rows of norm.h.
#pragma once

#include <cstring>
#include <type_traits>

#include "norm.h"
#include "ptx.cuh"

namespace taps_fast::cuda {

/// What sums and tables are in: float32; float64 for float64 elements.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// kCount neighbouring elements; more than one are whole 16-byte vectors. They may be written in place.
template <class T, int kCount>
struct Vector {
  T values[kCount];

  __device__ static Vector from(const T* p) {
    Vector v;
    if constexpr (kCount == 1) {
      v.values[0] = load_own(p);
    } else {
#pragma unroll
      for (int n = 0; n < kCount * static_cast<int>(sizeof(T)) / 16; n++) {
        const uint4 piece = load_own(reinterpret_cast<const uint4*>(p) + n);
        memcpy(reinterpret_cast<char*>(v.values) + 16 * n, &piece, 16);
      }
    }
    return v;
  }

  __device__ void to(T* p) const {
    if constexpr (kCount == 1) {
      store(p, values[0]);
    } else {
      static_assert(sizeof(values) == 16);
      uint4 piece;
      memcpy(&piece, values, 16);
      store(reinterpret_cast<uint4*>(p), piece);
    }
  }
};

/// The row of a table that goes with a row of x.
__device__ inline int64_t table_row(const Lines& in, int64_t row) {
  if (!in.mixed) return 0;
  const int64_t id = load(in.ids + row / in.inner % in.batch);
  return id < 0 ? in.tasks : id;
}

/// Entries of a table from `channel` on: one for all elements of a plane, else one each.
template <class C, int kCount>
__device__ Vector<C, kCount> entries(const Table& table, int64_t row, int64_t channel, bool plane, C absent) {
  Vector<C, kCount> v;
  if (table.data && !plane)
    return Vector<C, kCount>::from(static_cast<const C*>(table.data) + row * table.row_stride + channel);
  const C one = table.data ? load(static_cast<const C*>(table.data) + row * table.row_stride + channel) : absent;
#pragma unroll
  for (int e = 0; e < kCount; e++) v.values[e] = one;
  return v;
}

}  // namespace taps_fast::cuda
